"""`create_app`: the FastAPI application over an engine."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

import tqai
from tqai.server.api import chat, completions, errors, responses, service
from tqai.server.api.context import Context
from tqai.server.api.gate import Gate
from tqai.server.api.metrics import Metrics
from tqai.server.api.settings import ApiSettings
from tqai.server.engine.engine import Engine

__all__ = ["create_app"]


class _App(FastAPI):
    """Its schema names the statuses that are answered: what FastAPI answers with 422 is 400 here."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI schema."""
        schema = super().openapi()
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(name, None)
        return schema


def create_app(engine: Engine, settings: ApiSettings) -> FastAPI:
    """The application; `engine` has been started and is stopped by the caller."""
    app = _App(
        title="tqai",
        version=tqai.__version__,
        summary="OpenAI-compatible inference over a compressed key-value cache.",
        docs_url=None,
        redoc_url=None,
    )
    context = Context(engine, settings)
    errors.install(app)
    for router in (
        completions.router_for(context),
        chat.router_for(context),
        responses.router_for(context),
        service.router_for(context, Metrics(engine, settings.model_name)),
    ):
        app.include_router(router)
    app.add_middleware(Gate, settings=settings)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return app
