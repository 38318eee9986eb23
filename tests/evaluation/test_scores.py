"""KL, likelihood and agreement against numbers worked out by hand, and their intervals."""

import math

import numpy as np
import pytest
import torch

from tqai.errors import InputError
from tqai.evaluation import Interval, TokenScores, bootstrap, score_logits, summarize, wilson


def logits_of(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def test_scores_by_hand():
    reference = logits_of([0.5, 0.25, 0.25], [0.1, 0.8, 0.1])
    got = logits_of([0.25, 0.5, 0.25], [0.1, 0.8, 0.1])
    scores = score_logits(reference, got, torch.tensor([1]))
    expected = 0.5 * math.log(0.5 / 0.25) + 0.25 * math.log(0.25 / 0.5)
    np.testing.assert_allclose(scores.kl, [expected, 0.0], atol=1e-15)
    np.testing.assert_allclose(scores.nll, [-math.log(0.5)])
    np.testing.assert_array_equal(scores.agrees, [0.0, 1.0])


def test_kl_is_taken_from_the_reference_not_towards_it():
    reference, got = logits_of([0.9, 0.1]), logits_of([0.5, 0.5])
    kl = score_logits(reference, got, torch.tensor([0])).kl[0]
    assert kl == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2))
    assert kl != pytest.approx(-0.5 * math.log(1.8) - 0.5 * math.log(0.2), abs=0.1)


def test_small_differences_are_not_lost_in_rounding():
    reference = torch.zeros(1, 50_000)
    got = reference.clone()
    got[0, 0] = 1e-3
    kl = score_logits(reference, got, torch.tensor([0])).kl[0]
    p = math.exp(1e-3) / (50_000 - 1 + math.exp(1e-3))
    n = 50_000
    assert kl == pytest.approx(
        -math.log(n) - (math.log(p) / n + (n - 1) / n * math.log((1 - p) / (n - 1))), 1e-4
    )


def test_impossible_tokens_contribute_nothing():
    reference = torch.tensor([[0.0, 1.0, -math.inf]])
    scores = score_logits(reference, reference.clone(), torch.tensor([1]))
    assert scores.kl[0] == 0.0


@pytest.mark.parametrize("place", ["reference", "logits"])
def test_nan_is_refused(place):
    good, bad = torch.zeros(2, 3), torch.zeros(2, 3)
    bad[1, 2] = math.nan
    pair = (bad, good) if place == "reference" else (good, bad)
    with pytest.raises(InputError, match="NaN"):
        score_logits(*pair, torch.tensor([0, 0]))


@pytest.mark.parametrize(("shape", "targets"), [((2, 4), 2), ((3, 3), 2), ((2, 3), 3), ((2, 3), 0)])
def test_shapes_that_do_not_fit_are_refused(shape, targets):
    with pytest.raises(InputError, match="wanted"):
        score_logits(torch.zeros(2, 3), torch.zeros(shape), torch.zeros(targets, dtype=torch.long))


def test_joined_chunks_keep_their_order():
    parts = [TokenScores(np.full(n, n), np.full(n, n + 0.5), np.ones(n)) for n in (2, 1)]
    joined = TokenScores.joined(parts)
    np.testing.assert_array_equal(joined.nll, [2, 2, 1])
    np.testing.assert_array_equal(joined.kl, [2.5, 2.5, 1.5])


def test_summary_by_hand():
    documents = [
        TokenScores(np.log([2.0, 4.0]), np.array([0.0, 1.0]), np.array([1.0, 1.0])),
        TokenScores(np.log([8.0]), np.array([5.0]), np.array([0.0])),
    ]
    summary = summarize(documents, resamples=200)
    assert (summary.documents, summary.tokens) == (2, 3)
    assert summary.perplexity.value == pytest.approx(4.0)
    assert summary.kl_mean.value == pytest.approx(2.0)
    assert summary.kl_median.value == pytest.approx(1.0)
    assert summary.kl_p99.value == pytest.approx(4.92)
    assert summary.top1_agreement.value == pytest.approx(2 / 3)
    # Drawn twice with replacement: only one, only the other, or both.
    assert (summary.kl_mean.low, summary.kl_mean.high) == (pytest.approx(0.5), pytest.approx(5.0))
    plain = summary.to_dict()
    assert plain["kl_mean"] == {"value": pytest.approx(2.0), "low": 0.5, "high": 5.0}


def test_bootstrap_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(7)
    hits = 0
    for trial in range(200):
        # Tokens of one document share an offset: treating them as independent would cover about 40%.
        documents = [rng.normal(3.0 + offset, 0.3, size=20) for offset in rng.normal(0, 1, size=12)]
        interval = bootstrap(documents, np.mean, resamples=200, seed=trial)
        hits += interval.low <= 3.0 <= interval.high
    assert 0.86 <= hits / 200 <= 0.98


def test_bootstrap_repeats_itself_and_depends_on_the_seed():
    documents = [np.arange(n, dtype=float) for n in (3, 5, 9, 2)]
    first = bootstrap(documents, np.mean, 50, seed=1)
    assert first == bootstrap(documents, np.mean, 50, seed=1)
    assert first != bootstrap(documents, np.mean, 50, seed=2)


def test_one_document_gives_a_point():
    assert bootstrap([np.array([1.0, 3.0])], np.mean) == Interval(2.0, 2.0, 2.0)


@pytest.mark.parametrize("documents", [[], [np.array([1.0]), np.array([])]])
def test_bootstrap_of_nothing_is_refused(documents):
    with pytest.raises(InputError, match="at least one document"):
        bootstrap(documents, np.mean)


def test_wilson_against_known_values():
    half = wilson(5, 10)
    assert (half.value, half.low, half.high) == pytest.approx((0.5, 0.2366, 0.7634), abs=1e-4)
    every = wilson(50, 50)
    assert (every.value, every.low, every.high) == pytest.approx((1.0, 0.9286, 1.0), abs=1e-4)
    assert wilson(0, 50).low == 0.0


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_of_nonsense_is_refused(successes, trials):
    with pytest.raises(InputError):
        wilson(successes, trials)
