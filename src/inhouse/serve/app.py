"""Composition: routes, the order of middleware, the one table that turns errors into wire shapes, start and drain.

No page and no document here loads anything from a foreign host: the interactive documentation pages, which would,
are off; the OpenAPI document itself is at /openapi.json.
"""

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from inhouse.core.errors import InhouseError, UsageError
from inhouse.core.settings import Settings
from inhouse.serve import adapters
from inhouse.serve import metrics as prometheus
from inhouse.serve.observe import observe_engine, watch_steps
from inhouse.serve.openai import error_body
from inhouse.serve.pool import Pool
from inhouse.serve.routes import router
from inhouse.serve.schema import (
    ChatRequest,
    CompletionRequest,
    Message,
    ResponseFormat,
    StreamOptions,
    TextPart,
)
from inhouse.serve.shapes import ModelCard, ModelList, Refreshed, Status, describe, errors
from inhouse.serve.vector_routes import router as vector_router
from inhouse.serve.vector_schema import ClassifyRequest, Document, EmbeddingRequest, RerankRequest, ScoreRequest

MAX_BODY = 32 * 1024 * 1024  # bytes; 8 million tokens of text, far beyond any context
OPEN_PATHS = ("/health", "/ready")  # probes need no key

FIELDS = frozenset(
    name
    for model in (
        ChatRequest,
        CompletionRequest,
        Message,
        TextPart,
        StreamOptions,
        ResponseFormat,
        EmbeddingRequest,
        RerankRequest,
        ClassifyRequest,
        ScoreRequest,
        Document,
        adapters.LoadAdapter,
        adapters.UnloadAdapter,
    )
    for name in model.model_fields
)

log = logging.getLogger("inhouse.serve")


