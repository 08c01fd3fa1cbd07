"""The two request bodies of the OpenAI protocol, field by field: each is honoured here or refused by name.

Knows JSON shapes and their limits; knows nothing of engines or templates. Extensions that users of other servers
know (top_k, min_p, ...) carry the names that vLLM gave them. A field that is in neither the model nor the table of
refusals is unknown, and an unknown field is an error too.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from inhouse.core.errors import UnsupportedError
from inhouse.engine.request import MAX_BEAMS, MAX_CHOICES, Beams

MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16  # OpenAI allows 4; longer lists are common with local models
MAX_BIASES = 1024

_NOT_BUILT = "this server cannot do it yet"

# Fields of the specification that we understand and cannot honour, with the reason a client is given. A value
# listed under `HARMLESS` asks for nothing and is let pass.
REFUSED: Mapping[str, str] = {
    "audio": "models here write text only",
    "function_call": f"tool calls: {_NOT_BUILT}",
    "functions": f"tool calls: {_NOT_BUILT}",
    "moderation": "no moderation model runs beside the answer",
    "parallel_tool_calls": f"tool calls: {_NOT_BUILT}",
    "prediction": f"predicted outputs: {_NOT_BUILT}",
    "prompt_cache_options": "prefixes are shared automatically and nothing about it can be set",
    "prompt_cache_retention": "prefixes are kept until their memory is needed and no time can be promised",
    "reasoning_effort": "the model has no setting for it; use chat_template_kwargs where its template has one",
    "suffix": f"filling in the middle: {_NOT_BUILT}",
    "tool_choice": f"tool calls: {_NOT_BUILT}",
    "tools": f"tool calls: {_NOT_BUILT}",
    "verbosity": "the model has no setting for it",
    "web_search_options": "this server reaches no network",
}

HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "function_call": (None, "none"),
    "functions": (None, []),
    "parallel_tool_calls": (None,),
    "suffix": (None, ""),
    "tool_choice": (None, "none"),
    "tools": (None, []),
}


# The same for fields of a message; clients send our own answers back, with the nulls and empty lists that SDKs add.
REFUSED_OF_MESSAGE: Mapping[str, str] = {
    "annotations": "answers here cite nothing",
    "audio": "models here read and write text only",
    "function_call": f"tool calls: {_NOT_BUILT}",
    "refusal": "an earlier refusal is to be sent as content",
    "tool_call_id": f"tool calls: {_NOT_BUILT}",
    "tool_calls": f"tool calls: {_NOT_BUILT}",
}

FORMATS_REFUSED = ("json_object", "json_schema")


def refuse_unsupported(body: Any, table: Mapping[str, str] = REFUSED) -> Any:
    """`body` without the fields of a table of refusals; raises UnsupportedError for the first that asks for something.

    Null and the values of HARMLESS ask for nothing; nor does an empty list in a message.
    """
    if not isinstance(body, dict):
        return body
    kept = dict(body)
    for name, reason in table.items():
        if name in kept:
            value = kept.pop(name)
            harmless: tuple[Any, ...] = HARMLESS.get(name, (None,)) if table is REFUSED else (None, [])
            if not any(value is h or (type(value) is type(h) and value == h) for h in harmless):
                raise UnsupportedError(f"the field {name!r} cannot be honoured: {reason}", param=name)
    return kept


class Strict(BaseModel):
    """No coercion, no unknown keys, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


def _only_false(value: bool) -> bool:
    if value:
        raise ValueError("only false can be honoured")
    return value


OnlyFalse = Annotated[bool, AfterValidator(_only_false)]  # Literal[False] would take 0 for it


class StreamOptions(Strict):
    """`include_usage`: one more chunk before the end, with the token counts and no choices."""

    include_usage: bool | None = None
    # Padding against traffic analysis is the transport's matter here; only its absence can be promised.
    include_obfuscation: OnlyFalse | None = None


class ResponseFormat(Strict):
    """Plain text is what every model writes; constrained formats are refused by their type."""

    type: Literal["text"]

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, body: Any) -> Any:
        if isinstance(body, dict) and body.get("type") in FORMATS_REFUSED:
            reason = f"constrained output: {_NOT_BUILT}"
            raise UnsupportedError(f"{body['type']} cannot be honoured: {reason}", param="response_format")
        return body


