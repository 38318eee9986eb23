"""Quality and speed of caches, measured with the cache in the loop. Needs torch and transformers.

Quality of three caches side by side:

    makers = [cache_maker(name, model) for name in ("dynamic", "quanto-4", "K4/V2")]
    reports = evaluate_quality(model, documents, makers, prefill_tokens=512)
"""

from __future__ import annotations

from tqai.evaluation.attention_error import AttentionErrors, attention_errors
from tqai.evaluation.caches import CacheMaker, cache_maker, known_caches
from tqai.evaluation.chunked import CacheNeverReadWarning, chunked_logits, history_read_back
from tqai.evaluation.greedy import first_divergence, greedy_decode, greedy_divergence
from tqai.evaluation.held import bits_per_value, held_bytes, values_per_token
from tqai.evaluation.intervals import Interval, bootstrap, wilson
from tqai.evaluation.needles import KINDS, NeedleCell, evaluate_needles, lookup_tasks, make_needles
from tqai.evaluation.plot import PlotPoint, plot_kl_against_bits
from tqai.evaluation.prefill import prefill_caches
from tqai.evaluation.quality import QualityReport, evaluate_quality, split_documents
from tqai.evaluation.retrieval import RetrievalReport, RetrievalTask, evaluate_retrieval, make_tasks
from tqai.evaluation.scores import QualitySummary, TokenScores, score_logits, summarize
from tqai.evaluation.seeds import SEEDS, combine_seeds, makers_of_seeds
from tqai.evaluation.sizes import CacheSize, size_at
from tqai.evaluation.specs import maker_from_spec, parse_spec
from tqai.evaluation.speed import SpeedReport, measure_speed

__all__ = [
    "KINDS",
    "SEEDS",
    "AttentionErrors",
    "CacheMaker",
    "CacheNeverReadWarning",
    "CacheSize",
    "Interval",
    "NeedleCell",
    "PlotPoint",
    "QualityReport",
    "QualitySummary",
    "RetrievalReport",
    "RetrievalTask",
    "SpeedReport",
    "TokenScores",
    "attention_errors",
    "bits_per_value",
    "bootstrap",
    "cache_maker",
    "chunked_logits",
    "combine_seeds",
    "evaluate_needles",
    "evaluate_quality",
    "evaluate_retrieval",
    "first_divergence",
    "greedy_decode",
    "greedy_divergence",
    "held_bytes",
    "history_read_back",
    "known_caches",
    "lookup_tasks",
    "make_needles",
    "make_tasks",
    "maker_from_spec",
    "makers_of_seeds",
    "measure_speed",
    "parse_spec",
    "plot_kl_against_bits",
    "prefill_caches",
    "score_logits",
    "size_at",
    "split_documents",
    "summarize",
    "values_per_token",
    "wilson",
]
