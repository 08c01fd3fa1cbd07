"""The OpenAI protocol: request bodies to sampling parameters, text events to response bodies. Pure functions of values.

Knows the protocol's field names and nothing of HTTP, engines' threads or metrics. Shapes follow the published
OpenAPI document (2.3.0); what the SDKs rely on stands in docs/server.md.
"""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from inhouse.core.errors import InhouseError, UsageError
from inhouse.engine.request import PromptEvent, SamplingParams, TokenLogprob, Usage
from inhouse.engine.text import TextDelta, TextEnd, TextEvent, TextFailed
from inhouse.model.tokens.detokenize import Detokenizer
from inhouse.model.tokens.tokenizer import Tokenizer
from inhouse.serve.schema import ChatRequest, CompletionRequest, SamplingFields

DEFAULT_COMPLETION_TOKENS = 16  # the protocol's own default for /v1/completions


def sampling_params(body: SamplingFields, defaults: SamplingParams, logprobs: int | None) -> SamplingParams:
    """The engine's parameters: what the body gives, else the model's defaults. Raises UsageError by field."""

    def pick(name: str) -> Any:
        given = getattr(body, name)
        return getattr(defaults, name) if given is None else given

    return replace(
        defaults,
        temperature=pick("temperature"),
        top_k=pick("top_k"),
        top_p=pick("top_p"),
        min_p=pick("min_p"),
        typical_p=pick("typical_p"),
        repetition_penalty=pick("repetition_penalty"),
        presence_penalty=pick("presence_penalty"),
        frequency_penalty=pick("frequency_penalty"),
        logit_bias=_biases(body.logit_bias),
        seed=body.seed,
        n=body.n or 1,
        logprobs=logprobs,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        min_tokens=pick("min_tokens"),
        beams=body.beams(),
    )


def _biases(given: Mapping[str, float] | None) -> dict[int, float]:
    biases = {}
    for key, value in (given or {}).items():
        if not key.isascii() or not key.isdigit() or len(key) > 10:
            raise UsageError(f"logit_bias names {key!r}, which is no token id", param="logit_bias")
        biases[int(key)] = value
    return biases


def chat_logprobs(body: ChatRequest) -> int | None:
    """How many alternatives a token's logprobs list; None: no logprobs wanted."""
    return (body.top_logprobs or 0) if body.logprobs else None


def error_body(error: InhouseError) -> dict[str, Any]:
    """The protocol's error object; the SDKs map the HTTP status to a class and show the message."""
    kind = "invalid_request_error" if 400 <= error.http_status < 500 else "server_error"
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code, **error.details}}


def usage_body(usages: Iterable[Usage], prompts: int) -> dict[str, Any]:
    """Token counts of a whole call: each of `prompts` prompts once, every choice's tokens."""
    counted = list(usages)
    per_prompt = max(1, len(counted) // max(1, prompts))
    firsts = counted[::per_prompt]
    prompt, completion = sum(u.prompt_tokens for u in firsts), sum(u.completion_tokens for u in counted)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(u.cached_tokens for u in firsts)},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def _token_text(tokenizer: Tokenizer, token: int) -> tuple[str, list[int]]:
    data = tokenizer.token_bytes(token)
    return data.decode("utf-8", "replace"), list(data)


def _chat_logprob(tokenizer: Tokenizer, entry: TokenLogprob) -> dict[str, Any]:
    def one(token: int, logprob: float) -> dict[str, Any]:
        text, data = _token_text(tokenizer, token)
        return {"token": text, "logprob": logprob, "bytes": data}

    return one(entry.token, entry.logprob) | {"top_logprobs": [one(t, p) for t, p in entry.top]}