class TextPart(Strict):
    """One part of a message."""

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, body: Any) -> Any:
        kind = body.get("type") if isinstance(body, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise UnsupportedError(
                f"a part of type {kind!r} cannot be honoured: models here read text only", param="messages"
            )
        return body


class Message(Strict):
    """One message of a chat. `developer` is the newer name of `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, body: Any) -> Any:
        return refuse_unsupported(body, REFUSED_OF_MESSAGE)

    def text(self) -> str:
        """The content as one string; parts stand on lines of their own, as vLLM and llama.cpp have it."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content


TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Stop = str | Annotated[list[str], Field(max_length=MAX_STOPS)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class SamplingFields(Strict):
    """What chat and completion requests share. None means: not given, the model's or the server's default."""

    model: str | None = Field(
        None, description="name, name:version or alias of a model that this server holds; left out: the only one"
    )
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="0: greedy")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(None, description="only with stream: true")
    stop: Stop | None = Field(None, description="text that ends an answer; it is not part of it")
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MAX_BIASES)] | None = Field(
        None, description="token id, as a string, to a number added to its logit"
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = Field(
        None, description="equal seed and request give equal bytes"
    )
    user: str | None = Field(None, description="accepted; nothing is stored about it")
    # Extensions, with vLLM's names.
    top_k: Annotated[int, Field(ge=-1)] | None = Field(None, description="0 or -1: off")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    cache_salt: str | None = Field(None, description="requests share cached prefixes only under an equal salt")
    use_beam_search: bool | None = Field(None, description="search the likeliest outputs instead of drawing one")
    num_beams: Annotated[int, Field(ge=1, le=MAX_BEAMS)] | None = Field(
        None, description="beams of the search; left out: best_of, else n, at least 2"
    )
    best_of: Annotated[int, Field(ge=1, le=MAX_BEAMS)] | None = Field(
        None, description="with use_beam_search: its beams; else only 1"
    )
    length_penalty: Annotated[float, Field(ge=-100, le=100)] | None = Field(
        None, description="beam search: exponent of the length by which a sum of logprobs is divided; default 1"
    )
    early_stopping: bool | Literal["never"] | None = Field(None, description="beam search: when it ends; default false")
    source_language: Annotated[str, Field(min_length=1, max_length=64)] | None = Field(
        None, description="translation models: language of the text, as the model's vocabulary names it"
    )
    target_language: Annotated[str, Field(min_length=1, max_length=64)] | None = Field(
        None, description="translation models: language of the answer"
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, body: Any) -> Any:
        return refuse_unsupported(body)

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> "SamplingFields":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is allowed only when stream is true")
        return self

    @model_validator(mode="after")
    def _beams(self) -> "SamplingFields":
        """What belongs to the search needs it, and what shapes draws or a stream has no place beside it."""
        if not self.use_beam_search:
            given = [
                name for name in ("num_beams", "length_penalty", "early_stopping") if getattr(self, name) is not None
            ]
            if given:
                raise UnsupportedError(f"{given[0]} is for beam search", remedy="Set use_beam_search", param=given[0])
            if self.best_of not in (None, 1):
                raise UnsupportedError(
                    "best_of is for beam search", remedy="Set use_beam_search, or ask for n choices", param="best_of"
                )
            return self
        neutral = {"temperature": (0, 1), "top_p": (1,), "top_k": (-1, 0), "min_p": (0,), "typical_p": (1,)}
        for name, values in neutral.items():
            if getattr(self, name) not in (None, *values):
                raise UnsupportedError(f"{name} shapes draws, beam search makes none", param=name)
        if self.stream:
            raise UnsupportedError(
                "beam search knows its answer only at the end: it cannot be streamed", param="stream"
            )
        return self

    def beams(self) -> Beams | None:
        """The search that is asked for."""
        if not self.use_beam_search:
            return None
        width = self.num_beams or self.best_of or max(self.n or 1, 2)
        penalty = 1.0 if self.length_penalty is None else self.length_penalty
        return Beams(width, penalty, False if self.early_stopping is None else self.early_stopping)

    @property
    def translates(self) -> bool:
        """Whether a language is named."""
        return self.source_language is not None or self.target_language is not None

    def stops(self) -> list[str]:
        """The stop strings as a list; empty ones, which would stop at once, are left out."""
        given = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
        return [text for text in given if text]


class ChatRequest(SamplingFields):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="older name of max_completion_tokens")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: OnlyFalse | None = Field(None, description="nothing is stored")
    metadata: dict[str, str] | None = Field(None, description="accepted; nothing is stored about it")
    safety_identifier: str | None = Field(None, description="accepted; nothing is stored about it")
    prompt_cache_key: str | None = Field(None, description="accepted; prefixes are shared automatically")
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one")
        return self

    def limit(self) -> int | None:
        """Tokens the answer may have; None: what the context leaves."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


Prompt = (
    str
    | Annotated[list[str], Field(min_length=1)]
    | Annotated[list[TokenId], Field(min_length=1)]
    | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
)


class CompletionRequest(SamplingFields):
    """Body of `POST /v1/completions`."""

    prompt: Prompt = Field(description="text, several texts, token ids, or several lists of token ids")
    max_tokens: Annotated[int, Field(ge=0)] | None = Field(None, description="default 16, as the protocol has it")
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = Field(None, description="give the prompt back before the answer")
    add_special_tokens: bool | None = Field(None, description="begin the prompt as the tokenizer says; default true")

    @model_validator(mode="after")
    def _something_to_do(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 makes sense only with echo: true")
        return self

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if isinstance(prompt[0], int):
            return [prompt]
        return prompt
