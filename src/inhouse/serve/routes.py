"""The two routes that generate: body to requests, events to a whole body or a stream.

Reads top to bottom as a request runs: prepare (text to ids, ids to requests), open the call, answer.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from inhouse.core.errors import InhouseError, UsageError
from inhouse.engine.request import MAX_CHOICES, SamplingParams
from inhouse.engine.request import Request as EngineRequest
from inhouse.engine.session import Session, last_message
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
    session = _session(http, body)
    params = sampling_params(body, session.defaults, chat_logprobs(body))
    asked = await asyncio.to_thread(_chat_ids, session, body, params)
    requests = _requests(session, "chatcmpl", [asked], body.limit(), None, body)
    reply = _reply(session, body, requests, chat=True, logprobs=bool(body.logprobs))
    return await _answer(http, session, body, requests, reply)


@router.post("/v1/completions", tags=["generate"], response_model=None, responses=generates(TextCompletion))
@router.post("/completions", include_in_schema=False, response_model=None)
async def completions(body: CompletionRequest, http: Request) -> Response:
    """Continues one or several prompts. The context rule is that of the chat route."""
    session = _session(http, body)
    params = sampling_params(body, session.defaults, body.logprobs)
    asked = await asyncio.to_thread(_prompt_ids, session, body, params)
    limit = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    scored = body.logprobs if body.echo and body.logprobs is not None else None
    requests = _requests(session, "cmpl", asked, limit, scored, body)
    prompts = [one.ids for one in asked]
    reply = _reply(session, body, requests, chat=False, logprobs=body.logprobs is not None)
    reply.echo = echo_texts(body, session.tokenizer, prompts)
    reply.echo_ids = [p for p in prompts for _ in range(params.n)]
    return await _answer(http, session, body, requests, reply)


def _session(http: Request, body: SamplingFields) -> Session:
    """The session that the body names; a model that writes no text is refused, saying what it can do."""
    pool: Pool = http.app.state.pool
    session = pool.get(body.model)
    session.vectors.need("generate")
    return session


@dataclass(frozen=True, slots=True)
class _Asked:
    """One prompt with the parameters of its answer; `start`: what the decoder begins with, where a language says."""

    ids: list[int]
    params: SamplingParams
    start: int | None = None


def _chat_ids(session: Session, body: ChatRequest, params: SamplingParams) -> _Asked:
    messages = [
        {"role": "system" if m.role == "developer" else m.role, "content": m.text()}
        | ({"name": m.name} if m.name else {})
        for m in body.messages
    ]
    add = True if body.add_generation_prompt is None else body.add_generation_prompt
    with _naming("messages"):
        if body.translates:
            return _translated(session, body, last_message(messages), params)
        ids = session.chat_ids(messages, add_generation_prompt=add, template_kwargs=body.chat_template_kwargs)
        return _Asked(ids, params)


def _prompt_ids(session: Session, body: CompletionRequest, params: SamplingParams) -> list[_Asked]:
    add = body.add_special_tokens is not False
    with _naming("prompt"):
        if body.translates:
            return [_translated(session, body, prompt, params) for prompt in body.prompts()]
        ids = [session.prompt_ids(p, add_special=add) if isinstance(p, str) else p for p in body.prompts()]
        return [_Asked(prompt, params) for prompt in ids]


def _translated(session: Session, body: SamplingFields, text: str | list[int], params: SamplingParams) -> _Asked:
    if not isinstance(text, str):
        raise UsageError("a translation is asked for with text, not token ids", param="prompt")
    return _Asked(*session.translate(text, body.source_language, body.target_language, params))


_NAMED = ("chat_template_kwargs", "source_language", "target_language")


@contextmanager
def _naming(field: str) -> Iterator[None]:
    """Gives an error of the tokenizer or template the name of the field that it came from."""
    try:
        yield
    except InhouseError as error:
        error.param = error.param if error.param in _NAMED else field
        raise


def _requests(
    session: Session,
    prefix: str,
    asked: Sequence[_Asked],
    max_tokens: int | None,
    prompt_logprobs: int | None,
    body: SamplingFields,
) -> list[EngineRequest]:
    """One engine request a prompt; choices beyond the limit of a call are refused."""
    if len(asked) * asked[0].params.n > MAX_CHOICES:
        many = f"{len(asked)} prompts with n = {asked[0].params.n}"
        raise UsageError(f"{many} make more than {MAX_CHOICES} choices", remedy="Send several calls", param="n")
    name, slot = f"{prefix}-{uuid.uuid4().hex}", session.engine.adapters.slot(body.model)
    return [
        session.request(
            f"{name}-{i}" if i else name,
            one.ids,
            one.params,
            max_tokens,
            prompt_logprobs,
            body.cache_salt or "",
            one.start,
            slot,
        )  # fmt: skip
        for i, one in enumerate(asked)
    ]


def _reply(
    session: Session, body: SamplingFields, requests: Sequence[EngineRequest], *, chat: bool, logprobs: bool
) -> Reply:
    return Reply(
        id=requests[0].id,
        model=body.model or session.name,
        fingerprint=session.fingerprint(body.model),
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
