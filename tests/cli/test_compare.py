"""`tqai compare`."""

PROMPT = "In the following examples"


def test_short_prompt_is_the_same_on_both_sides(tqai_command, tiny_model):
    result = tqai_command("compare", PROMPT, "-m", tiny_model, "--max-tokens", "8", "--json")
    assert result.status == 0, result.err
    assert result.json["first_difference"] is None
    assert result.json["uncompressed"]["token_ids"] == result.json["compressed"]["token_ids"]


def test_long_prompt_is_compressed_and_the_difference_is_found(tqai_command, tiny_model, tmp_path):
    file = tmp_path / "long.txt"
    file.write_text("The secret code for Belmor Tazin is 482913. " * 40, "utf-8")
    arguments = ("compare", PROMPT, "-m", tiny_model, "--file", str(file), "--max-tokens", "24", "--json")
    result = tqai_command(*arguments, "--bits-k", "1", "--bits-v", "1")
    assert result.status == 0, result.err
    plain, packed = result.json["uncompressed"], result.json["compressed"]
    pairs = zip(plain["token_ids"], packed["token_ids"], strict=False)
    wanted = next((index for index, (left, right) in enumerate(pairs) if left != right), None)
    assert wanted is not None, "one bit changes nothing: is the cache compressed at all?"
    assert result.json["first_difference"] == wanted
    assert packed["cache"]["held_bytes"] < plain["cache"]["held_bytes"] / 4
    assert plain["cache"]["bits_per_value"] == 32


def test_tables_show_both_sides(tqai_command, tiny_model):
    result = tqai_command("compare", PROMPT, "-m", tiny_model, "--max-tokens", "4", "--config", "K4/V4")
    assert result.status == 0, result.err
    for words in ("uncompressed", "K4/V4", "bytes held", "bits per value", "The same"):
        assert words in result.out


def test_model_is_left_unpatched(tqai_command, tiny_model, monkeypatch):
    import tqai.cli.compare

    loaded = []
    original = tqai.cli.compare.load_model

    def remember(*arguments):
        loaded.append(original(*arguments))
        return loaded[-1]

    monkeypatch.setattr(tqai.cli.compare, "load_model", remember)
    assert tqai_command("compare", PROMPT, "-m", tiny_model, "--max-tokens", "2", "--json").status == 0
    model = loaded[0].model
    assert model.config._attn_implementation == "sdpa"
    assert "forward" not in vars(model) and "generate" not in vars(model)
