"""`tqai chat` against a local model and against a server."""

import io

import pytest
from serving import serving

from tqai.cli.app import main


def talk(monkeypatch, capsys, lines, *options):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    status = main(["chat", "--temperature", "0", "--max-tokens", "8", *options])
    out, err = capsys.readouterr()
    return status, out, err


def test_local_and_remote_conversations_are_the_same(served, monkeypatch, capsys):
    lines = [
        "The import statement",
        "/stats",
        "is a module",
        "/reset",
        "The import statement",
        "/nonsense",
        "/quit",
    ]
    status, local, err = talk(monkeypatch, capsys, lines)
    assert status == 0 and "/stats shows" in err
    _, remote, _ = talk(monkeypatch, capsys, lines, "--url", served.url)
    assert "K4/V2" in local and "3 prompt tokens" in local and "8 generated" in local

    def answers(text):
        return [
            line
            for line in text.splitlines()
            if not line.startswith(("last", "conversation", "cache", "pool"))
        ]

    # the test's template joins messages by one line break, the command's by two: first turns agree
    assert answers(local)[:2] == answers(remote)[:2]
    assert local.count(answers(local)[-1]) >= 2, "after /reset the first answer comes again"
    assert "times less than bfloat16" in remote


def test_the_key_of_a_server(make_engine, monkeypatch, capsys):
    with make_engine() as engine, serving(engine, api_keys=("mine",)) as served:
        monkeypatch.delenv("TQAI_API_KEYS", raising=False)
        status, out, err = talk(monkeypatch, capsys, ["The import"], "--url", served.url)
        assert status == 1 and out == "" and "401" in err
        given = talk(monkeypatch, capsys, ["The import"], "--url", served.url, "--api-key", "mine")
        monkeypatch.setenv("TQAI_API_KEYS", "mine,other")
        found = talk(monkeypatch, capsys, ["The import"], "--url", served.url)
        assert given == found and given[0] == 0 and given[1].strip()


@pytest.mark.parametrize("options", [("--url", "http://127.0.0.1:9"), ("--url", "x", "--model", "y")])
def test_what_cannot_be_reached_is_one_line(monkeypatch, capsys, options):
    status, out, err = talk(monkeypatch, capsys, ["x"], *options)
    assert status in (1, 2) and out == "" and err.startswith("tqai: error:") and "Traceback" not in err


def test_an_answer_too_long_for_the_model_loses_only_itself(served, monkeypatch, capsys):
    status, out, err = talk(monkeypatch, capsys, ["word " * 12_000, "The import"], "--url", served.url)
    assert status == 0 and "400" in err and out.strip()
