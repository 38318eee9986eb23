"""`create_app`: the FastAPI application over an engine."""

from __future__ import annotations

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


def create_app(engine: Engine, settings: ApiSettings) -> FastAPI:
    """The application; `engine` has been started and is stopped by the caller."""
    app = FastAPI(
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
