"""Find and train the tables of the trellis codec (`core/tables/trellis.json`).

    python training/trellis_tables.py train [FILE]                     levels of every shipped map, anew
    python training/trellis_tables.py search STATES BITS T SECONDS     look for a better map, print the best
    python training/trellis_tables.py search STATES 4 parts SECONDS    the same for terms of 4-bit codes

`train` is the recipe of the shipped levels, and gives the very same ones again on one machine: Lloyd's
algorithm on Gaussian numbers (and their negatives, so that the mean is exactly zero) coded by the Viterbi
algorithm. The levels start as quantiles of the Gaussian, ascending in m, so the rows of a map are read with
the last one as the most significant: a coarse scalar quantizer, whose finer bits the trellis refines.

Levels of 4 bits are sums of two parts. What is trained are the parts: least squares instead of means, and
twice the step, as the two converge slowly. They start as quantiles of 16 and as evenly spaced numbers.

`search` climbs over the rows of the linear map: start from the best of many random ones, flip bits, add,
swap and replace rows, score each by a short `train`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from tqai.core.trellis_code import STATE_BITS, TABLE_FILE, TRELLIS_BITS, TrellisCode, rows_of
from tqai.core.viterbi import cheapest_path

SHIPPED = Path(__file__).parents[1] / "src" / "tqai" / "core" / "tables" / TABLE_FILE
NARROWER = 0.97
"""The start is a little narrower than the source, as centroids are."""
STEPS = 1000
PART_SPREAD = 0.8
"""Evenly spaced numbers that the second part starts from lie within +- this."""
PART_STEP = 2.0
PART_ITERATIONS = 60


def samples(rows: int, seed: int) -> np.ndarray:
    """Gaussian `[2 * rows, STEPS]`, the second half the negative of the first."""
    half = np.random.default_rng(seed).standard_normal((rows, STEPS)).astype(np.float32)
    return np.concatenate([half, -half])


def quantiles(count: int) -> np.ndarray:
    """The levels to start from, ascending, float64 `[count]`."""
    return np.array([NARROWER * NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)])


def trained(
    code: TrellisCode, levels: np.ndarray, x: np.ndarray, iterations: int
) -> tuple[float, np.ndarray]:
    """Least mean squared error of `x` seen, and the levels float64 `[2**t]` that gave it."""
    index = code.mixed(np.arange(1 << code.window_bits))
    best = (np.inf, levels)
    for _ in range(iterations):
        table = levels[index].astype(np.float32)
        chosen = index[cheapest_path(x, table, code.state_bits)]
        error = float(np.mean((x - levels[chosen]) ** 2))
        if error < best[0]:
            best = (error, levels)
        count = np.bincount(chosen.ravel(), minlength=len(levels))
        total = np.bincount(chosen.ravel(), weights=x.ravel(), minlength=len(levels))
        levels = np.where(count > 0, total / np.maximum(count, 1), levels)
    return best


def start_of_parts() -> tuple[np.ndarray, np.ndarray]:
    """What the two parts of levels are trained from, float64 `[16]` and `[8]`."""
    return quantiles(16), PART_SPREAD * (np.arange(8) - 3.5) / 4.0


def trained_parts(
    code: TrellisCode, x: np.ndarray, iterations: int
) -> tuple[float, tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Least mean squared error of `x` seen, the parts float64 `[16]` and `[8]` that gave it, and how often
    each of their sums occurred `[8, 16]`."""
    m = code.mixed(np.arange(1 << code.window_bits))
    parts = start_of_parts()
    best = (np.inf, parts, np.zeros((8, 16)))
    for _ in range(iterations):
        levels = np.add.outer(parts[1], parts[0]).reshape(-1)
        chosen = m[cheapest_path(x, levels[m].astype(np.float32), code.state_bits)]
        error = float(np.mean((x - levels[chosen]) ** 2))
        count = np.bincount(chosen.ravel(), minlength=128).reshape(8, 16)
        if error < best[0]:
            best = (error, parts, count)
        total = np.bincount(chosen.ravel(), weights=x.ravel(), minlength=128).reshape(8, 16)
        corner = np.diag(count.sum(0)), np.diag(count.sum(1))
        normal = np.block([[corner[0], count.T], [count, corner[1]]]) + 1e-6 * np.eye(24)
        found = np.linalg.solve(normal, np.concatenate([total.sum(0), total.sum(1)]))
        # What one part has more and the other less does not matter: the second has mean 0.
        middle = found[16:].mean()
        first, second = found[:16] + middle, found[16:] - middle
        parts = (parts[0] + PART_STEP * (first - parts[0]), parts[1] + PART_STEP * (second - parts[1]))
    return best


def whole_parts(
    parts: tuple[np.ndarray, np.ndarray], count: np.ndarray
) -> tuple[list[int], list[int], float]:
    """Parts in whole numbers, and their step; levels are within +-127, and of the first part the first eight
    below 0 and the others not. Of many steps, and of many numbers to add to one part and take off the other,
    those that move the levels least, weighed by how often each occurs (`count` `[8, 16]`)."""
    share = count / count.sum()
    best: tuple[float, list[int], list[int], float] = (np.inf, [], [], 0.0)
    for step in np.linspace(1.0, 1.25, 251) * np.abs(np.add.outer(parts[1], parts[0])).max() / 127.0:
        for moved in np.linspace(-0.5, 0.5, 101)[:-1] * step:
            first, second = np.rint((parts[0] + moved) / step), np.rint((parts[1] - moved) / step)
            levels = np.add.outer(second, first)
            error = np.add.outer(parts[1], parts[0]) - levels * step
            off = float(np.sum(share * error**2))
            fits = np.abs(levels).max() <= 127 and first[7] < 0 <= first[8]
            if fits and off < best[0]:
                best = (off, [int(i) for i in first], [int(i) for i in second], float(np.float32(step)))
    print(f"rounding adds {best[0]:.6f}")
    return best[1:]


