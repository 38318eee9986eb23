"""What the routes share: engine, settings, and how bodies become prompts and sampling parameters."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from starlette.concurrency import run_in_threadpool

from tqai.errors import ConfigError
from tqai.server.api.errors import ApiError
from tqai.server.api.schemas import Message, SamplingFields, Tool
from tqai.server.api.settings import ApiSettings
from tqai.server.api.tools import ToolFormat, tool_format_of
from tqai.server.engine.engine import Engine
from tqai.server.engine.grammar import json_grammar, regex_grammar
from tqai.server.engine.sampling import SamplingParams

__all__ = ["Context", "new_id"]

COMPLETION_TOKENS = 16


class Context:
    """See the module's text."""

    def __init__(self, engine: Engine, settings: ApiSettings) -> None:
        self.engine, self.settings = engine, settings
        self.tokenizer = engine.tokenizer
        self.created = int(time.time())
        self.chat_template = settings.chat_template or getattr(self.tokenizer, "chat_template", None)
        self.tool_format: ToolFormat | None = tool_format_of(self.chat_template)
        self.tool_token = _special_token(self.tokenizer, self.tool_format.start if self.tool_format else "")

    def check_model(self, name: str) -> None:
        """Raises 404 where another model is asked for."""
        if name != self.settings.model_name:
            raise ApiError(404, f"the model {name!r} is not served here", "model", "model_not_found")

    async def tokens_of(self, prompt: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        return await run_in_threadpool(self._encode, prompt, add_special_tokens, "prompt")

    async def tokens_of_chat(self, messages: list[Message], tools: list[Tool] | None) -> list[int]:
        """Token ids of a conversation, up to where the assistant speaks."""
        text = await run_in_threadpool(self._rendered, messages, tools)
        return await run_in_threadpool(self._encode, text, False, "messages")

    def sampling(
        self,
        body: SamplingFields,
        prompt_tokens: int,
        max_tokens: int | None,
        default_max_tokens: int | None,
        grammar: str | None,
        logprobs: int | None,
        prompt_logprobs: bool = False,
        reads_calls: bool = False,
    ) -> SamplingParams:
        """The sampling parameters of a body; without a limit on its tokens, the default (None: all that
        the model's length leaves). `reads_calls`: the token that begins a tool call is part of the text."""
        limit = self.settings.max_output_tokens
        room = self.engine.max_model_len - prompt_tokens
        if max_tokens is None:
            max_tokens = max(min(n for n in (default_max_tokens, limit, room) if n is not None), 1)
        elif limit is not None and max_tokens > limit:
            raise ApiError(400, f"max_tokens={max_tokens}: at most {limit} are generated", "max_tokens")
        stop = body.stop if body.stop is not None else ()

        def given(value: Any, default: Any) -> Any:
            return default if value is None else value

        try:
            return SamplingParams(
                temperature=given(body.temperature, 1.0),
                top_p=given(body.top_p, 1.0),
                top_k=max(given(body.top_k, 0), 0),
                min_p=given(body.min_p, 0.0),
                repetition_penalty=given(body.repetition_penalty, 1.0),
                presence_penalty=given(body.presence_penalty, 0.0),
                frequency_penalty=given(body.frequency_penalty, 0.0),
                logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
                seed=body.seed,
                max_tokens=max_tokens,
                stop=(stop,) if isinstance(stop, str) else tuple(stop),
                stop_token_ids=tuple(body.stop_token_ids or ()),
                ignore_eos=body.ignore_eos,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                grammar=grammar,
                skip_special_tokens=not (reads_calls and self.tool_token is not None),
            )
        except ConfigError as error:
            raise ApiError(400, str(error)) from error

    async def grammar_of(
        self, json_schema: dict[str, Any] | None, regex: str | None, param: str
    ) -> str | None:
        """The grammar of a schema or a regular expression, checked; None without either."""
        if json_schema is None and regex is None:
            return None
        if json_schema is not None and regex is not None:
            raise ApiError(400, f"{param}: a schema and a regular expression exclude each other", param)
        param = param if regex is None else "guided_regex"
        try:
            grammar = json_grammar(json_schema) if json_schema is not None else regex_grammar(regex or "")
            await run_in_threadpool(self.engine.grammars.check, grammar)
        except (ConfigError, NotImplementedError, ValueError, RecursionError) as error:
            raise ApiError(400, f"{param}: {error}", param) from error
        return grammar

    def token_text(self, token: int) -> str:
        """The text of one token."""
        text: str = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return text

    def _encode(self, text: str, add_special_tokens: bool, param: str) -> list[int]:
        try:
            ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except Exception as error:  # lone surrogates and whatever else a tokenizer chokes on
            raise ApiError(400, f"{param}: the tokenizer cannot read this text", param) from error
        return list(ids)

    def _rendered(self, messages: list[Message], tools: list[Tool] | None) -> str:
        if self.chat_template is None:
            raise ApiError(
                400, "this model has no chat template: use /v1/completions, or serve it with one", "messages"
            )
        plain = [_plain(message) for message in messages]
        try:
            text: str = self.tokenizer.apply_chat_template(
                plain,
                tools=[tool.model_dump(exclude_none=True) for tool in tools] if tools else None,
                chat_template=self.chat_template,
                add_generation_prompt=True,
                tokenize=False,
            )
        except Exception as error:  # templates raise what they like
            raise ApiError(
                400, "messages: the model's chat template refuses these messages", "messages"
            ) from error
        return text


def _special_token(tokenizer: Any, text: str) -> int | None:
    """The id of the special token that is spelt `text`, which decoding would leave out; or None."""
    added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    return next((token for token, known in added.items() if known.special and known.content == text), None)


def _plain(message: Message) -> dict[str, Any]:
    """A message as templates expect it: content as one string, arguments as objects."""
    content = message.content
    if isinstance(content, list):
        content = "\n".join(part.text for part in content)
    plain: dict[str, Any] = {"role": message.role, "content": content if content is not None else ""}
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return plain


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def new_id(prefix: str) -> str:
    """A fresh id such as "cmpl-0123456789abcdef"."""
    return f"{prefix}-{uuid.uuid4().hex[:24]}"
