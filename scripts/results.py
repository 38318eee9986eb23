"""The committed results of benchmarks, read for the tables of `generate_docs.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["read", "read_if_there"]


def read(root: Path, name: str) -> dict[str, Any]:
    """benchmarks/results/`name`.json."""
    found: dict[str, Any] = json.loads(_path(root, name).read_text("utf-8"))
    return found


def read_if_there(root: Path, name: str) -> dict[str, Any] | None:
    """The same, None where there is no such file."""
    return read(root, name) if _path(root, name).is_file() else None


def _path(root: Path, name: str) -> Path:
    return root / "benchmarks" / "results" / f"{name}.json"
