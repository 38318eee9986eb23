"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}.

Nothing of the server's inside gets out: no path, no header, no traceback.
"""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

__all__ = ["ApiError", "ErrorBody", "documented", "error_body", "install"]

logger = logging.getLogger("tqai.server")

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
MAX_MESSAGE = 500


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is no success."""

    error: ErrorDetail


class ApiError(Exception):
    """Ends a request with a status."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The body of an error."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    text = message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 1] + "…"
    # a lone surrogate in a client's text must not break the answer about it
    text = text.encode("utf-8", "replace").decode("utf-8")
    param = None if param is None else param.encode("utf-8", "replace").decode("utf-8")
    return {"error": {"message": text, "type": kind, "param": param, "code": code}}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Entries for a route's `responses`."""
    return {status: {"model": ErrorBody, "description": TYPES.get(status, "error")} for status in statuses}


def install(app: FastAPI) -> None:
    """Make the application answer every error in this shape."""

    @app.exception_handler(ApiError)
    async def _api_error(request: Request, error: ApiError) -> JSONResponse:
        body = error_body(error.status, error.message, error.param, error.code)
        return JSONResponse(body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        # of the branches of a union, the one that got furthest says best what is wrong
        found = max(error.errors(), key=lambda item: len(item["loc"]))
        message, param, code = _explained(found)
        return JSONResponse(error_body(400, message, param, code), 400)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        messages = {404: "no such path", 405: "this path does not take that method"}
        message = messages.get(error.status_code, "the request could not be read")
        return JSONResponse(error_body(error.status_code, message), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def _unexpected(request: Request, error: Exception) -> JSONResponse:
        logger.error("unexpected error", exc_info=error)
        return JSONResponse(error_body(500, "the server failed on this request"), 500)


def _explained(found: dict[str, Any]) -> tuple[str, str | None, str | None]:
    """Message, parameter and code of one of pydantic's findings; without the input, which may be anything."""
    place = [str(part) for part in found["loc"] if part not in ("body", "query", "path")]
    # pydantic names the members of a union in the place
    param = ".".join(part for part in place if "[" not in part and "-" not in part) or None
    if found["type"] == "json_invalid":
        return "the body is no JSON", None, None
    if found["type"] == "extra_forbidden":
        return f"unsupported parameter: {param}", param, "unsupported_parameter"
    if found["type"] == "missing" and param is None:
        return "the body is missing", None, None
    message = str(found["msg"]).removeprefix("Value error, ")
    return (f"{param}: {message}" if param else message), param, None
