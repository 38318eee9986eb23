"""`tqai convert`, and `--tqai-config` that reads what it wrote."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tqai

PROMPT = "In the following examples"
FAST = ("--max-tokens", "8", "--json")


@pytest.fixture(scope="module")
def converted(tiny_model, tmp_path_factory):
    from tqai.cli.app import main

    folder = tmp_path_factory.mktemp("converted") / "model"
    arguments = ["convert", "-m", tiny_model, "-o", str(folder), "--bits-k", "3", "--seed", "42"]
    assert main(arguments) == 0
    return str(folder)


def test_the_file_holds_what_was_asked_for(converted, tiny_model):
    content = json.loads((Path(converted) / "tqai_config.json").read_text("utf-8"))
    assert (content["bits_k"], content["bits_v"], content["seed"]) == (3, 2, 42)
    assert content["tqai_version"] == tqai.__version__
    assert content["model"] == tiny_model
    assert content["settings"]["rotation_v"] == "identity"


def test_it_runs_like_the_original(tqai_command, converted, tiny_model, tmp_path):
    file = tmp_path / "long.txt"
    file.write_text("The secret code for Belmor Tazin is 482913. " * 20, "utf-8")
    arguments = ("run", PROMPT, "--file", str(file), *FAST)
    result = tqai_command(*arguments, "--tqai-config", converted)
    assert result.status == 0, result.err
    assert result.json["cache"]["label"] == "K3/V2"
    # the original with the same rotation, done by the cache at every step
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tqai.patch(model, bits_k=3, seed=42)
    ids = AutoTokenizer.from_pretrained(tiny_model).encode(file.read_text("utf-8") + "\n\n" + PROMPT)
    out = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert result.json["token_ids"] == out[0, len(ids) :].tolist()
    more = tqai_command(*arguments, "--tqai-config", converted, "--bits-v", "8")
    assert more.json["cache"]["label"] == "K3/V8"


def test_another_model_beside_the_folder_is_refused(tqai_command, converted, tiny_model):
    result = tqai_command("run", PROMPT, "-m", tiny_model, "--tqai-config", converted)
    assert "belongs to the model in that folder" in result.one_line()


def test_json(tqai_command, tiny_model, tmp_path):
    result = tqai_command("convert", "-m", tiny_model, "-o", str(tmp_path / "new"), "--json")
    assert result.json["settings"]["rotation_v"] == "identity"


@pytest.mark.parametrize("what", ["no folder", "other files", "bits"])
def test_wrong_use_is_one_line(tqai_command, tiny_model, tmp_path, what):
    (tmp_path / "file.txt").write_text("mine")
    output = {"no folder": "", "other files": str(tmp_path), "bits": str(tmp_path / "new")}[what]
    more = ("--bits-k", "9") if what == "bits" else ()
    result = tqai_command("convert", "-m", tiny_model, "-o", output, *more)
    assert result.status == 2
    result.one_line()
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


def test_no_settings_in_the_folder(tqai_command, tiny_model):
    result = tqai_command("run", PROMPT, "-m", tiny_model, "--tqai-config", tiny_model)
    assert result.status == 2
    assert "tqai_config.json" in result.one_line()
