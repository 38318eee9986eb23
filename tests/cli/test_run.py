"""`tqai run`."""

import shutil

import pytest

PROMPT = "In the following examples"
FAST = ("--max-tokens", "8")


def test_json_is_one_object_with_text_and_cache(tqai_command, tiny_model):
    result = tqai_command("run", PROMPT, "-m", tiny_model, *FAST, "--config", "K4/V2", "--json")
    assert result.status == 0, result.err
    assert result.json["model"] == tiny_model
    assert 1 <= result.json["new_tokens"] <= 8
    assert len(result.json["token_ids"]) == result.json["new_tokens"]
    assert result.json["cache"]["label"] == "K4/V2"
    assert result.json["cache"]["details"]["total_bytes"] == result.json["cache"]["held_bytes"]


def test_json_and_stream_give_the_same_text(tqai_command, tiny_model):
    arguments = ("run", PROMPT, "-m", tiny_model, *FAST)
    streamed = tqai_command(*arguments)
    assert streamed.status == 0, streamed.err
    assert streamed.out.rstrip("\n") == tqai_command(*arguments, "--json").json["text"].rstrip("\n")
    assert "bits per value" in streamed.err


def test_short_prompt_is_as_without_compression(tqai_command, tiny_model):
    """Fewer than 64 tokens stay exact, so nothing may change."""
    arguments = ("run", PROMPT, "-m", tiny_model, *FAST, "--json")
    packed, plain = tqai_command(*arguments), tqai_command(*arguments, "--no-tqai")
    assert packed.json["token_ids"] == plain.json["token_ids"]
    assert plain.json["cache"]["label"] == "uncompressed"
    assert plain.json["cache"]["bits_per_value"] == 32


def test_long_file_is_read_and_compressed(tqai_command, tiny_model, tmp_path):
    file = tmp_path / "long.txt"
    file.write_text("The secret code for Belmor Tazin is 482913. " * 40, "utf-8")
    arguments = ("run", PROMPT, "-m", tiny_model, *FAST, "--json", "--file", str(file))
    result = tqai_command(*arguments, "--config", "K3/V3")
    assert result.status == 0, result.err
    memory = result.json["cache"]["details"]
    assert result.json["prompt_tokens"] > 512
    assert result.json["cache"]["label"] == "K3/V3"
    assert memory["codes_bytes"] > 0
    assert result.json["cache"]["bits_per_value"] < 16
    assert memory["tokens"] >= result.json["prompt_tokens"]


def test_bits_override_the_preset(tqai_command, tiny_model):
    arguments = ("run", PROMPT, "-m", tiny_model, *FAST, "--json", "--config", "k3v2", "--bits-v", "4")
    assert tqai_command(*arguments).json["cache"]["label"] == "K3/V4"


def test_seed_fixes_sampling(tqai_command, tiny_model):
    def sample(*more):
        arguments = ("run", PROMPT, "-m", tiny_model, *FAST, "--json", "--temperature", "1.5", *more)
        return tqai_command(*arguments).json["token_ids"]

    first = sample("--seed", "1")
    assert sample("--seed", "1") == first
    assert any(sample("--seed", str(seed)) != first for seed in range(2, 6))


def test_chat_puts_the_prompt_into_the_template(tqai_command, tiny_chat_model):
    arguments = ("run", PROMPT, "-m", tiny_chat_model, *FAST, "--json")
    plain, chat = tqai_command(*arguments), tqai_command(*arguments, "--chat")
    assert chat.json["prompt_tokens"] > plain.json["prompt_tokens"]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("--bits-k", "9"), 2, "bits_k=9: allowed are whole numbers from 1 to 8"),
        (("--config", "K9/V9"), 2, "preset='K9/V9': allowed are K4/V2"),
        (("--max-tokens", "0"), 2, "--max-tokens 0"),
        (("--temperature", "-1"), 2, "--temperature -1"),
        (("--temperature", "nan"), 2, "--temperature nan"),
        (("--chat",), 2, "has no chat template"),
        (("--file", "/no/such/file.txt"), 1, "--file /no/such/file.txt: No such file"),
        (("--max-tokens", "2048"), 2, "has only 2048 positions"),
        (("--device", "cuda:99"), 2, "--device cuda:99"),
        (("--device", "nonsense"), 2, "--device nonsense"),
        (("--dtype", "int4"), 2, "--dtype int4: allowed are float32"),
        (("--backend", "nonsense"), 2, "backend='nonsense': allowed are"),
        (("--no-such-option",), 2, "--no-such-option"),
        (("--bits-k", "four"), 2, "--bits-k"),
    ],
)
def test_wrong_use_is_one_line(tqai_command, tiny_model, arguments, status, words):
    result = tqai_command("run", PROMPT, "-m", tiny_model, *arguments, "--json")
    assert words in result.one_line()
    assert result.status == status


def test_missing_folder_is_one_line(tqai_command):
    result = tqai_command("run", PROMPT, "-m", "./no-such-folder")
    assert "./no-such-folder: no such folder" in result.one_line()
    assert result.status == 1


def test_folder_without_a_model_is_one_line(tqai_command, tmp_path):
    assert "no config.json" in tqai_command("run", PROMPT, "-m", str(tmp_path)).one_line()
    (tmp_path / "config.json").write_text("{ broken", "utf-8")
    assert "config.json is no JSON" in tqai_command("run", PROMPT, "-m", str(tmp_path)).one_line()


def test_truncated_weights_are_one_line(tqai_command, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "truncated")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    result = tqai_command("run", PROMPT, "-m", str(folder))
    assert result.status == 1
    assert str(folder) in result.one_line()


def test_hub_out_of_reach_is_one_line(tqai_command, monkeypatch):
    import huggingface_hub

    def no_network(*_args, **_kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_network)
    result = tqai_command("run", PROMPT, "-m", "some-owner/some-model-that-is-not-here")
    assert "the hub cannot be reached (no route to host)" in result.one_line()
    assert result.status == 1


def test_name_that_is_no_name_is_one_line(tqai_command):
    result = tqai_command("run", PROMPT, "-m", "not a model")
    assert "neither a folder nor a hub name" in result.one_line()


def test_empty_prompt_is_refused(tqai_command, tiny_model):
    assert "the prompt is empty" in tqai_command("run", "", "-m", tiny_model).one_line()


def test_downloaded_model_needs_no_network(monkeypatch):
    import huggingface_hub

    from tqai.cli.models import _source

    def no_network(*_args, **_kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_network)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "/somewhere/config.json")
    assert _source("owner/name") == ("owner/name", True)


def test_model_that_the_hub_does_not_know(tqai_command, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    def unknown(*_args, **_kwargs):
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError, "404")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unknown)
    result = tqai_command("run", PROMPT, "-m", "owner/name-that-nobody-took")
    assert "the hub has no model of that name" in result.one_line()


def test_embedded_model_finds_the_fact_in_a_file(tqai_command, tmp_path):
    from tqai.demo.retrieval import document, fact, question

    file = tmp_path / "long.txt"
    file.write_text(document()[:1500] + "\n" + fact("Belmor Tazin", "482913") + "\n" + document()[1500:3000])
    prompt = question("Belmor Tazin")
    result = tqai_command("run", prompt, "--file", str(file), "--max-tokens", "8", "--json")
    assert result.status == 0, result.err
    assert result.json["text"].strip().startswith("482913")
    assert result.json["cache"]["details"]["codes_bytes"] > 0
