"""What the study found: parts merged into one result, held against the targets, printed and drawn."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from quality_settings import Study

from tqai.config import NAMED_PRESETS
from tqai.evaluation import Interval, PlotPoint, bootstrap
from tqai.evaluation.plot import draw_points

MOST_DRAWN_BITS = 10
# At most these all-in bits -> at most this mean KL, in nats per token, on every model and copy.
TARGETS = {4.35: 0.0004, 3.35: 0.0016, 2.35: 0.010}


def merged(study: Study, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One JSON-ready result of the workers' lines."""
    runs: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = defaultdict(dict)
    copies: dict[str, dict[str, Any]] = defaultdict(dict)
    sizes: dict[str, dict[str, Any]] = defaultdict(dict)
    retrieval: dict[tuple[str, str, str], dict[str, Any]] = {}
    failed: list[dict[str, Any]] = []
    for line in parts:
        if "task" not in line:
            continue
        task, found = line["task"], line["found"]
        if "failed" in found:
            failed.append({**task, "why": found["failed"].strip().splitlines()[-1]})
            continue
        if task["kind"] == "copy":
            copies[task["model"]][task["copy"]] = found
            continue
        for spec, values in found.items():
            if "not_measured" in values:
                entry = {"cache": spec, "model": task["model"], "why": values["not_measured"]}
                if entry not in failed:
                    failed.append(entry)
            elif task["kind"] == "size":
                sizes[task["model"]][spec] = values
            elif task["kind"] == "kl":
                seeds = runs[task["model"], task["copy"], spec]
                seeds[task["seed"]] = _joined(seeds.get(task["seed"]), values)
            else:
                retrieval[task["model"], task["copy"], spec] = values
    quality: dict[str, Any] = {}
    for model in study.models:
        for copy in study.copies:
            rows = {}
            for spec in (*study.main, *study.peers, *study.others):
                seeds = runs.get((model, copy, spec))
                if not seeds or spec not in sizes[model]:
                    continue
                rows[spec] = _row(seeds, sizes[model][spec], study.resamples)
                found_again = retrieval.get((model, copy, spec))
                if found_again is not None:
                    rows[spec]["retrieval"] = found_again
            quality.setdefault(model, {})[copy] = rows
    provenance: list[dict[str, Any]] = []
    for line in parts:
        told = {key: value for key, value in line.get("provenance", {}).items() if key != "date"}
        if told and told not in provenance:
            provenance.append(told)
    return {
        "study": {key: list(v) if isinstance(v, tuple) else v for key, v in study.__dict__.items()},
        "provenance": provenance,
        "copies": copies,
        "sizes": sizes,
        "quality": quality,
        "retrieval": [
            {"model": model, "copy": copy, "cache": spec, **cells}
            for (model, copy, spec), cells in retrieval.items()
        ],
        "targets": targets(quality),
        "peers": against_peers(quality),
        "not_measured": [entry for entry in failed if not _measured_elsewhere(entry, runs, retrieval)],
    }


def _measured_elsewhere(entry: dict[str, Any], runs: dict[Any, Any], retrieval: dict[Any, Any]) -> bool:
    """Whether another run did what a task, which failed in one, was to do."""
    done = {"kl": runs, "retrieval": retrieval}.get(entry.get("kind", ""), {})
    specs = entry.get("specs", ())
    return bool(specs) and all((entry["model"], entry["copy"], spec) in done for spec in specs)


def _joined(first: dict[str, Any] | None, second: dict[str, Any]) -> dict[str, Any]:
    """Two runs of one cache with one seed as one; documents that both read count as the second has them."""
    if first is None:
        return second
    numbers = _numbers(first), _numbers(second)
    kept = [i for i, number in enumerate(numbers[0]) if number not in numbers[1]]
    if not kept:
        return second
    shares = len(kept), len(numbers[1])
    joined = {
        "documents": [*(numbers[0][i] for i in kept), *numbers[1]],
        "tokens": first["tokens"] * len(kept) // len(numbers[0]) + second["tokens"],
    }
    for name in ("kl_by_document", "nll_by_document"):
        joined[name] = [*(first[name][i] for i in kept), *second[name]]
    for name in ("kl_median", "kl_p99", "top1_agreement"):
        joined[name] = float(np.average([first[name], second[name]], weights=shares))
    return joined


