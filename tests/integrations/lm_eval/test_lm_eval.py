"""The model "hf-tqai" through lm-eval's own registry and evaluator, on the embedded model."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

import tqai.integrations.lm_eval
from tqai import demo
from tqai.demo.retrieval import document, make_prompt
from tqai.errors import ConfigError, UnsupportedError
from tqai.integrations.lm_eval import TqaiLM

TEXT = document()[3000:5200]
RUN_WITH_PATHS = """
import json, runpy, sys
sys.path[:] = json.loads(sys.argv.pop(1))
runpy.run_module("tqai.integrations.lm_eval", run_name="__main__", alter_sys=True)
"""


def write_task(folder, lines):
    """A task "tqai_codes" of multiple choice."""
    (folder / "codes.jsonl").write_text("\n".join(json.dumps(line) for line in lines), "utf-8")
    (folder / "codes.yaml").write_text(
        f"""
task: tqai_codes
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder / "codes.jsonl"}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
""",
        "utf-8",
    )


def request(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


@pytest.fixture(scope="module")
def loaded():
    model, tokenizer = demo.load()
    # Repeated runs must meet the same weights; nothing here changes them.
    return model, tokenizer


@pytest.fixture(scope="module")
def exact(loaded):
    return TqaiLM(loaded[0], tokenizer=loaded[1], cache="dynamic")


@pytest.fixture(scope="module")
def coarse(loaded):
    return TqaiLM(loaded[0], tokenizer=loaded[1], cache="K3/V2", chunk_tokens=16, seed="1" and 1)


def test_the_registry_knows_it():
    assert get_model("hf-tqai") is TqaiLM is tqai.integrations.lm_eval.TqaiLM


def test_loglikelihood_of_an_exact_cache_is_that_of_one_pass(loaded, exact):
    model, tokenizer = loaded
    pairs = [(TEXT, " the following example"), (TEXT, " zebra"), ("", "The tutorial")]
    got = exact.loglikelihood([request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    for (context, following), (score, greedy) in zip(pairs, got, strict=True):
        whole = tokenizer.encode(context + following) if context else [0, *tokenizer.encode(following)]
        start = len(tokenizer.encode(context)) if context else 1
        with torch.inference_mode():
            logs = torch.log_softmax(model(torch.tensor([whole])).logits[0, start - 1 : -1].double(), -1)
        targets = torch.tensor(whole[start:])
        assert score == pytest.approx(float(logs.gather(1, targets[:, None]).sum()), rel=1e-4)
        assert greedy == bool((logs.argmax(-1) == targets).all())


def test_a_compressed_cache_is_read(exact, coarse):
    requests = [request("loglikelihood", TEXT, TEXT[:400])]
    expected, got = (lm.loglikelihood(requests, disable_tqdm=True)[0][0] for lm in (exact, coarse))
    assert 1e-3 * abs(expected) < abs(got - expected) < 0.5 * abs(expected)


def test_rolling_scores_every_token_once(loaded, exact):
    model, tokenizer = loaded
    text = TEXT[:900]
    short = TqaiLM(model, tokenizer=tokenizer, cache="dynamic", max_length=64, chunk_tokens=7)
    ids = tokenizer.encode(text)
    with torch.inference_mode():
        logits = model(torch.tensor([[tokenizer.bos_token_id, *ids]])).logits[0, :-1].double()
    expected = float(torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None]).sum())
    requests = [request("loglikelihood_rolling", text)]
    assert exact.loglikelihood_rolling(requests)[0] == pytest.approx(expected, rel=1e-4)
    windowed = short.loglikelihood_rolling(requests)[0]
    assert expected * 1.6 < windowed < expected * 1.001


def test_generation_finds_the_code_and_stops(loaded, coarse):
    prompt = make_prompt(loaded[1], 600, 3)
    options = {"until": [".", "\n\n"], "max_gen_toks": 24, "do_sample": False}
    (said,) = coarse.generate_until([request("generate_until", prompt.prompt(), options)])
    assert said.strip() == prompt.answers[0]
    with pytest.raises(UnsupportedError, match="do_sample"):
        coarse.generate_until([request("generate_until", "a", {"do_sample": True, "temperature": 0.7})])


def test_long_contexts_lose_their_beginning(loaded):
    model, tokenizer = loaded
    lm = TqaiLM(model, tokenizer=tokenizer, cache="dynamic", max_length=32)
    cut = tokenizer.decode(tokenizer.encode(TEXT)[-30:])
    long, short = (
        lm.loglikelihood([request("loglikelihood", c, " end")], disable_tqdm=True) for c in (TEXT, cut)
    )
    assert long[0][0] == pytest.approx(short[0][0], abs=1.0)
    with pytest.raises(UnsupportedError, match="32 positions"):
        lm.loglikelihood([request("loglikelihood", "a", TEXT[:400])], disable_tqdm=True)


def test_settings_are_those_of_the_cache(loaded):
    model, tokenizer = loaded
    lm = TqaiLM(model, tokenizer=tokenizer, cache="K3/V3", codec="trellis", residual_window=64, sink_tokens=4)
    settings = lm.make_cache().settings
    assert (settings.bits_k, settings.codec, settings.residual_window) == (3, "trellis", 64)
    for bad in ({"nonsense": 1}, {"cache": "dynamic", "seed": 1}, {"chunk_tokens": 0}):
        with pytest.raises(ConfigError):
            TqaiLM(model, tokenizer=tokenizer, **bad)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_device_that_lm_eval_takes_for_granted_may_be_missing(caplog):
    with caplog.at_level("WARNING", logger="tqai"):
        lm = TqaiLM(str(demo.model_path()), cache="K4/V4", device="cuda:0")
    assert lm.device.type == "cpu" and "device=cuda:0" in caplog.text


@pytest.mark.filterwarnings("default")
def test_the_command_line_of_lm_eval_runs_a_local_task(tmp_path):
    write_task(tmp_path, [{"question": "Two and two are", "choices": ["four", "blue"], "answer": 0}])
    arguments = f"pretrained={demo.model_path()},cache=K3/V3,codec=trellis,residual_window=128"
    command = [sys.executable, "-c", RUN_WITH_PATHS, json.dumps(sys.path), "--model", "hf-tqai"]
    done = subprocess.run(
        [*command, "--tasks", "tqai_codes", "--include_path", str(tmp_path), "--model_args", arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "tqai_codes" in done.stdout and "hf-tqai" in done.stdout


def test_lm_eval_runs_a_local_task(tmp_path):
    lines = [
        {
            "question": make_prompt(demo.load()[1], 300, seed).prompt(),
            "choices": ["000000", "right"],
            "answer": 1,
        }
        for seed in range(3)
    ]
    for seed, line in enumerate(lines):
        line["choices"][1] = make_prompt(demo.load()[1], 300, seed).answers[0]
    write_task(tmp_path, lines)
    result = simple_evaluate(
        model="hf-tqai",
        model_args=f"pretrained={demo.model_path()},cache=K4/V3,dtype=float32,device=cpu,sink_tokens=4",
        tasks=["tqai_codes"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    assert result["results"]["tqai_codes"]["acc,none"] == 1.0
