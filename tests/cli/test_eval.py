"""`tqai eval` end to end on a tiny random model."""

import json

import pytest

from tqai.cli import eval as eval_command
from tqai.evaluation import KINDS

SMALL = ("--documents", "2", "--document-tokens", "224", "--prefill", "128", "--seeds", "2")


@pytest.fixture(scope="module")
def result(tiny_model, tmp_path_factory):
    from tqai.cli.app import main

    folder = tmp_path_factory.mktemp("eval")
    (folder / "text.txt").write_text("All in the golden afternoon full leisurely we glide. " * 60, "utf-8")
    out = folder / "out.json"
    import contextlib

    with out.open("w", encoding="utf-8") as stream, contextlib.redirect_stdout(stream):
        status = main(
            [
                *("eval", "--model", tiny_model, "--text", str(folder / "text.txt"), "--json", *SMALL),
                *("--cache", "K2/V2", "--cache", "K4/V4,window=32,seed=5", "--cache", "dynamic"),
                *("--greedy", "6", "--layers", "--bits-at", "512"),
                *("--retrieval", "800", "--kind", "single", "--depth", "0.5", "--questions", "1"),
            ]
        )
    assert status == 0
    return json.loads(out.read_text("utf-8"))


def test_every_cache_has_every_figure(result):
    assert list(result["caches"]) == ["K2/V2", "K4/V4,window=32,seed=5", "dynamic"]
    coarse, fine, exact = result["caches"].values()
    assert coarse["kl_mean"]["value"] > 4 * fine["kl_mean"]["value"] > 0
    assert exact["kl_mean"]["value"] < 1e-9 and exact["perplexity"]["value"] > 1
    assert set(coarse["kl_by_seed"]) == {"0", "1"} and fine["kl_by_seed"] == {}
    assert coarse["kl_mean"]["value"] == pytest.approx(sum(coarse["kl_by_seed"].values()) / 2)
    assert exact["bits_per_value_at"] == {"tokens": 512, "mean": 32.0, "most": 32.0}
    assert 2.25 < coarse["bits_per_value_at"]["mean"] < 8
    assert exact["first_divergence"] == [None, None] and len(coarse["first_divergence"]) == 2
    assert exact["retrieval"][0]["questions"] == 1
    assert [cell["depth"] for cell in coarse["retrieval"]] == [0.5]
    local, accumulated = coarse["attention_error"]["local"], coarse["attention_error"]["accumulated"]
    assert len(local) == len(accumulated) == 2
    assert local[0] == pytest.approx(accumulated[0], rel=1e-3) and 0.05 < local[1] < accumulated[1]
    assert max(exact["attention_error"]["accumulated"]) < 1e-6


def test_tables_plot_and_the_warning_of_one_pass(tiny_model, tqai_command, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "kl.svg"
    done = tqai_command(
        *("eval", "--model", tiny_model, "--documents", "1", "--document-tokens", "160"),
        *("--prefill", "0", "--chunk", "160", "--seeds", "1", "--plot", str(plot), "--cache", "K4/V2"),
    )
    assert done.status == 0
    assert "K4/V2" in done.out and "read 0% of their history" in " ".join(done.out.split())
    assert "says little about the cache" in done.err
    assert "<!-- K4/V2" in plot.read_text("utf-8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--backend", "nonsense"), "backend='nonsense'"),  # with the default cache, a named preset
        (("--backend", "nonsense", "--cache", "K4/V2"), "backend='nonsense'"),
        (("--cache", "K4/V2,nonsense=1"), "nonsense"),
        (("--cache", "K9/V9"), "bits_k=9"),
        (("--cache", "zip"), "allowed are dynamic"),
        (("--cache", "K4/V2,window"), "wanted name=value"),
        (("--documents", "1000"), "too short"),
        (("--seeds", "0"), "--seeds 0"),
        (("--text", "/no/such/text"), "--text /no/such/text: No such file"),
        (("--document-tokens", "100"), "--document-tokens 100 --prefill 512"),
        (("--prefill", "-1"), "--prefill -1"),
        (("--chunk", "0"), "--chunk 0"),
        (("--retrieval", "600", "--depth", "2"), "--depth 2.0: allowed are numbers from 0 to 1"),
        (("--retrieval", "600", "--depth", "nan"), "--depth nan"),
        (("--retrieval", "600", "--kind", "none"), "--kind none: allowed are single, multi, lookup"),
        (("--retrieval", "0"), "--retrieval 0"),
        (("--bits-at", "0"), "--bits-at 0"),
    ],
)
def test_wrong_requests_are_refused_in_one_line(tiny_model, tqai_command, options, message):
    done = tqai_command("eval", "--model", tiny_model, "--document-tokens", "700", *options)
    assert done.status == (1 if "No such file" in message else 2)
    assert message in done.one_line()


def test_kinds_are_those_of_the_measure():
    assert eval_command.KINDS == KINDS


def test_one_document_has_no_interval(tiny_model, tqai_command):
    sizes = ("--document-tokens", "160", "--prefill", "100", "--seeds", "1", "--cache", "K4/V2")
    row = {}
    for documents in ("1", "2"):
        done = tqai_command("eval", "--model", tiny_model, *sizes, "--documents", documents)
        row[documents] = next(line for line in done.out.splitlines() if "K4/V2" in line).split("│")
    assert row["1"][4].strip() == "-"
    low, high = map(float, row["2"][4].split("-"))
    assert 0 < low < high
