"""docs/serve.md: its examples run, and its lists of flags, paths and metrics are whole."""

import re
from pathlib import Path

import pytest
import typer
from serving import serving

from tqai.cli.app import app

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "serve.md").read_text("utf-8")


def section(title):
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def code_blocks(text):
    """Blocks that are indented by four spaces, blank lines within them included."""
    found = re.findall(r"(?:(?:^ {4}.*\n)(?:^ *\n(?=^ {4}))?)+", text, re.MULTILINE)
    return [re.sub(r"^ {4}", "", block, flags=re.MULTILINE) for block in found]


@pytest.fixture(scope="module")
def documented(make_engine):
    with make_engine() as engine, serving(engine, model_name="tqai-demo") as served:
        yield served


def test_examples_run(documented, capsys):
    blocks = code_blocks(section("Examples"))
    assert len(blocks) == 7
    source = "\n".join(blocks).replace("http://127.0.0.1:8000", documented.url)
    assert documented.url in source
    namespace = {}
    exec(compile(source, "docs/serve.md", "exec"), namespace)
    namespace["client"].close()
    assert namespace["trip"]["city"] in ("Oslo", "Rome") and namespace["call"].name == "plan"
    assert namespace["usage"].completion_tokens == 20
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("0 length") and out[-1] == "best_of"


def test_every_flag_is_named_and_no_other():
    command = typer.main.get_command(app).commands["serve"]
    named = set(re.findall(r"--[a-z][a-z-]+", section("Flags")))
    known = [set(parameter.opts) - {"--help"} for parameter in command.params]
    assert all(opts & named for opts in known if opts), [opts for opts in known if not opts & named]
    assert named <= set().union(*known)


def test_every_metric_is_named_and_no_other(documented):
    text = documented.http.get("/metrics").text
    served = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE tqai:")}
    served = {name.removeprefix("tqai:") for name in served if not name.endswith("_created")}
    rows = [line for line in section("Metrics").splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])} == served


def test_every_path_is_named_and_no_other(documented):
    paths = set(documented.http.get("/openapi.json").json()["paths"])
    rows = [line for line in PAGE.split("## Examples")[0].splitlines() if line.startswith("| `/")]
    named = {path for row in rows for path in re.findall(r"`(/[\w./]*)`", row.split("|")[1])}
    assert named - {"/", "/openapi.json"} == paths - {"/v1/models/{model}"}


def test_every_status_is_named(documented):
    schema = documented.http.get("/openapi.json").json()
    statuses = {s for path in schema["paths"].values() for verb in path.values() for s in verb["responses"]}
    named = set(re.findall(r"^\| (\d+) \|", section("Parameters"), re.MULTILINE))
    assert statuses - {"200"} <= named
