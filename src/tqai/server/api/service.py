"""/v1/models, /tokenize, /health, /metrics, /status.json and the status page."""

from __future__ import annotations

import time
from importlib.resources import files
from typing import Any

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel

import tqai
from tqai.server.api.context import Context
from tqai.server.api.errors import ApiError, documented
from tqai.server.api.metrics import Metrics
from tqai.server.api.schemas import ModelCard, ModelList, TokenizeRequest, TokenizeResponse

__all__ = ["router_for"]

PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


class Health(BaseModel):
    """Whether the server takes requests."""

    status: str


def router_for(context: Context, metrics: Metrics) -> APIRouter:
    """The routes over `context`."""
    router = APIRouter()
    engine, settings = context.engine, context.settings
    page = files("tqai.server.api").joinpath("status.html").read_text("utf-8")

    def card() -> ModelCard:
        return ModelCard(
            id=settings.model_name,
            created=context.created,
            owned_by="tqai",
            max_model_len=engine.max_model_len,
        )

    @router.get("/v1/models", responses=documented(401))
    async def models() -> ModelList:
        return ModelList(data=[card()])

    @router.get("/v1/models/{model:path}", responses=documented(401, 404))
    async def model(model: str) -> ModelCard:
        context.check_model(model)
        return card()

    @router.post("/tokenize", responses=documented(400, 401, 404, 413))
    async def tokenize(body: TokenizeRequest) -> TokenizeResponse:
        if body.model is not None:
            context.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "exactly one of prompt and messages is needed", "prompt")
        if body.prompt is not None:
            tokens = await context.tokens_of(body.prompt, body.add_special_tokens is not False)
        elif body.add_special_tokens:
            param = "add_special_tokens"
            raise ApiError(400, f"{param}: the chat template adds those of a conversation", param)
        else:
            tokens = await context.tokens_of_chat(body.messages or [], None)
        return TokenizeResponse(tokens=tokens, count=len(tokens), max_model_len=engine.max_model_len)

    @router.get("/health", responses={503: {"model": Health, "description": "draining or failed"}})
    async def health() -> Health:
        if not engine.is_alive:
            return JSONResponse({"status": "failed"}, 503)  # type: ignore[return-value]
        if engine.is_draining:
            return JSONResponse({"status": "draining"}, 503)  # type: ignore[return-value]
        return Health(status="ok")

    @router.get("/metrics", responses=documented(401), response_class=PlainTextResponse)
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type=metrics.content_type)

    @router.get("/status.json", responses=documented(401))
    async def status() -> dict[str, Any]:
        figures = engine.figures()
        return {
            "time": time.time(),
            "version": tqai.__version__,
            "model": settings.model_name,
            "cache": engine.settings.label,
            "backend": ", ".join(dict.fromkeys(codes.name for codes in engine.store.codes)),
            "max_running": engine.settings.max_running,
            "max_model_len": engine.max_model_len,
            "page_tokens": 64,
            "bf16_bytes_per_token": engine.bf16_bytes_per_token,
            "draining": engine.is_draining,
            **{name: getattr(figures, name) for name in figures.__dataclass_fields__},
        }

    @router.get("/", include_in_schema=False)
    async def home() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY})

    return router
