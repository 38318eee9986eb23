"""A folder of codebooks: save what a solver gave, load it later, fall back to the shipped tables."""

from __future__ import annotations

import json
import os
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from tqai.core.codebook import codebook
from tqai.core.solvers.levels import Levels
from tqai.errors import ConfigError, CorruptFileError

__all__ = ["CodebookRegistry"]

FORMAT, VERSION = "tqai-codebook", 1


class CodebookRegistry:
    """Codebooks by head_dim and bits, one small JSON file each: `d128_b4.json`.

    Levels are written as hexadecimal floats, so that what is loaded is what was saved, bit for bit.

    Args:
        folder: where they lie; it need not exist yet. None: there are only the shipped ones.
    """

    def __init__(self, folder: str | PathLike[str] | None = None) -> None:
        self.folder = None if folder is None else Path(folder).expanduser()

    def save(
        self,
        head_dim: int,
        bits: int,
        levels: Levels | None = None,
        path: str | PathLike[str] | None = None,
        **about: Any,
    ) -> Path:
        """Write a codebook (None: the one that the codec uses) and return where.

        Args:
            path: another file than the registry's own place for it.
            about: what to remember with it, such as `solver="cmaes"`; plain values.

        Raises:
            ConfigError: no folder and no path, or levels that are not 2**bits ascending numbers.
        """
        levels = self._shipped(head_dim, bits) if levels is None else levels
        _check(levels, bits)
        target = Path(path).expanduser() if path is not None else self.path_of(head_dim, bits)
        content = {
            "format": FORMAT,
            "version": VERSION,
            "head_dim": head_dim,
            "bits": bits,
            "about": about,
            "centroids": [float(level).hex() for level in levels.centroids],
        }
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(target.name + ".new")
        beside.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        os.replace(beside, target)
        return target

    def load(self, head_dim: int, bits: int) -> Levels:
        """The codebook saved for these, else the one that the codec uses.

        Raises:
            ConfigError: head_dim or bits out of range.
            CorruptFileError: a file that is no codebook, or one of another head_dim or bits.
        """
        if self.folder is None or not self.path_of(head_dim, bits).is_file():
            return self._shipped(head_dim, bits)
        path = self.path_of(head_dim, bits)
        try:
            content = json.loads(path.read_text("utf-8"))
            known = (content["format"], content["version"], content["head_dim"], content["bits"])
            centroids = np.array([float.fromhex(level) for level in content["centroids"]])
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptFileError(f"{path} is no codebook: {error}") from error
        if known != (FORMAT, VERSION, head_dim, bits):
            raise CorruptFileError(f"{path} is {known}, not {(FORMAT, VERSION, head_dim, bits)}")
        boundaries = 0.5 * (centroids[1:] + centroids[:-1])
        levels = Levels(centroids.astype(np.float32), boundaries.astype(np.float32))
        try:
            _check(levels, bits)
        except ConfigError as error:
            raise CorruptFileError(f"{path}: {error}") from error
        return levels

    def path_of(self, head_dim: int, bits: int) -> Path:
        """Where the registry keeps that codebook.

        Raises:
            ConfigError: the registry has no folder.
        """
        if self.folder is None:
            raise ConfigError("this registry has no folder: give CodebookRegistry one, or save a path")
        return self.folder / f"d{head_dim}_b{bits}.json"

    @staticmethod
    def _shipped(head_dim: int, bits: int) -> Levels:
        book = codebook(head_dim, bits)
        return Levels(book.centroids.astype(np.float32), book.boundaries.astype(np.float32))


def _check(levels: Levels, bits: int) -> None:
    centroids = np.asarray(levels.centroids)
    if centroids.shape != (2**bits,) or not np.all(np.diff(centroids) > 0):
        raise ConfigError(f"levels of shape {list(centroids.shape)}: {2**bits} ascending numbers are wanted")