def create_app(pool: Pool, settings: Settings) -> FastAPI:
    """The ASGI application over the pool's models."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        pool.close()

    app = FastAPI(title="Inhouse", version="1", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.pool = pool
    app.state.metrics = prometheus.Metrics(settings.metrics_prefix)
    for session in pool.sessions().values():
        watch_steps(app.state.metrics, session)
    app.include_router(router)
    app.include_router(vector_router)
    app.include_router(adapters.routes(pool, settings.adapter_folder))
    app.include_router(_status_routes(pool))
    _add_error_table(app)
    app.openapi = lambda: describe(app)  # type: ignore[method-assign]
    app.add_middleware(_Gate, api_key=settings.api_key)
    if settings.cors_origins:
        origins = [origin.strip() for origin in settings.cors_origins.split(",") if origin.strip()]
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    return app


def _status_routes(pool: Pool) -> APIRouter:
    """Models, health, readiness and metrics."""
    status = APIRouter()

    def card(name: str, created: int) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": created, "owned_by": "inhouse"} | pool.sessions()[
            name
        ].facts()

    @status.get("/v1/models", tags=["models"], response_model=ModelList, responses=errors(401))
    @status.get("/models", include_in_schema=False)
    async def list_models() -> dict[str, Any]:
        """The models that this server holds."""
        loaded = pool.names()
        cards = [card(name, created) for name, created in loaded.items()]
        for name, (base, info) in pool.adapters().items():
            cards.append(card(base, loaded[base]) | {"id": name, "parent": base, "adapter_rank": info.rank})
        return {"object": "list", "data": cards}

    @status.get("/v1/models/{name:path}", tags=["models"], response_model=ModelCard, responses=errors(401, 404, 503))
    async def show_model(name: str) -> dict[str, Any]:
        """One model, by the name that requests use."""
        session = pool.get(name)
        key = next(k for k, s in pool.sessions().items() if s is session)
        shown = card(key, pool.names()[key])
        adapter = session.engine.adapters.table().get(name)
        return shown | {"id": name, "parent": key, "adapter_rank": adapter.rank} if adapter else shown

    @status.post("/v1/refresh_models", tags=["models"], response_model=Refreshed,
                 responses=errors(401, 404, 429, 503))  # fmt: skip
    async def refresh_models(http: Request) -> dict[str, Any]:
        """Looks again which versions the served names mean (an alias was moved, a version was added) and serves those;
        answers that run end as they began. Returns what was replaced."""
        watch = partial(watch_steps, http.app.state.metrics)
        replaced = await asyncio.to_thread(pool.refresh, watch)
        return {"replaced": [asdict(entry) for entry in replaced]}

    @status.get("/health", tags=["status"], response_model=Status)
    async def health() -> dict[str, str]:
        """The process lives."""
        return {"status": "ok"}

    @status.get("/ready", tags=["status"], response_model=Status, responses={503: {"model": Status}})
    async def ready() -> Response:
        """Requests are served: 200; while starting or draining, or when an engine is damaged for good: 503."""
        damaged = [name for name, session in pool.sessions().items() if session.engine.error is not None]
        state = "ready"
        if pool.draining:
            state = "draining"
        elif damaged:
            state = f"damaged: {', '.join(damaged)}"
        elif not pool.sessions():
            state = "starting"
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    @status.get("/metrics", tags=["status"], response_class=PlainTextResponse, responses=errors(401))
    async def metrics(http: Request) -> Response:
        """Prometheus text."""
        for session in pool.sessions().values():
            observe_engine(http.app.state.metrics, session)
        return Response(http.app.state.metrics.render(), media_type=prometheus.CONTENT_TYPE)

    return status


def _add_error_table(app: FastAPI) -> None:
    """Every error leaves in the protocol's shape, with its class's status."""

    @app.exception_handler(InhouseError)
    async def ours(request: Request, error: InhouseError) -> Response:
        headers = {"Retry-After": "1"} if error.http_status in (429, 503) else {}
        return JSONResponse(error_body(error), error.http_status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return JSONResponse(error_body(_explain(error)), 400)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        plain = InhouseError("the body is not JSON in UTF-8" if error.status_code == 400 else str(error.detail))
        body = error_body(plain)
        body["error"] |= {"code": f"http_{error.status_code}", "type": "invalid_request_error"}
        return JSONResponse(body, error.status_code, getattr(error, "headers", None))

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        log.exception("unforeseen error in %s %s", request.method, request.url.path)
        return JSONResponse(error_body(InhouseError("an unforeseen error; the server's log has the trace")), 500)


def _explain(error: RequestValidationError) -> UsageError:
    """The first fault of a body, with the path of the field that has it."""
    faults = error.errors()
    first = faults[0]
    path = _path(first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return UsageError(f"unknown field {path!r}", remedy="Fields are listed in /openapi.json", param=path)
    if first["type"] == "json_invalid":
        return UsageError(f"the body is not JSON: {first.get('ctx', {}).get('error', message)}")
    if not path and first["type"] == "missing":
        return UsageError("the body is empty", remedy="Send a JSON object")
    if not path and first["type"] in ("model_attributes_type", "model_type"):
        return UsageError(
            "the body is no JSON object", remedy="Send one, with the header Content-Type: application/json"
        )
    if sum(_path(fault["loc"]) == path for fault in faults) > 1:  # a union: no branch fits
        message = "the value has none of the allowed shapes"
    if not path:  # a rule over several fields; its message begins with the one to blame
        path = message.split(" ", 1)[0]
        return UsageError(message, param=path if path in FIELDS else None)
    return UsageError(f"{path}: {message}", param=path)


def _path(location: Sequence[int | str]) -> str:
    """`messages.0.content`: where a fault is, without the names that pydantic gives to branches of a union."""
    return ".".join(str(part) for part in location if isinstance(part, int) or part in FIELDS or _is_unknown(part))


def _is_unknown(part: str) -> bool:
    """Whether a part of a location is a name that the client wrote, rather than one of pydantic's own."""
    return part != "body" and part not in ("str", "int", "float", "bool") and "[" not in part and "-" not in part


class _Gate:
    """Plain ASGI middleware: refuses bodies that are too long and, where a key is set, callers without it."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app, self._key = app, api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if not self._may_pass(scope, headers):
            refusal = _refusal("a valid API key is needed", "Send it as `Authorization: Bearer KEY`", "invalid_api_key")
            await JSONResponse(refusal, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
            return
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > MAX_BODY:
            await _too_long(int(length))(scope, receive, send)
            return
        await self._app(scope, _bounded(receive), send)

    def _may_pass(self, scope: Scope, headers: dict[bytes, bytes]) -> bool:
        if not self._key or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return True
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        return kind.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._key)


def _refusal(message: str, remedy: str, code: str) -> dict[str, Any]:
    body = error_body(UsageError(message, remedy=remedy))
    body["error"]["code"] = code
    return body


def _too_long(length: int) -> JSONResponse:
    message = f"the body has {length} bytes, at most {MAX_BODY} are taken"
    return JSONResponse(_refusal(message, "Send less text", "body_too_long"), 413)


def _bounded(receive: Receive) -> Receive:
    """`receive` that fails once a body sent without a length has grown beyond the limit."""
    seen = 0

    async def bounded() -> Any:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > MAX_BODY:
            raise HTTPException(413, f"the body has more than {MAX_BODY} bytes")
        return message

    return bounded
