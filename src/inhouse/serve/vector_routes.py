"""The routes that answer with vectors and scores: texts to inputs, one engine request a call, rows to a body.

Reads top to bottom as a call runs: name the model, make inputs, run them, answer.
"""

import asyncio
import base64
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from inhouse.core.errors import InhouseError, UnsupportedError
from inhouse.engine.request import F32, EmbedEvent, Failed, Input
from inhouse.engine.session import Session
from inhouse.serve.observe import VectorObserver
from inhouse.serve.pool import Pool
from inhouse.serve.vector_schema import (
    ClassifyRequest,
    EmbeddingRequest,
    InputFields,
    RerankRequest,
    ScoreRequest,
)
from inhouse.serve.vector_shapes import Classification, EmbeddingList, Ranking, ScoreList, answers

router = APIRouter(tags=["vectors"])


@router.post("/v1/embeddings", response_model=None, responses=answers(EmbeddingList))
@router.post("/embeddings", include_in_schema=False, response_model=None)
async def embeddings(body: EmbeddingRequest, http: Request) -> Response:
    """The vector of each input. An input that is too long is a 400 unless `truncate` is true."""
    session = _session(http, body.model, "embed")
    inputs = await _prepared(lambda: _inputs(session, body, body.prompt_name), "input")
    rows = await _run(http, session, inputs, "embed")
    if rows is None:
        return _gone()
    vectors = [session.vectors.shortened(row, body.dimensions) for row in rows]
    coded = _base64 if body.encoding_format == "base64" else _floats
    data = [{"object": "embedding", "index": i, "embedding": coded(vector)} for i, vector in enumerate(vectors)]
    answer = {"object": "list", "model": body.model or session.name, "data": data, "usage": _usage(inputs)}
    return JSONResponse(answer)


@router.post("/v1/rerank", response_model=None, responses=answers(Ranking))
@router.post("/rerank", include_in_schema=False, response_model=None)
@router.post("/v2/rerank", include_in_schema=False, response_model=None)
async def rerank(body: RerankRequest, http: Request) -> Response:
    """Documents by how well they answer the query: a cross-encoder's score, or the cosine of two vectors."""
    session = _session(http, body.model, "rerank")
    texts = body.texts()
    inputs = await _prepared(lambda: session.vectors.rerank_inputs(body.query, texts, body.cut()), "documents")
    rows = await _run(http, session, inputs, "rerank")
    if rows is None:
        return _gone()
    relevance = session.vectors.relevance(rows)
    order = sorted(range(len(texts)), key=lambda i: (-relevance[i], i))[: body.top_n]
    results: list[dict[str, Any]] = [{"index": i, "relevance_score": relevance[i]} for i in order]
    if body.return_documents is not False:
        results = [one | {"document": {"text": texts[one["index"]]}} for one in results]
    answer = {"id": f"rerank-{uuid.uuid4().hex}", "model": body.model or session.name, "results": results}
    return JSONResponse(answer | {"usage": _usage(inputs)})


@router.post("/classify", response_model=None, responses=answers(Classification))
@router.post("/v1/classify", include_in_schema=False, response_model=None)
async def classify(body: ClassifyRequest, http: Request) -> Response:
    """The class of each text, or of each of its tokens, with the probability of every label."""
    session = _session(http, body.model, "classify")
    inputs = await _prepared(lambda: _inputs(session, body), "input")
    rows = await _run(http, session, inputs, "classify")
    if rows is None:
        return _gone()
    pairs = zip(inputs, rows, strict=True)
    data = [_classified(session, index, one, session.vectors.answers(row)) for index, (one, row) in enumerate(pairs)]
    answer = _frame("classify", body.model or session.name) | {"labels": list(session.vectors.labels), "data": data}
    return JSONResponse(answer | {"usage": _usage(inputs)})


@router.post("/v1/score", response_model=None, responses=answers(ScoreList))
@router.post("/score", include_in_schema=False, response_model=None)
async def score(body: ScoreRequest, http: Request) -> Response:
    """How well two texts fit each other, pair by pair."""
    session = _session(http, body.model, "rerank")
    vectors, pairs = session.vectors, body.pairs()
    both = vectors.reranks_pairs()

    def make() -> list[Input]:
        if both:
            return [vectors.pair(first, second, body.cut()) for first, second in pairs]
        return [vectors.text(text, None, body.cut()) for pair in pairs for text in pair]

    inputs = await _prepared(make, "text_2")
    rows = await _run(http, session, inputs, "rerank")
    if rows is None:
        return _gone()
    scores = (
        vectors.relevance(rows) if both else [vectors.relevance(rows[i : i + 2])[0] for i in range(0, len(rows), 2)]
    )
    data = [{"object": "score", "index": i, "score": value} for i, value in enumerate(scores)]
    return JSONResponse(_frame("score", body.model or session.name) | {"data": data, "usage": _usage(inputs)})


