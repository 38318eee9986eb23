"""A server in a thread, for tests that talk HTTP to it."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn

from tqai.server.api.app import create_app
from tqai.server.api.lifecycle import config_for
from tqai.server.api.settings import ApiSettings
from tqai.server.engine.engine import Engine

MODEL = "demo"
TOOL_TEMPLATE = (
    "{% if tools %}Tools: {{ tools | tojson }} Answer with <tool_call>JSON</tool_call>\n{% endif %}"
    "{% for message in messages %}{{ message.content }}{{ '' if loop.last else '\n' }}{% endfor %}"
)


@dataclass
class Served:
    """A running server.

    Attributes:
        url: without a slash at the end.
        http: a client for it.
    """

    url: str
    engine: Engine
    http: httpx.Client

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        return self.http.base_url.host, self.http.base_url.port or 80

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json={"model": MODEL, **body})

    def error(self, path: str, **body: Any) -> tuple[int, str, str | None]:
        """Status, message and parameter of a request that must fail."""
        answer = self.post(path, **body)
        assert answer.status_code >= 400, answer.text
        found = answer.json()["error"]
        assert set(found) == {"message", "type", "param", "code"}
        return answer.status_code, found["message"], found["param"]


@contextmanager
def serving(engine: Engine, **settings: Any) -> Iterator[Served]:
    """Serve `engine` on a free port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        settings = {"model_name": MODEL, "chat_template": TOOL_TEMPLATE, **settings}
        app = create_app(engine, ApiSettings(**settings))
        server = uvicorn.Server(config_for(app, "127.0.0.1", port))
        listener.listen(256)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        while not server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with httpx.Client(base_url=url, timeout=120) as http:
            yield Served(url, engine, http)
        server.should_exit = True
        thread.join(60)
