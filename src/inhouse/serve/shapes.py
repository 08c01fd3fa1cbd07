"""The shapes of what the server answers, for its OpenAPI document; requests are in `schema`.

The bodies are built as plain dicts by `openai`; a test holds them against these models.
"""

from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict


class Shape(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorFields(BaseModel):
    """What went wrong; further keys hold the numbers that the message names."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str


class ErrorBody(Shape):
    error: ErrorFields


class PromptDetails(Shape):
    cached_tokens: int


class CompletionDetails(Shape):
    reasoning_tokens: int


class UsageBody(Shape):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class TokenShape(Shape):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenShape(TokenShape):
    top_logprobs: list[TokenShape]


class ChatLogprobs(Shape):
    content: list[ChatTokenShape]
    refusal: None


class AnswerMessage(Shape):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Shape):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class _Answer(Shape):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: UsageBody


class ChatCompletion(_Answer):
    """An unstreamed answer of the chat route; streamed ones are `chat.completion.chunk` events."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextLogprobs(Shape):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(Shape):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class TextCompletion(_Answer):
    """An unstreamed answer of the completion route."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class ModelCard(Shape):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    version: int
    max_model_len: int
    executor: str
    kv_dtype: str
    kinds: list[str]  # of generate, embed, rerank, classify
    parent: str | None = None  # of an adapter: the model that it changes
    adapter_rank: int | None = None


class ModelList(Shape):
    object: Literal["list"]
    data: list[ModelCard]


class Adapter(Shape):
    """A LoRA adapter that was loaded or unloaded."""

    id: str
    rank: int
    bytes: int
    loaded: bool


class ReplacedModel(Shape):
    """A model of which another version is served now."""

    name: str
    before: str
    now: str


class Refreshed(Shape):
    replaced: list[ReplacedModel]


class Status(Shape):
    status: str


_GENERATING = {
    400: "the request is wrong, too long, or asks for what cannot be honoured",
    401: "no or wrong API key",
    404: "no such model",
    409: "the name is taken",
    413: "the body is too long",
    429: "the queue or the memory for state is full",
    500: "a step failed",
    503: "starting, draining or damaged",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses=` entries for these statuses (default: those of the generating routes)."""
    return {
        code: {"model": ErrorBody, "description": _GENERATING[code]}
        for code in statuses or (code for code in _GENERATING if code != 409)
    }


def generates(shape: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """`responses=` of a generating route: its whole body, or a stream of events, or an error."""
    stream: dict[str, Any] = {"text/event-stream": {}}  # events of chunks, see docs/server.md
    return {200: {"model": shape, "content": stream, "description": "the answer, whole or as a stream"}} | errors()


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, without the 422 that FastAPI assumes: invalid bodies are 400 here, as clients expect."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for unused in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(unused, None)
        app.openapi_schema = document
    return app.openapi_schema
