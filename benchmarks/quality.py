"""Quality per bit of compressed caches on three small models and on hard copies of them.

    python benchmarks/quality.py --device cuda --workers 8      a few minutes on one large GPU
    python benchmarks/quality.py --workers 2                    hours on two cores
    python benchmarks/quality.py --quick                        a minute: one model, few caches, no result
    python benchmarks/quality.py --from-parts FOLDER            the result of parts measured before

Every scored token reads its history back from the cache (documents of 2,048 tokens, the first 512 prefilled,
then chunks of 32). All-in bits are those of a bfloat16 model's cache at 8,192 tokens, everything counted.
`pathological.py` makes the hard copies; `quality_settings.py` lists the caches; `quality_result.py` knows
the targets. Work is cut into tasks for several processes; with --seconds what does not fit is left out, and
named in the result.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from provenance import ROOT
from quality_peers import PEER_KINDS
from quality_settings import QUICK, Study

RESULT = ROOT / "benchmarks" / "results" / "quality.json"
PLOT = ROOT / "docs" / "images" / "quality.svg"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing written but --parts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", help="of tqai's caches (default: the best on a CPU, torch on a GPU)")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no task after this time")
    parser.add_argument("--parts", type=Path, help="folder for what each worker finds")
    parser.add_argument("--from-parts", type=Path, nargs="*", help="measure nothing, read these folders")
    parser.add_argument("--models", nargs="*", help="these models alone")
    parser.add_argument("--copies", nargs="*", help="these copies alone")
    parser.add_argument("--kinds", nargs="*", help="these kinds of task alone: copy, size, kl, retrieval")
    parser.add_argument("--caches", nargs="*", help="these caches alone; ours as main settings")
    parser.add_argument("--seeds", type=int, nargs="*", help="these seeds alone")
    parser.add_argument("--documents", type=int, nargs="*", help="these documents alone, counted from 0")
    parser.add_argument("--commit", help="to note where there is no git checkout")
    parser.add_argument("--output", type=Path, help=f"JSON file (default {RESULT.relative_to(ROOT)})")
    arguments = parser.parse_args()
    study = _study(arguments)
    if arguments.from_parts is not None:
        parts = [line for folder in arguments.from_parts for line in read_parts(folder)]
    else:
        parts = measure(study, arguments)
    from quality_result import draw, merged, show

    result = merged(study, parts)
    show(result)
    if not arguments.quick:
        output = arguments.output or RESULT
        output.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", "utf-8")
        if arguments.output is None:
            draw(result, PLOT)
    return 0


def _study(arguments: argparse.Namespace) -> Study:
    study = QUICK if arguments.quick else Study()
    changes: dict[str, Any] = {}
    if arguments.models:
        changes["models"] = tuple(arguments.models)
    if arguments.copies:
        changes["copies"] = tuple(arguments.copies)
    if arguments.caches:
        peers = tuple(spec for spec in arguments.caches if spec.partition("-")[0] in PEER_KINDS)
        main = tuple(spec for spec in arguments.caches if spec not in peers)
        changes |= {"main": main, "others": (), "peers": peers}
    if arguments.seeds:
        changes["seeds"] = tuple(arguments.seeds)
    if arguments.documents:
        changes["numbers"] = tuple(arguments.documents)
    return Study(**{**study.__dict__, **changes})


def measure(study: Study, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All tasks, by several processes; each line has a task, its result, and the seconds that it took."""
    from quality_tasks import all_tasks

    folder = arguments.parts or Path(os.environ.get("TMPDIR", "/tmp")) / f"tqai-quality-{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    tasks = [task for task in all_tasks(study) if not arguments.kinds or task.kind in arguments.kinds]
    following = context.Value("i", 0)
    end = time.time() + arguments.seconds
    backend = arguments.backend or (None if arguments.device == "cpu" else "torch")
    crew = [
        context.Process(
            target=_work,
            args=(index, tasks, following, study, arguments.device, backend, end, folder, arguments.commit),
        )
        for index in range(arguments.workers)
    ]
    for worker in crew:
        worker.start()
    for worker in crew:
        worker.join()
    left = len(tasks) - min(following.value, len(tasks))
    print(f"{len(tasks) - left} of {len(tasks)} tasks begun", file=sys.stderr)
    return read_parts(folder)


def _work(
    index: int,
    tasks: list[Any],
    following: Any,
    study: Study,
    device: str,
    backend: str | None,
    end: float,
    folder: Path,
    commit: str | None,
) -> None:
    import torch
    from quality_tasks import perform, warm_up

    if device == "cpu":
        from quality_cpu import show_queries

        show_queries()
    else:
        from quality_gpu import fast_trellis, quanto_without_compiler

        quanto_without_compiler()
        fast_trellis(device)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    warm_up(device)
    with (folder / f"worker-{os.getpid()}-{index}.jsonl").open("w", encoding="utf-8") as out:
        out.write(json.dumps({"provenance": _provenance(device, backend, commit)}) + "\n")
        while time.time() < end:
            with following.get_lock():
                number = following.value
                following.value += 1
            if number >= len(tasks):
                return
            task, start = tasks[number], time.time()
            try:
                found: dict[str, Any] = perform(task, study, device, backend)
            except Exception:  # a task that fails is part of the result, the others go on
                found = {"failed": traceback.format_exc(limit=-4)}
                print(task, found["failed"], file=sys.stderr, flush=True)
            line = {"task": task.__dict__, "found": found, "seconds": round(time.time() - start, 2)}
            out.write(json.dumps(line) + "\n")
            out.flush()


def _provenance(device: str, backend: str | None, commit: str | None) -> dict[str, Any]:
    import torch
    from provenance import provenance

    gpu = torch.cuda.get_device_name() if device.startswith("cuda") else None
    told = provenance()
    hqq = version("hqq") if find_spec("hqq") else None
    return {
        **told,
        "commit": told["commit"] or commit,
        "versions": {**told["versions"], "hqq": hqq},
        "device": gpu or "cpu",
        "backend": backend or "the best",
    }


def read_parts(folder: Path) -> list[dict[str, Any]]:
    """Lines that workers wrote; a line cut off by a kill is left out."""
    lines = []
    for path in sorted(folder.rglob("*.jsonl")):
        for text in path.read_text("utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                print(f"{path.name}: a line is cut off", file=sys.stderr)
    return lines


if __name__ == "__main__":
    sys.exit(main())
