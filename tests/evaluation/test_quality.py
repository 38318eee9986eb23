"""The measure itself: zero for a lossless cache, large for one that forgets, ordered for quanto."""

import numpy as np
import pytest
import torch

from tqai.errors import InputError
from tqai.evaluation import (
    CacheNeverReadWarning,
    cache_maker,
    chunked_logits,
    evaluate_quality,
    score_logits,
    split_documents,
)


@pytest.fixture(scope="module")
def documents(text):
    return [text[:150], text[40:193]]


def test_dynamic_cache_against_itself_has_no_kl(model, documents):
    report = evaluate_quality(model, documents, [cache_maker("dynamic", model)], 64)["dynamic"]
    assert report.summary.kl_mean.value < 1e-12
    assert report.summary.kl_p99.value < 1e-12
    assert report.summary.top1_agreement.value == 1.0
    assert report.bits_per_value == 32.0
    assert report.document_tokens == (150, 153)
    assert report.summary.tokens == 150 + 153 - 2 * 64
    assert report.history_read_back == pytest.approx(0.87, abs=0.02)


def test_a_cache_that_forgets_is_found_out(model, documents, forgetful):
    report = evaluate_quality(model, documents, [forgetful], 64)["forgetful"]
    assert report.summary.kl_mean.low > 0.3
    assert report.summary.top1_agreement.value < 0.8


def test_one_forward_pass_does_not_find_it_out(model, documents, forgetful):
    with pytest.warns(CacheNeverReadWarning):
        report = evaluate_quality(model, documents, [forgetful], 0, 1000)["forgetful"]
    assert report.summary.kl_mean.value < 1e-9


def test_side_by_side_equals_one_at_a_time(model, documents, quanto):
    makers = [cache_maker(name, model) for name in ("quanto-4", "dynamic", "quanto-2")]
    reports = evaluate_quality(model, documents, makers, 64)
    assert list(reports) == ["quanto-4", "dynamic", "quanto-2"]
    reference = chunked_logits(model, documents[1], makers[1], 64)
    got = chunked_logits(model, documents[1], makers[0], 64)
    alone = score_logits(reference, got, documents[1][65:])
    np.testing.assert_allclose(reports["quanto-4"].documents[1].kl, alone.kl, rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(reports["quanto-4"].documents[1].nll, alone.nll, rtol=1e-5)
    kl = {name: report.summary.kl_mean.value for name, report in reports.items()}
    assert 1e-5 < kl["quanto-4"] < kl["quanto-2"] / 4


def test_perplexity_is_that_of_the_scored_tokens(model, documents):
    report = evaluate_quality(model, documents, [cache_maker("dynamic", model)], 64)["dynamic"]
    losses = []
    for document in documents:
        with torch.inference_mode():
            logits = model(document[None]).logits[0, 64:-1]
        losses.append(torch.nn.functional.cross_entropy(logits, document[65:], reduction="none"))
    expected = torch.cat(losses).mean().exp().item()
    assert report.summary.perplexity.value == pytest.approx(expected, rel=1e-5)


def test_report_is_fit_for_json(model, documents):
    import json

    report = evaluate_quality(model, documents, [cache_maker("dynamic", model)], 64)["dynamic"]
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["name"] == "dynamic" and plain["documents"] == 2
    assert set(plain["kl_mean"]) == {"value", "low", "high"}


def test_progress_is_told(model, documents):
    seen = []
    evaluate_quality(model, documents, [cache_maker("dynamic", model)], 64, on_document=seen.append)
    assert seen == [1, 2]


def test_bad_requests_are_refused(model, documents):
    maker = cache_maker("dynamic", model)
    with pytest.raises(InputError, match="same name"):
        evaluate_quality(model, documents, [maker, maker], 64)
    with pytest.raises(InputError, match="no documents"):
        evaluate_quality(model, [], [maker], 64)
    with pytest.raises(InputError, match=r"prefill_tokens \+ 2"):
        evaluate_quality(model, documents, [maker], 149)


def test_documents_are_spread_and_do_not_overlap():
    parts = split_documents(torch.arange(103), 10, 5)
    assert [int(part[0]) for part in parts] == [0, 20, 40, 60, 80]
    assert all(part.tolist() == list(range(int(part[0]), int(part[0]) + 10)) for part in parts)
    with pytest.raises(InputError, match="too short"):
        split_documents(torch.arange(103), 21, 5)
