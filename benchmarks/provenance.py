"""Where and with what a result was measured: machine, versions, commit, date."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("tqai", "torch", "transformers", "numpy", "optimum-quanto", "safetensors")
CPU_FEATURES = ("avx2", "avx512f", "avx512bw", "avx512_vnni", "avx512vbmi", "amx_int8", "asimd", "sve")


def provenance() -> dict[str, Any]:
    """Plain values, fit for JSON. `commit` is the checked-out one, `changed_files` how many files differ
    from it; both None outside a git checkout."""
    import torch

    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": _changed_files(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_features": [name for name in CPU_FEATURES if name in _cpu_flags()],
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _changed_files() -> int | None:
    status = _git("status", "--porcelain", "--untracked-files=no")
    return None if status is None else len(status.splitlines())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_info(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.lower().startswith(field)), "")


def _cpu_model() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> list[str]:
    return (_cpu_info("flags") or _cpu_info("features")).split()