def _row(seeds: dict[int, dict[str, Any]], size: dict[str, Any], resamples: int) -> dict[str, Any]:
    """Figures of one cache over its seeds; the interval is over documents, each with the seeds that it was
    read with (all, or one of its own)."""
    runs = list(seeds.values())
    numbers = [_numbers(run) for run in runs]
    by_document = {
        number: float(
            np.mean(
                [
                    run["kl_by_document"][of.index(number)]
                    for run, of in zip(runs, numbers, strict=True)
                    if number in of
                ]
            )
        )
        for number in sorted({number for of in numbers for number in of})
    }
    interval = bootstrap([np.array([kl]) for kl in by_document.values()], np.mean, resamples=resamples)
    return {
        "bits_per_value": size["bits_per_value"],
        "kl_mean": interval.to_dict(),
        "kl_by_seed": {str(seed): float(np.mean(run["kl_by_document"])) for seed, run in seeds.items()},
        "kl_median": float(np.mean([run["kl_median"] for run in runs])),
        "kl_p99": float(np.mean([run["kl_p99"] for run in runs])),
        "top1_agreement": float(np.mean([run["top1_agreement"] for run in runs])),
        "perplexity": math.exp(float(np.mean([nll for run in runs for nll in run["nll_by_document"]]))),
        "tokens": sum(run["tokens"] for run in runs),
        "kl_by_document": {str(number): kl for number, kl in by_document.items()},
        "family": size["family"],
    }


def _numbers(run: dict[str, Any]) -> list[int]:
    """Which documents a run read."""
    return run.get("documents") or list(range(len(run["kl_by_document"])))


def _common(left: dict[str, Any], right: dict[str, Any]) -> tuple[float, float]:
    """Mean KL of two caches over the documents that both read."""
    # sorted: sums in another order differ in their last digit
    numbers = sorted(left["kl_by_document"].keys() & right["kl_by_document"].keys())
    return tuple(  # type: ignore[return-value]
        float(np.mean([row["kl_by_document"][number] for number in numbers])) for row in (left, right)
    )


def found_of(row: dict[str, Any]) -> tuple[int, int] | None:
    """Correct answers and questions, all kinds together."""
    cells = row.get("retrieval")
    if not cells:
        return None
    return sum(c["correct"] for c in cells.values()), sum(c["questions"] for c in cells.values())


def targets(quality: dict[str, Any]) -> list[dict[str, Any]]:
    """For each target, model and copy the best of our caches within the bits, and whether it is enough."""
    checked = []
    for bits, limit in TARGETS.items():
        for model, copies in quality.items():
            for copy, rows in copies.items():
                ours = {
                    s: r for s, r in rows.items() if r["family"] == "tqai" and r["bits_per_value"] <= bits
                }
                if not ours:
                    continue
                spec = min(ours, key=lambda name: ours[name]["kl_mean"]["value"])
                kl = ours[spec]["kl_mean"]["value"]
                checked.append(
                    {
                        "bits": bits,
                        "limit": limit,
                        "model": model,
                        "copy": copy,
                        "cache": spec,
                        "bits_per_value": ours[spec]["bits_per_value"],
                        "kl": kl,
                        "reached": kl <= limit,
                    }
                )
    return checked


def against_peers(quality: dict[str, Any]) -> list[dict[str, Any]]:
    """For each peer, model and copy our best cache of no more bits than the peer's."""
    compared = []
    for model, copies in quality.items():
        for copy, rows in copies.items():
            for peer, theirs in rows.items():
                if theirs["family"] == "tqai":
                    continue
                ours = _within(rows, theirs["bits_per_value"])
                kls = {spec: _common(row, theirs) for spec, row in ours.items()}
                best = min(kls, key=lambda name: kls[name][0] / kls[name][1]) if kls else None
                mine, other = kls[best] if best else (None, theirs["kl_mean"]["value"])
                compared.append(
                    {
                        "model": model,
                        "copy": copy,
                        "peer": peer,
                        "peer_bits": theirs["bits_per_value"],
                        "peer_kl": other,
                        "cache": best,
                        "bits_per_value": ours[best]["bits_per_value"] if best else None,
                        "kl": mine,
                        "below": mine is not None and mine < other,
                    }
                )
    return compared


