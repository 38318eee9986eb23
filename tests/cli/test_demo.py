"""`tqai demo`, here with a tiny random model, which answers nothing right."""

import pytest

FAST = ("--tokens", "700", "--facts", "2", "--max-tokens", "4", "--bits-k", "4")


def test_json_has_both_sides_and_every_question(tqai_command, tiny_model):
    result = tqai_command("demo", "-m", tiny_model, *FAST, "--json")
    assert result.status == 0, result.err
    assert 550 < result.json["document_tokens"] <= 700
    assert len(result.json["questions"]) == 2
    for question in result.json["questions"]:
        assert len(question["code"]) == 6
        assert not question["uncompressed"]["right"]
    plain, packed = result.json["uncompressed"], result.json["compressed"]
    assert plain["cache"]["tokens"] == packed["cache"]["tokens"] == result.json["document_tokens"]
    assert plain["cache"]["bits_per_value"] == 32
    # 2 * (4 + 16 / 64) and 2 * (2 + 16 / 64) bits per pair, and up to 63 of 700 tokens exact
    assert 3.25 < packed["cache"]["bits_per_value"] < 8
    assert packed["cache"]["details"]["values"] * 4 == plain["cache"]["held_bytes"]
    assert packed["tokens_per_second"] > 0


def test_figures_are_of_the_document_and_not_of_the_answers(tqai_command, tiny_model):
    """Each question is asked on a copy: more questions leave the cache as it was."""
    few = tqai_command("demo", "-m", tiny_model, *FAST, "--json").json
    again = tqai_command("demo", "-m", tiny_model, *FAST, "--max-tokens", "9", "--json").json
    assert again["compressed"]["cache"] == few["compressed"]["cache"]
    starts = zip(few["questions"], again["questions"], strict=True)
    assert all(b["uncompressed"]["text"].startswith(a["uncompressed"]["text"][:2]) for a, b in starts)


def test_tables(tqai_command, tiny_model):
    result = tqai_command("demo", "-m", tiny_model, *FAST[:-2], "--config", "K4/V4")
    assert result.status == 0, result.err
    for words in ("uncompressed", "K4/V4", "bytes held", "right answers", "0 of 2", "decoded tokens"):
        assert words in result.out or "first token that differs" in result.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tokens", "20"), "--tokens 20 --facts 5: the facts and a question take"),
        (("--tokens", "2040"), "has only 2048 positions"),
        (("--facts", "0"), "--facts 0: allowed are"),
        (("--max-tokens", "0"), "--max-tokens 0: allowed are"),
    ],
)
def test_wrong_use_is_one_line(tqai_command, tiny_model, arguments, words):
    result = tqai_command("demo", "-m", tiny_model, *arguments)
    assert words in result.one_line()
    assert result.status == 2


def test_common_length():
    from tqai.cli.demo import _common_length

    assert _common_length([[1, 2, 3], [1, 2, 4], [1, 2]]) == 2
    assert _common_length([[1, 2], [1, 2]]) == 2
    assert _common_length([[1], [2]]) == 0


def test_missing_embedded_model_is_one_line(tqai_command, monkeypatch, tmp_path):
    import tqai.demo

    monkeypatch.setattr(tqai.demo, "model_path", lambda: tmp_path)
    result = tqai_command("demo")
    assert "the embedded model is missing" in result.one_line()
    assert result.status == 1


def test_embedded_model_answers_with_either_cache(tqai_command):
    """The command as a newcomer runs it, on a shorter document."""
    result = tqai_command("demo", "--tokens", "1000", "--facts", "3", "--max-tokens", "8", "--json")
    assert result.status == 0, result.err
    assert result.json["model"] == "embedded model"
    assert result.json["uncompressed"]["right"] == 3
    assert result.json["compressed"]["right"] == 3
    # 160 to 223 of the 1,000 tokens may be exact, in float32
    assert result.json["compressed"]["cache"]["bits_per_value"] < 3.4 + 0.223 * 32
    for question in result.json["questions"]:
        assert question["compressed"]["text"].strip().startswith(question["code"])
