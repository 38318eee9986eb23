"""Solve the shipped codebooks anew and write them: `python -m tqai.core.tables [FILE]`.

Levels are written as hexadecimal floats, positive half only, so that reading gives the very same bits.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tqai.config import MAX_BITS
from tqai.core.codebook import SHIPPED_HEAD_DIMS, TABLE_FILE, solved_half


def main(path: Path) -> None:
    """Write the tables of every shipped head_dim and 1 to 8 bits to `path`."""
    tables: dict[str, Any] = {}
    for head_dim in SHIPPED_HEAD_DIMS:
        tables[str(head_dim)] = {}
        for bits in range(1, MAX_BITS + 1):
            half = solved_half(head_dim, bits)
            tables[str(head_dim)][str(bits)] = {
                "mse_per_unit_vector": half.mse_per_unit_vector,
                "centroids": [float(level).hex() for level in half.centroids],
            }
    note = (
        "Lloyd-Max levels, positive half, of one coordinate of a uniformly random unit vector; "
        "up to 4 bits whole multiples, at most 127, of a step"
    )
    path.write_text(json.dumps({"note": note, "head_dims": tables}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name(TABLE_FILE))