def train_all(path: Path) -> None:
    """Train the levels of every map in the shipped file and write them to `path`."""
    tables: dict[str, Any] = json.loads(SHIPPED.read_text(encoding="utf-8"))
    x = samples(48, seed=1)
    for state_bits in STATE_BITS:
        for bits in TRELLIS_BITS:
            entry = tables["states"][str(1 << state_bits)][str(bits)]
            if "terms" in entry:
                terms = tuple(tuple((shift, mask) for shift, mask in part) for part in entry["terms"])
                code = TrellisCode(state_bits, bits, rows_of(terms), np.zeros(128, dtype=np.int8), 1.0, terms)
                error, parts, count = trained_parts(code, x, PART_ITERATIONS)
                first, second, step = whole_parts(parts, count)
                entry |= {"parts": [first, second], "step": step.hex()}
                print(f"{1 << state_bits} states, {bits} bits: squared error {error:.5f}", flush=True)
                continue
            rows = tuple(entry["rows"])
            code = TrellisCode(state_bits, bits, rows, np.zeros(1 << len(rows), dtype=np.int8), 1.0)
            error, levels = trained(code, quantiles(1 << len(rows)), x, iterations=80)
            step = float(np.float32(np.abs(levels).max() / 127.0))
            entry["levels"] = [int(level) for level in np.rint(levels / step)]
            entry["step"] = step.hex()
            print(f"{1 << state_bits} states, {bits} bits: squared error {error:.5f}", flush=True)
    path.write_text(as_text(tables), encoding="utf-8")


def as_text(tables: dict[str, Any]) -> str:
    """JSON with one line per list."""
    lines = ["{", f' "note": {json.dumps(tables["note"])},', ' "states": {']
    for i, (states, by_bits) in enumerate(tables["states"].items()):
        lines.append(f'  "{states}": {{')
        for j, (bits, entry) in enumerate(by_bits.items()):
            keys = ("terms", "parts", "step") if "terms" in entry else ("rows", "levels", "step")
            fields = ",\n".join(f'    "{key}": {json.dumps(entry[key])}' for key in keys)
            lines.append(f'   "{bits}": {{\n{fields}\n   }}' + ("," if j + 1 < len(by_bits) else ""))
        lines.append("  }" + ("," if i + 1 < len(tables["states"]) else ""))
    return "\n".join([*lines, " }", "}", ""])


def search(state_bits: int, bits: int, width: int, seconds: float, seed: int = 1) -> None:
    """Climb for `seconds` and print the rows of the best map found, with its squared error."""
    rng = np.random.default_rng(seed)
    window_bits = state_bits + bits
    x, start = samples(16, seed=2), quantiles(1 << width)
    empty = np.zeros(1 << width, dtype=np.int8)

    def score(rows: list[int], iterations: int) -> float:
        if not independent(rows):
            return np.inf
        code = TrellisCode(state_bits, bits, tuple(rows), empty, 1.0)
        return trained(code, start, x, iterations)[0]

    began = time.monotonic()
    pool = []
    while time.monotonic() < began + 0.25 * seconds:
        rows = [int(row) for row in rng.integers(1, 1 << window_bits, width)]
        pool.append((score(rows, 3), rows))
    kept = [(score(rows, 8), rows) for _, rows in sorted(pool)[:6]]
    while (elapsed := time.monotonic() - began) < seconds:
        kept = sorted(kept)[: 6 if elapsed < 0.45 * seconds else 3 if elapsed < 0.7 * seconds else 1]
        at = int(rng.integers(len(kept)))
        rows = changed(kept[at][1], window_bits, rng)
        error = score(rows, 8)
        if error < kept[at][0]:
            kept[at] = (error, rows)
    print(*min(kept))


def changed(rows: list[int], window_bits: int, rng: np.random.Generator) -> list[int]:
    """A copy with one thing changed."""
    rows, kind, j, k = list(rows), rng.random(), *(int(i) for i in rng.integers(len(rows), size=2))
    if kind < 0.6:
        rows[j] ^= 1 << int(rng.integers(window_bits))
    elif kind < 0.75:
        rows[j] ^= rows[k] if j != k else 1
    elif kind < 0.85:
        rows[j], rows[k] = rows[k], rows[j]
    else:
        rows[j] = int(rng.integers(1, 1 << window_bits))
    return rows


def independent(rows: list[int]) -> bool:
    """Whether the rows are linearly independent over GF(2), so that every level is reached."""
    basis: list[int] = []
    for row in rows:
        for other in basis:
            row = min(row, row ^ other)
        if row == 0:
            return False
        basis.append(row)
    return True


def main(arguments: list[str]) -> None:
    """See the module's docstring."""
    if arguments[:1] == ["train"] and len(arguments) <= 2:
        train_all(Path(arguments[1]) if len(arguments) == 2 else SHIPPED)
    elif arguments[:1] == ["search"] and len(arguments) == 5:
        states, bits, width, seconds = (int(argument) for argument in arguments[1:])
        search(states.bit_length() - 1, bits, width, float(seconds))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
