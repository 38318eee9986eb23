"""Running the application: uvicorn, signals, draining.

The first SIGTERM or SIGINT drains: new requests get 503, those in flight go on, then the process ends.
The second one, or the end of the grace period, ends it at once.
"""

from __future__ import annotations

import logging
import threading
from types import FrameType

import uvicorn
from fastapi import FastAPI
from sse_starlette.sse import AppStatus

from tqai.server.engine.engine import Engine

__all__ = ["DrainingServer", "config_for", "is_loopback", "serve"]

logger = logging.getLogger("tqai.server")

KEEP_ALIVE_SECONDS = 75
"""httpx and with it OpenAI's client let go after 5 seconds, others after up to a minute."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    return host in ("localhost", "::1") or host.startswith("127.")


class DrainingServer(uvicorn.Server):
    """See the module's text."""

    def __init__(self, config: uvicorn.Config, engine: Engine, grace_seconds: float) -> None:
        super().__init__(config)
        self._engine, self._grace_seconds = engine, grace_seconds
        self._drain: threading.Thread | None = None
        # streams in flight are to end by themselves
        AppStatus.disable_automatic_graceful_drain()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called for signals."""
        if self._drain is not None:
            self.should_exit = self.force_exit = True
            return
        logger.warning(
            "draining: requests in flight go on, new ones are refused; a second signal ends at once"
        )
        self._engine.drain()
        self._drain = threading.Thread(target=self._exit_when_idle, daemon=True)
        self._drain.start()

    def _exit_when_idle(self) -> None:
        if not self._engine.wait_idle(self._grace_seconds):
            logger.warning("requests were still in flight after %g s", self._grace_seconds)
            self._engine.stop()
        self.should_exit = True


def config_for(app: FastAPI, host: str, port: int) -> uvicorn.Config:
    """How uvicorn serves `app`: without its name in the answers, with heads of at most 64 KiB, and keeping
    idle connections for longer than clients do, so that none is closed under a request on its way."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http="h11",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        h11_max_incomplete_event_size=64 << 10,
    )


def serve(app: FastAPI, engine: Engine, host: str, port: int, grace_seconds: float) -> None:
    """Serve until a signal; see the module's text."""
    try:
        DrainingServer(config_for(app, host, port), engine, grace_seconds).run()
    finally:
        engine.stop()
