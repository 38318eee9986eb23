"""Calls that are forced, strict or read from special tokens, in the format of each family of templates."""

import json

import pytest
import torch
from serving import serving

from tqai.errors import ConfigError
from tqai.server.api import tools
from tqai.server.api.tools import FORMATS, ToolFormat, tool_format_of
from tqai.server.engine.grammar import Grammars
from tqai.server.engine.sampling import Sampler

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTIONS = [("weather", CITY), ("loose", {"type": "object"})]
PAD = 2
"""A special token of the embedded model's tokenizer, as "[TOOL_CALLS]" is one of Mistral's."""
CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"


@pytest.fixture(scope="module")
def follows(loaded):
    """Whether a text may come under a grammar, and whether it may end there."""
    grammars = Grammars(loaded[1], 4096)

    def check(grammar, ids):
        grammars.check(grammar)
        constraint = grammars.constraint(grammar)
        try:
            for token in ids:
                constraint.take(token)
        except ConfigError:
            return False
        return constraint._matcher.is_accepting()

    def of(grammar, text):
        return check(grammar, loaded[1].encode(text))

    of.ids = check
    return of


def written(known, *calls):
    """Calls as a model writes them, with the line breaks of the templates."""
    texts = [{"name": name, known.arguments: arguments} for name, arguments in calls]
    if known.is_list:
        return known.start + json.dumps(texts)
    line = "\n" if known.end else ""
    return "\n".join(f"{known.start}{line}{json.dumps(text)}{line}{known.end}" for text in texts)


@pytest.mark.parametrize("known", FORMATS, ids=lambda known: known.name)
def test_strict_calls_fit_their_schemas_and_other_text_is_free(follows, known):
    grammar = known.optional_grammar(FUNCTIONS)
    good, bad = ("weather", {"city": "Oslo"}), ("weather", {"city": "Bonn"})
    for text in (
        "Plain text.",
        "",
        "<b>text</b>",
        "a < b",
        written(known, good),
        written(known, ("loose", {"x": [1]})),
    ):
        assert follows(grammar, text), text
    for text in (written(known, bad), written(known, ("other", {})), f"{known.start}{{"):
        assert not follows(grammar, text), text
    if known.start:
        assert follows(grammar, "Let me see. " + written(known, good))
        assert not follows(grammar, "Let me see. " + written(known, bad))
        assert follows(grammar, written(known, good, good)) and not follows(
            grammar, written(known, good, bad)
        )


@pytest.mark.parametrize("known", FORMATS, ids=lambda known: known.name)
def test_a_forced_call_is_one_call_and_nothing_else(follows, known):
    grammar = known.grammar(FUNCTIONS)
    for arguments, fits in (({"city": "Rome"}, True), ({"city": "Bonn"}, False)):
        text = written(known, ("weather", arguments))
        assert follows(grammar, text.replace("\n", "")) == fits
    two = written(known, ("weather", {"city": "Rome"}), ("weather", {"city": "Rome"}))
    assert not follows(grammar, two.replace("\n", "")) and not follows(grammar, "Well.")


def test_a_call_begins_with_its_special_token_where_it_has_one(follows, loaded):
    known = FORMATS[1]
    call = loaded[1].encode(json.dumps([{"name": "weather", "arguments": {"city": "Oslo"}}]))
    wrong = loaded[1].encode(json.dumps([{"name": "weather", "arguments": {"city": "Bonn"}}]))
    text = loaded[1].encode("Well.")
    forced, strict = known.grammar(FUNCTIONS, PAD), known.optional_grammar(FUNCTIONS, PAD)
    assert follows.ids(forced, [PAD, *call]) and not follows.ids(forced, [PAD, *wrong])
    assert not follows.ids(forced, call)
    assert follows.ids(strict, [*text, PAD, *call]) and not follows.ids(strict, [*text, PAD, *wrong])
    assert follows.ids(strict, text)


def test_formats_that_only_begin_alike_are_not_taken_for_known():
    """Their calls would not be read: such models get 400."""
    for template in (
        "{{ tools }} [TOOL_CALLS]f[ARGS]",
        "{{ tools }} <tool_call><function=f>",
        "{{ tools }} <tool_call>f<arg_key>",
    ):
        assert tool_format_of(template) is None


@pytest.fixture
def saying(monkeypatch):
    """The model says a text, token by token, as far as its constraint lets it. Not for greedy requests, whose
    tokens the engine takes without a sampler."""

    def say(tokens):
        left = list(tokens)
        choose = Sampler.choose

        def scripted(self, logits, allowed=None):
            if left:
                wanted = left.pop(0)
                logits = logits.index_fill(0, torch.tensor([wanted]), 1e4)
                if allowed is not None and not allowed[wanted]:
                    left.clear()
            return choose(self, logits, allowed)

        monkeypatch.setattr(Sampler, "choose", scripted)

    return say


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
@pytest.mark.parametrize("strict", [True, False])
def test_strict_is_kept_where_the_model_may_choose_to_call(served, loaded, saying, path, strict):
    wrong = written(FORMATS[0], ("weather", {"city": "Bonn"}))
    saying([*loaded[1].encode("Well. " + wrong), loaded[1].eos_token_id])
    function = {"name": "weather", "parameters": CITY, "strict": strict}
    if path == CHAT:
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 80}
        body |= {"tools": [{"type": "function", "function": function}]}
    else:
        body = {"input": "x", "max_output_tokens": 80, "tools": [{"type": "function", **function}]}
    answer = served.post(path, **body, temperature=0.1).json()
    if path == CHAT:
        call = answer["choices"][0]["message"]["tool_calls"][0]["function"]
    else:
        call = answer["output"][-1]
    assert call["name"] == "weather"
    assert json.loads(call["arguments"])["city"] in (("Oslo", "Rome") if strict else ("Bonn",))


@pytest.mark.parametrize("stream", [False, True])
def test_a_special_token_that_begins_a_call_is_read(make_engine, loaded, saying, monkeypatch, stream):
    mistral = ToolFormat("mistral", "<pad>", "", "arguments", True, ("<pad>",))
    monkeypatch.setattr(tools, "FORMATS", (mistral,))
    call = loaded[1].encode('[{"name": "weather", "arguments": {"city": "Oslo"}}]')
    tool = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
    body = {"messages": [{"role": "user", "content": "x"}], "temperature": 0.1, "max_tokens": 60}
    template = "{{ tools }}{# <pad> #}{{ messages }}"
    with make_engine() as engine, serving(engine, chat_template=template) as served:
        for choice in ("auto", "required"):
            said = [*loaded[1].encode("Well. "), PAD, *call] if choice == "auto" else [PAD, *call]
            saying([*said, loaded[1].eos_token_id])
            answer = served.post(CHAT, **body, tools=[tool], tool_choice=choice, stream=stream)
            if stream:
                lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
                deltas = [json.loads(line)["choices"][0]["delta"] for line in lines]
                content = "".join(delta.get("content") or "" for delta in deltas)
                (found,) = [call for delta in deltas for call in delta.get("tool_calls", [])]
            else:
                message = answer.json()["choices"][0]["message"]
                content, (found,) = message["content"] or "", message["tool_calls"]
            assert found["function"]["name"] == "weather" and "<pad>" not in content
            assert content.strip() == ("Well." if choice == "auto" else "")
            monkeypatch.undo()
            monkeypatch.setattr(tools, "FORMATS", (mistral,))
        saying([*loaded[1].encode("Well"), PAD, loaded[1].eos_token_id])
        plain = served.post(CHAT, **body).json()
        assert plain["choices"][0]["message"]["content"] == "Well", "without tools it is no text"
