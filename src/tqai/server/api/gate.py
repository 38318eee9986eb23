"""Keys and body size, checked before anything is parsed."""

from __future__ import annotations

import hashlib
import hmac
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tqai.server.api.errors import error_body
from tqai.server.api.settings import ApiSettings

__all__ = ["Gate"]

OPEN_PATHS = ("/", "/health")


class Gate:
    """ASGI middleware: 401 without a key, 413 for a body that is too long.

    Keys are compared by their digests and all of them always, so that the time tells nothing.
    """

    def __init__(self, app: ASGIApp, settings: ApiSettings) -> None:
        self.app, self.settings = app, settings
        self._digests = [_digest(key.encode()) for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        is_open = scope["path"] in OPEN_PATHS
        if self._digests and not is_open and not self._knows(headers.get(b"authorization", b"")):
            body = error_body(401, "missing or unknown API key", None, "invalid_api_key")
            await JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
            return
        limit = self.settings.max_body_bytes
        messages: list[Message] = []
        size, too_long = 0, False
        while not too_long:
            message = await receive()
            messages.append(message)
            size += len(message.get("body", b""))
            too_long = size > limit
            if message["type"] != "http.request" or not message.get("more_body", False):
                break
        if too_long:
            await _discard(receive, messages, 2 * limit - size)
            body = error_body(413, f"the body is longer than {limit} bytes")
            await JSONResponse(body, 413, {"Connection": "close"})(scope, receive, send)
            return

        async def replay() -> Any:
            return messages.pop(0) if messages else await receive()

        await self.app(scope, replay, send)

    def _knows(self, authorization: bytes) -> bool:
        scheme, _, key = authorization.partition(b" ")
        given = _digest(key.strip())
        known = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(known) and scheme.lower() == b"bearer"


async def _discard(receive: Receive, read: list[Message], most: int) -> None:
    """Read on for at most so many bytes: a client that is still sending would see a broken connection in
    place of the answer."""
    message = read[-1]
    while most > 0 and message["type"] == "http.request" and message.get("more_body", False):
        message = await receive()
        most -= len(message.get("body", b"")) or 1


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