# ---- from body to rows -----------------------------------------------------------------------------------------------


def _session(http: Request, model: str | None, kind: str) -> Session:
    """The session of that name; a model of another kind is refused, saying what it can do."""
    pool: Pool = http.app.state.pool
    session = pool.get(model)
    if session.engine.adapters.slot(model):
        raise UnsupportedError(
            f"{model!r} is an adapter; vectors and ranks come from models alone",
            remedy=f"Ask {session.name} itself", param="model",
        )  # fmt: skip
    session.vectors.need(kind)
    return session


def _inputs(session: Session, body: InputFields, prompt: str | None = None) -> list[Input]:
    vectors, cut = session.vectors, body.cut()
    return [vectors.text(one, prompt, cut) if isinstance(one, str) else vectors.ids(one, cut) for one in body.inputs()]


async def _prepared(make: Callable[[], list[Input]], field: str) -> list[Input]:
    """Inputs, made outside the event loop; an error of the tokenizer names the field that it came from."""
    try:
        return await asyncio.to_thread(make)
    except InhouseError as error:
        error.param = error.param or field
        raise


async def _run(http: Request, session: Session, inputs: Sequence[Input], kind: str) -> list[F32] | None:
    """The rows of each input, in order; None if the client went away meanwhile. Whatever ends the call ends the
    request in the engine."""
    observer = VectorObserver(http.app.state.metrics, session.name)
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[list[EmbedEvent]]()
    request = session.vectors.request(f"{kind}-{uuid.uuid4().hex}", inputs, kind)
    try:
        session.engine.embed(request, lambda events: _deliver(loop, queue, events))
    except InhouseError as error:
        observer.rejected(error)
        raise
    gone = asyncio.ensure_future(_disconnected(http))
    found: dict[int, F32] = {}
    try:
        while len(found) < len(inputs):
            news = asyncio.ensure_future(queue.get())
            await asyncio.wait({news, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not news.done():
                news.cancel()
                observer.aborted()
                return None
            for event in news.result():
                observer.see(event)
                if isinstance(event, Failed):
                    raise event.error
                found[event.index] = event.values
        return [found[i] for i in range(len(inputs))]
    finally:
        gone.cancel()
        session.engine.cancel(request.id)


def _deliver(
    loop: asyncio.AbstractEventLoop, queue: "asyncio.Queue[list[EmbedEvent]]", events: list[EmbedEvent]
) -> None:
    """Called in the engine's thread; a loop that has closed meanwhile raises, and the engine drops the request."""
    loop.call_soon_threadsafe(queue.put_nowait, events)


async def _disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _gone() -> Response:
    return Response(status_code=499)


# ---- from rows to bodies ---------------------------------------------------------------------------------------------


def _usage(inputs: Sequence[Input]) -> dict[str, int]:
    tokens = sum(len(one.ids) for one in inputs)
    return {"prompt_tokens": tokens, "total_tokens": tokens}


def _floats(vector: F32) -> list[float]:
    return [float(number) for number in vector]


def _base64(vector: F32) -> str:
    """Little-endian float32, as OpenAI's SDKs decode it."""
    return base64.b64encode(np.ascontiguousarray(vector, "<f4").tobytes()).decode("ascii")


def _frame(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"{kind}-{uuid.uuid4().hex}", "object": "list", "created": int(time.time()), "model": model}


def _classified(session: Session, index: int, one: Input, probs: F32) -> dict[str, Any]:
    """One input's entry: a label for the text, or for each token that is not special."""
    labels, tokenizer = session.vectors.labels, session.tokenizer
    entry: dict[str, Any] = {"index": index, "num_classes": len(labels), "label": None, "probs": None, "tokens": None}
    if probs.ndim == 1:
        return entry | {"label": labels[int(probs.argmax())], "probs": _floats(probs)}
    entry["tokens"] = [
        {"token": tokenizer.token_of(token) or "", "label": labels[int(row.argmax())], "probs": _floats(row)}
        for token, row in zip(one.ids, probs, strict=True)
        if token not in tokenizer.special_ids
    ]
    return entry
