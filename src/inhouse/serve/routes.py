"""The two routes that generate: body to requests, events to a whole body or a stream.

Reads top to bottom as a request runs: prepare (text to ids, ids to requests), open the call, answer.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from inhouse.core.errors import InhouseError, UsageError
from inhouse.engine.request import MAX_CHOICES, SamplingParams, make_request
from inhouse.engine.request import Request as EngineRequest
from inhouse.engine.session import Session
from inhouse.engine.text import TextFailed
from inhouse.serve.calls import Call
from inhouse.serve.observe import CallObserver
from inhouse.serve.openai import (
    DEFAULT_COMPLETION_TOKENS,
    Reply,
    chat_logprobs,
    echo_texts,
    error_body,
    sampling_params,
    sse,
)
from inhouse.serve.pool import Pool
from inhouse.serve.schema import ChatRequest, CompletionRequest, SamplingFields
from inhouse.serve.shapes import ChatCompletion, TextCompletion, generates

router = APIRouter()


@router.post("/v1/chat/completions", tags=["generate"], response_model=None, responses=generates(ChatCompletion))
@router.post("/chat/completions", include_in_schema=False, response_model=None)
async def chat_completions(body: ChatRequest, http: Request) -> Response:
    """Answers a chat. `max_tokens` beyond the room that the prompt leaves is a 400 with both numbers."""
    session = _pool(http).get(body.model)
    params = sampling_params(body, session.defaults, chat_logprobs(body))
    prompt = await asyncio.to_thread(_chat_ids, session, body)
    requests = _requests("chatcmpl", [prompt], params, body.limit(), None, body.cache_salt)
    reply = _reply(session, body, requests, chat=True, logprobs=bool(body.logprobs))
    return await _answer(http, session, body, requests, reply)


@router.post("/v1/completions", tags=["generate"], response_model=None, responses=generates(TextCompletion))
@router.post("/completions", include_in_schema=False, response_model=None)
async def completions(body: CompletionRequest, http: Request) -> Response:
    """Continues one or several prompts. The context rule is that of the chat route."""
    session = _pool(http).get(body.model)
    params = sampling_params(body, session.defaults, body.logprobs)
    prompts = await asyncio.to_thread(_prompt_ids, session, body)
    limit = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    scored = body.logprobs if body.echo and body.logprobs is not None else None
    requests = _requests("cmpl", prompts, params, limit, scored, body.cache_salt)
    reply = _reply(session, body, requests, chat=False, logprobs=body.logprobs is not None)
    reply.echo = echo_texts(body, session.tokenizer, prompts)
    reply.echo_ids = [p for p in prompts for _ in range(params.n)]
    return await _answer(http, session, body, requests, reply)


def _pool(http: Request) -> Pool:
    pool: Pool = http.app.state.pool
    return pool


def _chat_ids(session: Session, body: ChatRequest) -> list[int]:
    messages = [
        {"role": "system" if m.role == "developer" else m.role, "content": m.text()}
        | ({"name": m.name} if m.name else {})
        for m in body.messages
    ]
    add = True if body.add_generation_prompt is None else body.add_generation_prompt
    with _naming("messages"):
        return session.chat_ids(messages, add_generation_prompt=add, template_kwargs=body.chat_template_kwargs)


def _prompt_ids(session: Session, body: CompletionRequest) -> list[list[int]]:
    add = body.add_special_tokens is not False
    with _naming("prompt"):
        return [session.prompt_ids(p, add_special=add) if isinstance(p, str) else p for p in body.prompts()]


@contextmanager
def _naming(field: str) -> Iterator[None]:
    """Gives an error of the tokenizer or template the name of the field that it came from."""
    try:
        yield
    except InhouseError as error:
        error.param = error.param if error.param in ("chat_template_kwargs",) else field
        raise


def _requests(
    prefix: str,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    max_tokens: int | None,
    prompt_logprobs: int | None,
    salt: str | None,
) -> list[EngineRequest]:
    """One engine request a prompt; choices beyond the limit of a call are refused."""
    if len(prompts) * params.n > MAX_CHOICES:
        asked = f"{len(prompts)} prompts with n = {params.n}"
        raise UsageError(f"{asked} make more than {MAX_CHOICES} choices", remedy="Send several calls", param="n")
    name = f"{prefix}-{uuid.uuid4().hex}"
    return [
        make_request(f"{name}-{i}" if i else name, prompt, params, max_tokens, prompt_logprobs, salt=salt or "")
        for i, prompt in enumerate(prompts)
    ]


def _reply(
    session: Session, body: SamplingFields, requests: Sequence[EngineRequest], *, chat: bool, logprobs: bool
) -> Reply:
    return Reply(
        id=requests[0].id,
        model=body.model or session.name,
        fingerprint=session.fingerprint,
        tokenizer=session.tokenizer,
        chat=chat,
        choices=len(requests) * (body.n or 1),
        prompts=len(requests),
        logprobs=logprobs,
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
    )


async def _answer(
    http: Request, session: Session, body: SamplingFields, requests: list[EngineRequest], reply: Reply
) -> Response:
    """Runs the call: as a stream if asked, else to its end, watching for a client that goes away."""
    observer = CallObserver(http.app.state.metrics, session.name, requests, time.monotonic())
    call = Call(
        session,
        requests,
        body.stops(),
        skip_special=body.skip_special_tokens is not False,
        include_stop=bool(body.include_stop_str_in_output),
    )
    try:
        call.open()
    except InhouseError as error:
        observer.rejected(error)
        error.param = error.param or ("messages" if reply.chat else "prompt")
        raise
    if body.stream:
        return StreamingResponse(
            _stream(call, reply, observer),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
    return await _whole(http, call, reply, observer)


async def _whole(http: Request, call: Call, reply: Reply, observer: CallObserver) -> Response:
    """The whole body, or nothing for a client that has gone away meanwhile."""

    async def run() -> dict[str, Any]:
        async for index, choice, event in call.events():
            observer.see(index, event)
            reply.take(reply.position(index, choice), event)
        return reply.whole()

    work = asyncio.ensure_future(run())
    gone = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            return Response(status_code=499)
        return JSONResponse(work.result())
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)
        observer.aborted(call.close())


async def _disconnected(http: Request) -> None:
    """Returns when the client has closed the connection."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _stream(call: Call, reply: Reply, observer: CallObserver) -> AsyncIterator[bytes]:
    """The events of a stream. An error after the first byte is a data event, as the SDKs expect."""
    try:
        async for index, choice, event in call.events():
            observer.see(index, event)
            if isinstance(event, TextFailed):
                yield sse(error_body(event.error))
                return
            for chunk in reply.chunks(reply.position(index, choice), event):
                yield sse(chunk)
        if reply.include_usage:
            yield sse(reply.usage_chunk())
        yield sse("[DONE]")
    finally:
        observer.aborted(call.close())
