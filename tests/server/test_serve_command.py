"""`tqai serve` and `turboquant-server`: what the flags come to, without binding a port."""

import socket
import sys

import httpx
import pytest

from tqai.cli.app import main
from tqai.cli.serve import check_address, parse_bytes, turboquant_server


@pytest.fixture
def served_with(monkeypatch, capsys):
    """Runs a command up to where it would bind; gives exit status, what would be served, and stderr."""
    monkeypatch.delenv("TQAI_API_KEYS", raising=False)
    found = {}

    def note(app, engine, host, port, grace_seconds):
        engine.stop()
        found.update(app=app, engine=engine, host=host, port=port, grace=grace_seconds)

    monkeypatch.setattr("tqai.server.api.lifecycle.serve", note)
    # the ports named here may be somebody's
    monkeypatch.setattr("tqai.cli.serve.check_address", lambda host, port: None)

    def run(*options, command=main):
        found.clear()
        status = command(["serve", *options]) if command is main else command()
        return status, dict(found), capsys.readouterr().err

    return run


def status_of(app, path="/v1/models", body=None, **headers):
    async def ask():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
            return await http.request("GET" if body is None else "POST", path, json=body, headers=headers)

    import asyncio

    return asyncio.run(ask())


def test_keys_come_from_flags_environment_and_file(served_with, monkeypatch, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("# of the team\n\n  from-file \n")
    monkeypatch.setenv("TQAI_API_KEYS", "from-environment, and-another")
    status, found, said = served_with(
        "--max-kv-memory", "1MiB", "--api-key", "from-flag", "--api-key-file", str(keys), "--host", "0.0.0.0"
    )
    assert status == 0 and "without --api-key" not in said
    for key in ("from-flag", "from-file", "from-environment", "and-another"):
        assert status_of(found["app"], authorization=f"Bearer {key}").status_code == 200, key
        assert key not in said
    for key in ("", "# of the team", "from-environment, and-another"):
        assert status_of(found["app"], authorization=f"Bearer {key}").status_code == 401, key


def test_loopback_unless_told_otherwise_and_a_warning_without_a_key(served_with):
    status, found, said = served_with("--max-kv-memory", "1MiB")
    assert (status, found["host"], found["port"], found["grace"]) == (0, "127.0.0.1", 8000, 60.0)
    assert "without --api-key" not in said and "K4/V2" in said
    answer = status_of(found["app"], origin="http://other.example")
    assert not [name for name in answer.headers if name.startswith("access-control")]
    status, found, said = served_with("--max-kv-memory", "1MiB", "--host", "0.0.0.0")
    assert status == 0 and "--host 0.0.0.0 without --api-key" in said


def test_flags_reach_engine_and_interface(served_with, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages }}")
    options = "--bits 3 --port 9001 --max-kv-memory 2MiB --max-running 3 --max-waiting 4 --max-model-len 700"
    options += " --max-output-tokens 9 --max-choices 2 --max-body 1KiB --chunk-tokens 128 --drain-seconds 7"
    options += " --no-prefix-caching --seed 5 --sink-tokens 2 --residual-window 1 --backend torch"
    options += f" --served-model-name mine --allow-origin http://a --chat-template {template}"
    status, found, _ = served_with(*options.split())
    assert status == 0 and found["port"] == 9001 and found["grace"] == 7.0
    engine = found["engine"]
    settings = engine.settings
    assert (settings.max_running, settings.max_waiting, settings.chunk_tokens) == (3, 4, 128)
    assert (settings.max_kv_bytes, settings.max_model_len, settings.seed) == (2 << 20, 700, 5)
    assert (settings.cache.bits_k, settings.cache.bits_v) == (3, 3) and not settings.prefix_caching
    assert (settings.cache.sink_tokens, settings.cache.residual_window) == (2, 1)
    assert engine.store.codes[0].name == "torch" and engine.max_model_len == 700
    said = {"messages": [{"role": "user", "content": "x"}]}
    tokens = status_of(found["app"], "/tokenize", said).json()["tokens"]
    assert engine.tokenizer.decode(tokens) == str(said["messages"]), "by the given template"
    assert status_of(found["app"], "/tokenize", {"prompt": "x" * 1024}).status_code == 413
    answer = status_of(found["app"], origin="http://a")
    assert answer.json()["data"][0]["id"] == "mine"
    assert answer.headers["access-control-allow-origin"] == "http://a"
    assert "access-control-allow-origin" not in status_of(found["app"], origin="http://b").headers


def test_bits_of_the_last_layer(served_with):
    status, found, _ = served_with("--max-kv-memory", "1MiB", "--last-layer-bits", "K8/V8")
    sizes = [codes.page_bytes for codes in found["engine"].store.codes]
    assert status == 0 and len(set(sizes[:-1])) == 1 and sizes[-1] > sizes[0]


def test_uncompressed(served_with):
    status, found, _ = served_with("--no-tqai", "--max-kv-memory", "1MiB")
    assert status == 0 and found["engine"].settings.cache is None


def test_the_older_project_s_command_and_flags(served_with, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["turboquant-server", "--bits", "4", "--port", "8123"])
    status, found, _ = served_with(command=turboquant_server)
    assert status == 0 and found["port"] == 8123
    assert found["engine"].settings.cache.bits_v == 4


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--bits", "4", "--bits-k", "3"], "--bits"),
        (["--max-body", "much"], "--max-body much"),
        (["--max-kv-memory", "-1"], "--max-kv-memory -1"),
        (["--max-kv-memory", "1KiB"], "max_kv_bytes=1024"),
        (["--api-key-file", "/no/such/file"], "--api-key-file"),
        (["--chat-template", "/no/such/file"], "--chat-template"),
        (["--chunk-tokens", "100"], "chunk_tokens=100"),
        (["--api-key", ""], "api_keys"),
        (["--port", "70000"], "--port"),
    ],
)
def test_wrong_flags_are_one_line_that_names_them(served_with, options, part):
    status, found, said = served_with(*options)
    assert status in (1, 2) and not found and part in said and "Traceback" not in said


def test_a_key_file_without_keys_is_refused(served_with, tmp_path):
    empty = tmp_path / "keys"
    empty.write_text("# none yet\n")
    status, found, said = served_with("--api-key-file", str(empty))
    assert status == 2 and not found and "holds no key" in said


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_a_port_in_use_is_one_line_before_the_model_is_loaded(capsys, monkeypatch, host):
    monkeypatch.setattr("tqai.cli.serve.load_model", lambda *_: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--host", host, "--port", str(port)]) == 1
        said = capsys.readouterr().err
    assert said == f"tqai: error: --host {host} --port {port}: Address already in use\n"


def test_an_address_that_is_nobody_s(capsys):
    assert main(["serve", "--host", "192.0.2.1"]) == 1  # RFC 5737: of no machine
    assert "--host 192.0.2.1 --port 8000: Cannot assign requested address" in capsys.readouterr().err


def test_a_free_port_is_still_free_after_the_check():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    check_address("127.0.0.1", port)
    socket.create_server(("127.0.0.1", port)).close()


@pytest.mark.parametrize(
    ("text", "size"),
    [("1048576", 1 << 20), ("8GiB", 8 << 30), ("500MB", 500_000_000), (" 1.5 kib", 1536), ("2t", 2 * 10**12)],
)
def test_sizes(text, size):
    assert parse_bytes(text, "--x") == size
