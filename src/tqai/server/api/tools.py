"""Tool calls in the formats of common chat templates.

    hermes   <tool_call>{"name": ..., "arguments": {...}}</tool_call>      Qwen, Hermes
    mistral  [TOOL_CALLS][{"name": ..., "arguments": {...}}]
    llama3   {"name": ..., "parameters": {...}}   as the whole message, perhaps after <|python_tag|>

Which one a model speaks is read off its template; a template without any of them takes no tools. In some
tokenizers the text that begins a call is one special token, which a grammar names by its id.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tqai.server.engine.grammar import JSON_OPTIONS

__all__ = ["FORMATS", "ToolFormat", "ToolReader", "tool_format_of"]


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes tool calls.

    Attributes:
        start: text that begins a call; "" where a call is the whole message.
        end: text that ends one; "" where the end of the message does.
        arguments: name of the member that holds the arguments.
        is_list: the calls are one JSON list.
        marks: texts in a template, all of which tell this format.
        others: texts in a template that tell another format which begins alike.
    """

    name: str
    start: str
    end: str
    arguments: str
    is_list: bool
    marks: tuple[str, ...]
    others: tuple[str, ...] = ()

    def grammar(self, functions: list[tuple[str, dict[str, Any]]], start_token: int | None = None) -> str:
        """An llguidance grammar for one call of one of `functions` (name and schema of the parameters);
        `start_token` is the id of `start` where that is one special token."""
        schema = self._schema(functions)
        if self.is_list:
            schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": 1}
        parts = [self._opening(start_token)] if self.start else []
        parts.append(_json(schema))
        parts += [json.dumps(self.end)] if self.end else []
        return "start: " + " ".join(parts) + "\n"

    def optional_grammar(
        self, functions: list[tuple[str, dict[str, Any]]], start_token: int | None = None
    ) -> str:
        """An llguidance grammar for any text in which every call is one of `functions`."""
        # bounded: a model that likes spaces would never end
        schema, spaces = self._schema(functions), r"/\s{0,2}/"
        if not self.start:
            text = r"TEXT: /(([^{<\s]|<[^|])(.|\n)*)?/"
            return f"start: {spaces} ({_json(schema)} | TEXT)\n{text}\n"
        if self.is_list:
            schema = {"type": "array", "items": schema, "minItems": 1}
        call = f"head {spaces} {_json(schema)}"
        rules = [f"start: call* TEXT\ncall: {call} {spaces} {json.dumps(self.end)}"]
        if not self.end:
            rules = [f"start: call | TEXT\ncall: {call}"]
        # a lazy rule ends where its text does for the first time; no text holds a special token
        lazy = "[lazy]" if start_token is None else ""
        rules += [f"head{lazy}: TEXT {self._opening(start_token)}", r"TEXT: /(.|\n)*/"]
        return "\n".join(rules) + "\n"

    def _opening(self, start_token: int | None) -> str:
        return json.dumps(self.start) if start_token is None else f"<[{start_token}]>"

    def _schema(self, functions: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
        return {
            "anyOf": [
                {
                    "type": "object",
                    "properties": {"name": {"const": name}, self.arguments: schema},
                    "required": ["name", self.arguments],
                    "additionalProperties": False,
                }
                for name, schema in functions
            ]
        }

    def read(self, text: str) -> tuple[str, list[tuple[str, str]]] | None:
        """Text before the calls and the calls as pairs of name and JSON arguments; None without a call
        that can be read."""
        at = text.find(self.start) if self.start else 0
        if at < 0:
            return None
        before, rest = text[:at], text[at:]
        pieces = []
        if self.end:
            for piece in rest.split(self.start)[1:]:
                pieces.append(piece.partition(self.end)[0])
        else:
            pieces.append(rest.removeprefix(self.start).removeprefix("<|python_tag|>"))
        calls = []
        for piece in pieces:
            try:
                found = json.loads(piece.strip())
            except (ValueError, RecursionError):
                return None
            for call in found if isinstance(found, list) else [found]:
                if not isinstance(call, dict) or not isinstance(call.get("name"), str):
                    return None
                arguments = call.get(self.arguments, call.get("arguments"))
                if arguments is None:
                    return None
                calls.append(
                    (call["name"], arguments if isinstance(arguments, str) else json.dumps(arguments))
                )
        return (before.strip(), calls) if calls else None


def _json(schema: dict[str, Any]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': JSON_OPTIONS})}"


FORMATS = (
    ToolFormat(
        "hermes",
        "<tool_call>",
        "</tool_call>",
        "arguments",
        False,
        ("<tool_call>",),
        ("<function=", "<arg_key>"),
    ),
    ToolFormat("mistral", "[TOOL_CALLS]", "", "arguments", True, ("[TOOL_CALLS]",), ("[ARGS]",)),
    ToolFormat("llama3", "", "", "parameters", False, ('"parameters"', "<|start_header_id|>")),
)


def tool_format_of(template: str | None) -> ToolFormat | None:
    """The format that a chat template shows, or None."""
    if not template or "tools" not in template:
        return None
    for known in FORMATS:
        if all(mark in template for mark in known.marks) and not any(o in template for o in known.others):
            return known
    return None


class ToolReader:
    """Splits a stream of text into content, which goes on at once, and tool calls, which wait for the end."""

    def __init__(self, tool_format: ToolFormat) -> None:
        self._format = tool_format
        self._held = ""
        self._calling = False

    def add(self, text: str) -> str:
        """Content that is certainly no tool call."""
        self._held += text
        start = self._format.start
        if self._calling:
            return ""
        if not start:
            # the first visible character tells whether the message is a call
            visible = self._held.lstrip()
            self._calling = not visible or visible[0] in "{<"
            shown, self._held = ("", self._held) if self._calling else (self._held, "")
            if not visible:
                self._calling = False
                return ""
            return shown
        at = self._held.find(start)
        if at >= 0:
            self._calling = True
            shown, self._held = self._held[:at], self._held[at:]
            return shown
        keep = max((size for size in range(1, len(start)) if self._held.endswith(start[:size])), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def rest(self) -> tuple[str, list[tuple[str, str]]]:
        """At the end: content that was held back, and the calls."""
        found = self._format.read(self._held) if self._held else None
        return ("", found[1]) if found is not None else (self._held, [])
