"""The embedded model: it loads offline, is small, and finds what is hidden; and the task itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tqai import demo  # noqa: E402
from tqai.demo.retrieval import CODE_DIGITS, SLACK, document, fact, random_name  # noqa: E402

MAX_WEIGHTS = 20_000_000
MODEL_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "MODEL_CARD.md",
}


@pytest.fixture(scope="module")
def loaded():
    return demo.load()


@pytest.fixture(scope="module")
def tokenizer(loaded):
    return loaded[1]


def answers(loaded, n_tokens, seeds):
    """How many prompts are answered exactly, and the wrong ones."""
    model, tokenizer = loaded
    wrong = []
    for seed in seeds:
        prompt = demo.make_prompt(tokenizer, n_tokens, seed)
        ids = tokenizer(prompt.prompt(), return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=CODE_DIGITS + 2, do_sample=False)
        text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :])
        if not demo.is_correct(text, prompt.answers[0]):
            wrong.append((seed, prompt.answers[0], text))
    return len(seeds) - len(wrong), wrong


def test_importing_the_demo_imports_no_framework():
    code = "import sys, tqai.demo; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    source = str(Path(demo.__file__).parents[2])
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {source!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "[]"


def test_model_folder_holds_these_files_and_small_weights():
    files = {p.name: p.stat().st_size for p in demo.model_path().iterdir()}
    assert set(files) == MODEL_FILES
    assert 0 < files["model.safetensors"] <= MAX_WEIGHTS


def test_model_loads_offline_with_the_announced_shape():
    """In a fresh process that may not look for the network, with warnings as errors and no log line."""
    code = (
        "import socket, tqai.demo as d\n"
        "def refuse(*a, **k): raise OSError('no network')\n"
        "socket.socket.connect = refuse\n"
        "m, t = d.load()\n"
        "c = m.config\n"
        "print(type(m).__name__, m.dtype, c.head_dim, c.num_attention_heads, c.num_key_value_heads,"
        " c.max_position_embeddings, len(t), sum(p.numel() for p in m.parameters()))\n"
    )
    source = str(Path(demo.__file__).parents[2])
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"import sys; sys.path.insert(0, {source!r})\n{code}"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "LlamaForCausalLM torch.float32 128 4 2 9216 4096 9793600"
    bars = [line for line in run.stderr.splitlines() if line.strip() and "Loading weights" not in line]
    assert bars == []


def test_weights_are_stored_in_bfloat16_and_load_in_another_dtype():
    from safetensors import safe_open

    with safe_open(demo.model_path() / "model.safetensors", framework="pt") as f:
        assert {str(f.get_slice(name).get_dtype()) for name in f.keys()} == {"BF16"}  # noqa: SIM118
    model, _ = demo.load(dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and not model.training


def test_digits_are_split_one_by_one_and_text_survives(tokenizer):
    text = fact("Belmor Tazin", "482913") + "\n\ttabs, ünïcode — and  spaces\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(" 482913")) == ["Ġ", *"482913"]


@pytest.mark.slow
def test_retrieval_at_1k_tokens(loaded):
    correct, wrong = answers(loaded, 1024, range(1000, 1020))
    assert correct >= 19, wrong


@pytest.mark.slow
def test_retrieval_at_4k_tokens(loaded):
    correct, wrong = answers(loaded, 4096, range(2000, 2004))
    assert correct == 4, wrong


def test_an_unseen_code_is_not_guessed(loaded):
    """The answer comes from the document: without the fact there is none."""
    model, tokenizer = loaded
    prompt = demo.make_prompt(tokenizer, 400, 3)
    line = fact(prompt.names[0], prompt.answers[0])
    assert line in prompt.text
    ids = tokenizer(prompt.text.replace(line, "") + prompt.questions[0], return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=CODE_DIGITS + 2, do_sample=False)
    text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :])
    assert not demo.is_correct(text, prompt.answers[0])


def test_model_predicts_its_held_out_document(loaded):
    """A loss far under the 8.3 nats of a uniform guess, on text that it never saw."""
    model, tokenizer = loaded
    ids = torch.tensor([tokenizer.encode(document()[:3000])])
    with torch.no_grad():
        assert model(ids, labels=ids).loss.item() < 3.0


@pytest.mark.parametrize("n_tokens", [256, 1024, 4096, 8192])
@pytest.mark.parametrize("n_facts", [1, 3])
def test_prompt_length(tokenizer, n_tokens, n_facts):
    for seed in range(12 if n_tokens < 4096 else 4):
        prompt = demo.make_prompt(tokenizer, n_tokens, seed, n_facts=n_facts, n_distractors=1)
        lengths = [len(tokenizer.encode(prompt.prompt(i))) for i in range(n_facts)]
        assert n_tokens - SLACK <= max(lengths) <= n_tokens


def test_prompt_holds_each_fact_once_and_distractors(tokenizer):
    prompt = demo.make_prompt(tokenizer, 600, 5, n_facts=2, n_distractors=3)
    assert len(prompt.questions) == len(prompt.answers) == len(prompt.names) == len(prompt.depths) == 2
    assert prompt.text.count("The secret code for ") == 5
    for i, (name, code) in enumerate(zip(prompt.names, prompt.answers, strict=True)):
        assert len(code) == CODE_DIGITS and code.isdecimal()
        line = fact(name, code)
        assert prompt.text.count(line + "\n") == 1 and prompt.text.count(code) == 1
        assert prompt.text.index(line) == round(prompt.depths[i] * len(prompt.text))
        assert name in prompt.questions[i] and code not in prompt.questions[i]
        assert prompt.prompt(i) == prompt.text + prompt.questions[i]


def test_prompt_is_deterministic_and_seeds_differ(tokenizer):
    first = demo.make_prompt(tokenizer, 500, 1)
    assert demo.make_prompt(tokenizer, 500, 1) == first
    others = [demo.make_prompt(tokenizer, 500, seed) for seed in range(2, 12)]
    assert len({p.answers for p in [first, *others]}) == 11
    assert len({p.text[:200] for p in [first, *others]}) == 11


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_depth_is_respected(tokenizer, depth):
    prompt = demo.make_prompt(tokenizer, 4096, 7, depth=depth)
    assert abs(prompt.depths[0] - depth) < 0.06


def test_text_between_facts_is_from_the_held_out_document(tokenizer):
    prompt = demo.make_prompt(tokenizer, 1024, 9)
    lines = [x for x in prompt.text.splitlines() if x and not x.startswith("The secret code for ")]
    twice = document() + document()
    assert sum(line in twice for line in lines) == len(lines)


def test_document_is_long_enough_and_without_the_task(tokenizer):
    assert len(tokenizer.encode(document(), verbose=False)) >= 20_000
    assert "secret code" not in document()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_tokens": 60}, "too few"),
        ({"n_tokens": 100_000}, "too short"),
        ({"n_tokens": 500, "n_facts": 0}, "n_facts"),
        ({"n_tokens": 500, "n_distractors": -1}, "n_distractors"),
        ({"n_tokens": 500, "depth": 1.5}, "depth"),
    ],
)
def test_impossible_prompts_are_refused(tokenizer, arguments, message):
    class Quiet:  # a length over the model's limit is no news here
        def encode(self, text):
            return tokenizer.encode(text, verbose=False)

    with pytest.raises(ValueError, match=message):
        demo.make_prompt(Quiet(), seed=0, **arguments)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (" 482913.", True),
        ("482913", True),
        ("\n482913\n", True),
        (" 482914.", False),
        (" 4829130", False),
        (" 48291", False),
        (" 482 913", False),
        (" is 482913", False),
        ("", False),
    ],
)
def test_is_correct(text, right):
    assert demo.is_correct(text, "482913") is right


def test_names_hardly_ever_repeat():
    import random

    rng = random.Random(0)
    assert len({random_name(rng) for _ in range(20_000)}) > 19_990


def test_config_says_what_was_trained():
    config = json.loads((demo.model_path() / "config.json").read_text())
    assert config["max_position_embeddings"] == 9216 and config["tie_word_embeddings"] is True
