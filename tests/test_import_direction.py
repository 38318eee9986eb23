"""Imports in src/tqai go one way; parsed, so that imports inside functions count too."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "tqai"

# Room -> height. A room imports rooms of less height, and itself.
HEIGHTS = {
    "errors": 0,
    "presets": 0,
    "config": 1,
    "core": 2,
    "backends": 3,
    "activations": 4,
    "quantizers": 4,
    "cache": 4,
    "integrations": 5,
    "demo": 5,
    "evaluation": 6,
    "server": 7,
    "cli": 8,
    "__main__": 9,
}
# Rooms of one height do not know each other, except these.
SIDEWAYS = {("integrations", "quantizers")}
FRAMEWORKS = {"torch", "transformers", "mlx", "mlx_lm", "triton", "cuda"}
FRAMEWORK_FREE = {"errors", "presets", "config", "core"}


def imported_modules(code: str) -> set[str]:
    """Every module that `code` imports, `from a import b` counted as a.b too."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def violations(code: str, room: str) -> list[str]:
    """Sentences, one per import in `code` that a file of `room` must not make."""
    found = []
    for module in sorted(imported_modules(code)):
        parts = module.split(".")
        if parts[0] in FRAMEWORKS and room in FRAMEWORK_FREE:
            found.append(f"{room} imports {module}")
        if parts[0] != "tqai" or len(parts) == 1 or parts[1] not in HEIGHTS or parts[1] == room:
            continue
        if HEIGHTS[parts[1]] >= HEIGHTS[room] and (room, parts[1]) not in SIDEWAYS:
            found.append(f"{room} imports {module}")
    return found


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_file_imports_only_what_lies_below(path):
    room = room_of(path)
    assert room in HEIGHTS, f"give {room} a place among HEIGHTS"
    assert violations(path.read_text("utf-8"), room) == []


@pytest.mark.parametrize(
    ("room", "code"),
    [
        ("core", "import torch"),
        ("core", "def f():\n    from tqai.backends import resolve"),
        ("config", "from tqai import core"),
        ("backends", "import tqai.cache.pages"),
        ("cache", "from tqai.integrations.transformers import patch"),
        ("integrations", "from tqai.cli import app"),
        ("demo", "from tqai.integrations import transformers"),
        ("evaluation", "if True:\n    import tqai.server"),
    ],
)
def test_planted_violation_is_found(room, code):
    assert violations(code, room)


def test_downward_imports_are_allowed():
    code = "import torch, tqai\nfrom tqai.errors import InputError\nfrom tqai.core.page import PageFormat"
    assert violations(code, "cache") == []
    assert violations("from tqai.core import codec", "quantizers") == []


def test_relative_imports_are_refused():
    with pytest.raises(AssertionError):
        imported_modules("from . import x")
