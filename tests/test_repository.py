"""What must stay true of the repository as a whole."""

import re
from pathlib import Path

import pytest

import tqai

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "tqai"
MAX_LINES = 400
LONGER = {
    # path under src/tqai -> why it may be longer than 400 lines
}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_source_file_is_longer_than_400_lines(path):
    lines = len(path.read_text("utf-8").splitlines())
    assert lines <= MAX_LINES or str(path.relative_to(SOURCE)) in LONGER, f"{lines} lines"


def makefile_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text("utf-8"), flags=re.M))


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_make_commands_in_documents_exist(document):
    text = (ROOT / document).read_text("utf-8")
    code = "\n".join(re.findall(r"^(?: {4}|\s*`{3}.*\n).*$", text, flags=re.M)) + "\n".join(
        re.findall(r"`(make[^`]*)`", text)
    )
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", code))
    assert named <= makefile_targets()


def test_readme_names_the_two_commands():
    text = (ROOT / "README.md").read_text("utf-8")
    assert "make demo" in text and "make test" in text


def test_relative_links_in_documents_lead_somewhere():
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", document.read_text("utf-8")):
            assert (document.parent / target).exists(), f"{document.relative_to(ROOT)} links {target}"


def test_torch_is_pinned_without_a_build_suffix():
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    assert "torch==2.13.0" in lines


def test_constraints_pin_every_declared_dependency():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["torch"], *extras["eval"], *extras["plot"], *extras["dev"]]
    pinned = {
        re.match(r"[\w-]+", line)[0].lower()
        for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
        if "==" in line and not line.startswith("#")
    }
    names = {re.match(r"[\w-]+", item)[0].lower() for item in wanted}
    assert names - {"tqai"} <= pinned


def test_changelog_has_a_place_for_this_version():
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert "[Unreleased]" in text or f"[{tqai.__version__}]" in text
