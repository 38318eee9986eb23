"""Runs `tqai demo` and draws what it printed: docs/images/demo.svg.

python scripts/record_demo.py [arguments of tqai demo]
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI

import tqai.cli.demo
from tqai.cli.app import main

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "demo.svg"
WIDTH = 100


def record(arguments: list[str], picture: Path = PICTURE) -> int:
    """Run the command with `arguments`, write `picture`, return the exit code."""
    console = Console(record=True, width=WIDTH, force_terminal=True)
    tqai.cli.demo.console = lambda: console
    status = main(["demo", *arguments])
    if status == 0:
        title = " ".join(["tqai demo", *arguments])
        svg = console.export_svg(title=title, theme=MONOKAI, unique_id="demo")
        # no fonts from the network: the reader's own monospace font serves
        svg = re.sub(r"@font-face\s*\{.*?\}", "", svg, flags=re.S)
        svg = re.sub(r"[ \t]+$", "", svg, flags=re.M)
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_text(svg.rstrip() + "\n", "utf-8")
        print(f"wrote {picture}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(record(sys.argv[1:]))