def _within(rows: dict[str, Any], bits: float) -> dict[str, Any]:
    return {
        spec: row for spec, row in rows.items() if row["family"] == "tqai" and row["bits_per_value"] <= bits
    }


def show(result: dict[str, Any]) -> None:
    """Tables on standard output."""
    for model, copies in result["quality"].items():
        for copy, rows in copies.items():
            figures = result["copies"].get(model, {}).get(copy, {})
            exact = figures.get("relative_logit_difference", float("nan"))
            print(f"\n{model}, {copy} (logits differ from the original's by {exact:.1e})")
            for spec, row in sorted(rows.items(), key=lambda item: item[1]["bits_per_value"]):
                kl, found = row["kl_mean"], found_of(row)
                print(
                    f"  {row['bits_per_value']:6.3f} bits  KL {kl['value']:.5f} [{kl['low']:.5f}, "
                    f"{kl['high']:.5f}]  p99 {row['kl_p99']:.4f}  same top {row['top1_agreement']:.4f}  "
                    f"found {'-' if found is None else f'{found[0]}/{found[1]}'}  {spec}"
                )
    for check in result["targets"]:
        mark = "reached" if check["reached"] else "MISSED"
        print(
            f"{mark}: <= {check['bits']} bits on {check['model']}, {check['copy']}: KL {check['kl']:.5f} "
            f"(limit {check['limit']}) with {check['cache']} at {check['bits_per_value']:.3f}"
        )
    above = [c for c in result["peers"] if not c["below"]]
    print(f"below every peer: {len(result['peers']) - len(above)} of {len(result['peers'])} comparisons")
    for c in above:
        print(f"  not below {c['peer']} on {c['model']}, {c['copy']}: {c['peer_kl']:.5f} against {c['kl']}")
    for entry in result["not_measured"]:
        print("not measured:", entry)


def draw(result: dict[str, Any], path: Path) -> None:
    """KL against all-in bits: one panel per model, plain above, the worst of its hard copies below."""
    import matplotlib
    from matplotlib.figure import Figure

    models = list(result["quality"])
    with matplotlib.rc_context({"svg.hashsalt": "tqai", "font.size": 9}):
        figure = Figure(figsize=(3.7 * len(models), 7.4), layout="constrained")
        panels = figure.subplots(2, len(models), sharex=True, sharey="row", squeeze=False)
        for column, model in enumerate(models):
            for line, (title, points) in enumerate(_panels(result["quality"][model])):
                draw_points(panels[line][column], points, labels=False)
                panels[line][column].set_title(f"{model}, {title}")
        panels[0][0].set_ylabel("KL, nats per token")
        panels[1][0].set_ylabel("KL, nats per token")
        for column in range(len(models)):
            panels[1][column].set_xlabel("bits per value, all-in, at 8,192 tokens")
        named = {
            label: handle
            for panel in panels.flat
            for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
        }
        panels[0][-1].legend(named.values(), named.keys(), loc="upper right")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})


def _panels(copies: dict[str, Any]) -> list[tuple[str, list[PlotPoint]]]:
    hard = [rows for copy, rows in copies.items() if copy != "plain"]
    worst = {
        spec: max((rows[spec] for rows in hard if spec in rows), key=lambda row: row["kl_mean"]["value"])
        for spec in dict.fromkeys(spec for rows in hard for spec in rows)
    }
    return [("as trained", _points(copies["plain"])), ("worst of the hard copies", _points(worst))]


def _points(rows: dict[str, Any]) -> list[PlotPoint]:
    chosen = []
    for spec, row in rows.items():
        family = row["family"]
        if row["bits_per_value"] > MOST_DRAWN_BITS:
            continue
        if family == "tqai":
            named = spec in NAMED_PRESETS
            if not named and ("window=128" not in spec or "offsets=auto" not in spec):
                continue
            family = "tqai" if named else "tqai, the same bits in all layers"
        kl = row["kl_mean"]
        chosen.append(
            PlotPoint(
                spec.partition(",")[0],
                family,
                row["bits_per_value"],
                Interval(kl["value"], kl["low"], kl["high"]),
            )
        )
    return chosen