def chat_logprobs_body(tokenizer: Tokenizer, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    """`choices[].logprobs` of the chat route."""
    return {"content": [_chat_logprob(tokenizer, entry) for entry in entries], "refusal": None}


def _exact_text(tokenizer: Tokenizer, token: int) -> str:
    """A token's text, or its bytes spelled out where they are no text, so that two tokens never look alike."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def completion_logprobs_body(
    tokenizer: Tokenizer, entries: Sequence[TokenLogprob | int], offsets: Sequence[int]
) -> dict[str, Any]:
    """`choices[].logprobs` of the completion route; an int stands for a token without one (the prompt's first).
    `offsets`: the character of the choice's text at which each token begins."""
    body: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": list(offsets)}
    for entry in entries:
        token = entry if isinstance(entry, int) else entry.token
        text = _exact_text(tokenizer, token)
        body["tokens"].append(text)
        if isinstance(entry, int):
            body["token_logprobs"].append(None)
            body["top_logprobs"].append(None)
            continue
        body["token_logprobs"].append(entry.logprob)
        top = {_exact_text(tokenizer, t): p for t, p in entry.top}
        body["top_logprobs"].append(top | {text: entry.logprob} if entry.top else None)
    return body


@dataclass(slots=True)
class _ChoiceState:
    """What one choice of a reply has so far."""

    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob | int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)  # of their texts, the echo's characters before them included
    end: TextEnd | None = None
    started: bool = False


@dataclass(slots=True)
class Reply:
    """Builds the bodies of one call, streamed or whole, chat or completion.

    Args:
        id, model, fingerprint: as they stand in every body.
        tokenizer: of the model that answers.
        chat: which of the two shapes.
        choices: how many choices there will be.
        prompts: how many prompts these choices answer.
        logprobs: whether they are wanted.
        echo: prompts to give back, one a choice (completion route only).
        echo_ids: their token ids, for logprobs of the echo.
    """

    id: str
    model: str
    fingerprint: str
    tokenizer: Tokenizer
    chat: bool
    choices: int
    prompts: int = 1
    logprobs: bool = False
    include_usage: bool = False
    echo: Sequence[str] = ()
    echo_ids: Sequence[Sequence[int]] = ()
    created: int = field(default_factory=lambda: int(time.time()))
    _states: dict[int, _ChoiceState] = field(default_factory=dict)

    def position(self, request: int, choice: int) -> int:
        """The index, in the body, of a choice of one of the call's requests."""
        return request * (self.choices // self.prompts) + choice

    def _state(self, index: int) -> _ChoiceState:
        return self._states.setdefault(index, _ChoiceState())

    @property
    def done(self) -> bool:
        """True once every choice has ended."""
        return len(self._states) == self.choices and all(s.end is not None for s in self._states.values())

    def whole(self) -> dict[str, Any]:
        """The body of an unstreamed answer; to be called when `done`."""
        choices = [self._whole_choice(i) for i in range(self.choices)]
        kind = "chat.completion" if self.chat else "text_completion"
        return self._frame(kind) | {"choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Token counts over all choices that have ended."""
        ends = [self._states[i].end for i in sorted(self._states)]
        return usage_body([end.usage for end in ends if end is not None], self.prompts)

    def take(self, index: int, event: TextEvent) -> None:
        """Records an event of choice `index` for `whole`. A failed choice raises its error."""
        state = self._state(index)
        if isinstance(event, TextFailed):
            raise event.error
        if isinstance(event, TextDelta):
            state.text.append(event.text)
            state.logprobs += event.logprobs
            state.offsets += self._shifted(index, event.offsets)
        elif isinstance(event, TextEnd):
            state.end = event
        elif isinstance(event, PromptEvent) and self.echo:
            state.logprobs += [*self.echo_ids[index][:1], *event.logprobs]
            state.offsets += _offsets(self.tokenizer, self.echo_ids[index])

    def chunks(self, index: int, event: TextEvent) -> list[dict[str, Any]]:
        """The stream chunks that an event gives: the role first, text as it comes, one with the finish reason."""
        state = self._state(index)
        out = []
        if not state.started and not isinstance(event, TextFailed | PromptEvent):
            state.started = True
            out += self._opening(index, state)
        self.take(index, event)
        if isinstance(event, TextDelta) and (event.text or event.logprobs):
            offsets = self._shifted(index, event.offsets)
            out.append(self._delta_chunk(index, event.text, self._logprobs(event.logprobs, offsets)))
        elif isinstance(event, TextEnd):
            out.append(self._delta_chunk(index, "", None, event.reason))
        return out

    def usage_chunk(self) -> dict[str, Any]:
        """The chunk before [DONE] that carries the token counts and no choices."""
        return self._frame(self._chunk_kind()) | {"choices": [], "usage": self.usage()}

    def _opening(self, index: int, state: _ChoiceState) -> list[dict[str, Any]]:
        if self.chat:
            delta = {"role": "assistant", "content": "", "refusal": None}
            return [self._chunk({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})]
        if self.echo:
            logprobs = (
                completion_logprobs_body(self.tokenizer, state.logprobs, state.offsets) if self.logprobs else None
            )
            return [self._delta_chunk(index, self.echo[index], logprobs)]
        return []

    def _shifted(self, index: int, offsets: Sequence[int]) -> list[int]:
        """Offsets in the answer as offsets in the choice's text, which the echo may begin."""
        before = len(self.echo[index]) if self.echo else 0
        return [before + offset for offset in offsets]

    def _logprobs(self, entries: Sequence[TokenLogprob], offsets: Sequence[int]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        if self.chat:
            return chat_logprobs_body(self.tokenizer, entries)
        return completion_logprobs_body(self.tokenizer, entries, offsets)

    def _whole_choice(self, index: int) -> dict[str, Any]:
        state = self._state(index)
        text, reason = "".join(state.text), state.end.reason if state.end is not None else None
        if self.chat:
            entries = [e for e in state.logprobs if isinstance(e, TokenLogprob)]
            logprobs = chat_logprobs_body(self.tokenizer, entries) if self.logprobs else None
            message = {"role": "assistant", "content": text, "refusal": None}
            return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}
        if self.echo:
            text = self.echo[index] + text
        logprobs = completion_logprobs_body(self.tokenizer, state.logprobs, state.offsets) if self.logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _delta_chunk(
        self, index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None = None
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "logprobs": logprobs, "finish_reason": reason}
        if self.chat:
            choice["delta"] = {} if reason is not None else {"content": text}
        else:
            choice["text"] = text
        return self._chunk(choice)

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        usage: dict[str, Any] = {"usage": None} if self.include_usage else {}
        return self._frame(self._chunk_kind()) | {"choices": [choice]} | usage

    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _frame(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.model,
            "system_fingerprint": self.fingerprint,
        }  # fmt: skip


def _offsets(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """The character at which each id's text begins; ids of one split character share theirs."""
    detokenizer, begins, length = Detokenizer(tokenizer), [], 0
    for token in ids:
        begins.append(length)
        length += len(detokenizer.push([token]))
    return begins


def sse(body: Mapping[str, Any] | str) -> bytes:
    """One server-sent event; a str is sent as it is ([DONE])."""
    text = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


def echo_texts(body: CompletionRequest, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]]) -> list[str]:
    """The prompts as text, one for each choice, where echo is asked for."""
    if not body.echo:
        return []
    given = body.prompts()
    texts = [g if isinstance(g, str) else tokenizer.decode(p) for g, p in zip(given, prompts, strict=True)]
    return [text for text in texts for _ in range(body.n or 1)]
