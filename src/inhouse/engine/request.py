"""The words of the engine's door: what is asked (Request), what comes back (events), and the limits (EngineConfig).

Knows ids only: no text, no user, no socket. Everything here is plain data, checked when it is made.
"""

import math
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from numbers import Real
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import InhouseError, UnsupportedError, UsageError

MAX_CHOICES = 128  # n
MAX_BEAMS = 64
MAX_LOGPROBS = 128  # alternatives a token
MAX_BIAS = 100.0  # |logit_bias|, as OpenAI
MAX_TEMPERATURE = 1e6  # the draw has long been uniform there

F32: TypeAlias = npt.NDArray[np.float32]
Tap: TypeAlias = Callable[[int, npt.NDArray[np.float32]], None]
"""Called in the engine's thread with (position of the first row, logits float32 [rows, vocab]); the array is valid
only during the call. Row i holds the logits that follow position first + i. A request that lost its blocks is run
again, and its first positions come again."""


def _between(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """Raises UsageError unless value is a finite number and low <= value <= high (low < value where open)."""
    if not isinstance(value, Real) or not isinstance(value, int) and not math.isfinite(value):
        raise UsageError(f"{name} is {value!r}, it must be a finite number", remedy=f"Give {name} one", param=name)
    if not (low < value if open_low else low <= value) or value > high:
        allowed = f"at least {low}" if math.isinf(high) else f"within {'(' if open_low else '['}{low}, {high}]"
        raise UsageError(f"{name} is {value!r}, it must be {allowed}", remedy=f"Choose {name} so", param=name)


def _whole(name: str, value: int, low: float, high: float) -> None:
    """The same for integers; raises UsageError for anything else too."""
    if not isinstance(value, int):
        raise UsageError(
            f"{name} is {value!r}, it must be a whole number", remedy=f"Give {name} an integer", param=name
        )
    _between(name, value, low, high)


_OFF = {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}  # penalties that change nothing


@dataclass(frozen=True, slots=True)
class Beams:
    """Beam search in place of draws. `early_stopping`: True: end with the first `width` finished outputs; False: when
    the best beam, at its present length, no longer beats the worst of them; "never": at the greatest length."""

    width: int
    length_penalty: float = 1.0  # exponent of the length that the sum of logprobs is divided by
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        _whole("num_beams", self.width, 1, MAX_BEAMS)
        _between("length_penalty", self.length_penalty, -100, 100)
        if self.early_stopping not in (True, False, "never"):
            raise UsageError('early_stopping is true, false or "never"', param="early_stopping")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn. Ranges are those of the OpenAI API where it has the field, else vLLM's; a value outside
    raises UsageError naming field and range.

    The order of work on a row of logits: logit_bias (with bad words and min_tokens as bans), allowed tokens, grammar
    mask, repetition penalty, frequency and presence penalty, temperature, top_k, min_p, top_p, typical_p, draw.
    Each filter sees the distribution that the one before it left, renormalised.
    """

    temperature: float = 1.0  # 0 (below 1e-5): greedy
    top_k: int = 0  # 0 or -1: off
    top_p: float = 1.0
    min_p: float = 0.0  # of the likeliest token's probability
    typical_p: float = 1.0
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None  # -(2**63)..2**64 - 1, negative ones modulo 2**64; None: the engine draws and tells it
    n: int = 1
    logprobs: int | None = None  # None: no logprobs; k: the token's own and those of the k likeliest
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0  # no stop token before that many
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()  # id sequences that must not appear in the output
    no_repeat_ngram: int = 0  # no run of that many tokens may appear twice, prompt included; 0: off
    first_token: int | None = None  # what the output begins with, whatever the logits (a target language)
    last_token: int | None = None  # what an output that reaches its limit ends with
    beams: Beams | None = None  # search instead of drawing: what shapes the draw then has no effect; n best are given

    def __post_init__(self) -> None:
        _between("temperature", self.temperature, 0, MAX_TEMPERATURE)
        _whole("top_k", self.top_k, -1, math.inf)
        _between("top_p", self.top_p, 0, 1, open_low=True)
        _between("min_p", self.min_p, 0, 1)
        _between("typical_p", self.typical_p, 0, 1, open_low=True)
        _between("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _between("presence_penalty", self.presence_penalty, -2, 2)
        _between("frequency_penalty", self.frequency_penalty, -2, 2)
        _whole("n", self.n, 1, MAX_CHOICES)
        _whole("min_tokens", self.min_tokens, 0, math.inf)
        _whole("no_repeat_ngram", self.no_repeat_ngram, 0, math.inf)
        if self.beams is not None:
            self._check_beams(self.beams)
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.seed is not None:
            _whole("seed", self.seed, -(2**63), 2**64 - 1)
        for value in self.logit_bias.values():
            _between("logit_bias", value, -MAX_BIAS, MAX_BIAS)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise UsageError("allowed_token_ids is empty", remedy="Allow at least one token", param="allowed_token_ids")
        if any(not word for word in self.bad_words):
            raise UsageError("bad_words holds an empty word", remedy="Leave it out", param="bad_words")

    def _check_beams(self, beams: Beams) -> None:
        """Refuses what a search would have to ignore though it is no matter of drawing."""
        _whole("n", self.n, 1, beams.width)
        asked = {
            "logprobs": self.logprobs is not None, "logit_bias": bool(self.logit_bias),
            "repetition_penalty": self.repetition_penalty != 1, "presence_penalty": self.presence_penalty != 0,
            "frequency_penalty": self.frequency_penalty != 0, "allowed_token_ids": self.allowed_token_ids is not None,
        }  # fmt: skip
        for name, given in asked.items():
            if given:
                remedy = f"Where it is the model's default, give {_OFF[name]}" if name in _OFF else ""
                raise UnsupportedError(f"{name} cannot be honoured with beam search", remedy=remedy, param=name)

    @property
    def width(self) -> int:
        """Sequences that run at once: beams, or choices."""
        return self.n if self.beams is None else self.beams.width

    def ids(self) -> Iterable[tuple[str, Iterable[int]]]:
        """(field, ids) of every field that names tokens, so that the engine can check them against its vocabulary."""
        return (
            ("logit_bias", self.logit_bias),
            ("stop_token_ids", self.stop_token_ids),
            ("allowed_token_ids", self.allowed_token_ids or ()),
            ("bad_words", (token for word in self.bad_words for token in word)),
            ("first_token", () if self.first_token is None else (self.first_token,)),
            ("last_token", () if self.last_token is None else (self.last_token,)),
        )


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and what is wanted from it.

    The context rule, the same on every route: a prompt that leaves no room for one token, or an explicit max_tokens
    beyond the room, is a ContextLengthError with both numbers; without max_tokens the room is the limit, and the
    answer that reaches it ends with "length". The room is that of the context, or of the blocks where they hold less.
    min_tokens beyond max_tokens or the room is a UsageError.
    """

    id: str
    prompt: "array[int]"  # token ids, type code "i"
    params: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None  # 0: the prompt is run (scored) and nothing is drawn; None: as many as fit
    prompt_logprobs: int | None = None  # k: logprobs of the prompt's tokens with the k likeliest
    priority: int = 0  # lower is served first
    adapter: int = 0  # LoRA slot; 0: none
    salt: str = ""  # prefixes are shared only between requests of the same salt
    tap: Tap | None = None  # receives the prompt's logits rows, in slices
    encoder: "array[int] | None" = None  # encoder-decoders: ids of the encoder's input; `prompt` begins the decoder

    def __post_init__(self) -> None:
        if not len(self.prompt):
            raise UsageError("the prompt has no tokens", remedy="Give at least one token", param="prompt")
        if self.encoder is not None and not len(self.encoder):
            raise UsageError("the encoder's input has no tokens", remedy="Give at least one token", param="prompt")
        if self.encoder is not None and self.prompt_logprobs is not None:
            raise UsageError("an encoder-decoder has no logprobs of its input", param="logprobs")
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 0, math.inf)
        if self.max_tokens == 0 and self.params.beams is not None:
            raise UsageError("beam search with max_tokens 0", remedy="Nothing is searched", param="max_tokens")
        if self.params.beams is not None and (self.tap is not None or self.prompt_logprobs is not None):
            raise UnsupportedError("logprobs of the prompt cannot be honoured with beam search", param="logprobs")
        if self.max_tokens == 0 and self.params.n > 1:
            raise UsageError(f"n is {self.params.n} with max_tokens 0", remedy="Nothing is drawn; use n 1", param="n")
        least = self.params.min_tokens
        if self.max_tokens is not None and least > self.max_tokens:
            raise UsageError(
                f"min_tokens is {least}, more than max_tokens, which is {self.max_tokens}",
                remedy=f"Choose min_tokens of at most {self.max_tokens}", param="min_tokens",
            )  # fmt: skip
        if self.prompt_logprobs is not None:
            _whole("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)

    @property
    def continued(self) -> Sequence[int]:
        """What the output's text continues: the prompt, or nothing for an encoder-decoder."""
        return self.prompt if self.encoder is None else ()

    @property
    def wants_rows(self) -> bool:
        """True if the logits of every prompt position are needed, so that no prefix may come from the cache."""
        return self.prompt_logprobs is not None or self.tap is not None


def make_request(
    id: str,  # noqa: A002 - the field's name
    prompt: Iterable[int],
    params: SamplingParams | None = None,
    max_tokens: int | None = None,
    prompt_logprobs: int | None = None,
    priority: int = 0,
    adapter: int = 0,
    salt: str = "",
    encoder: Iterable[int] | None = None,
) -> Request:
    """A Request from any iterable of ids; raises UsageError for an id that is no 32-bit integer."""
    try:
        ids = array("i", prompt)
        inputs = None if encoder is None else array("i", encoder)
    except (TypeError, OverflowError) as error:
        raise UsageError(f"the prompt holds something that is no token id ({error})", param="prompt") from error
    return Request(
        id, ids, params or SamplingParams(), max_tokens, prompt_logprobs, priority, adapter, salt, encoder=inputs
    )


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of a token under the raw distribution: softmax of the model's logits before bias,
    penalties, temperature and filters (vLLM's `raw_logprobs`). `rank`: 1 for the likeliest. `top`: the likeliest
    (id, logprob), descending, ties by id."""

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


class FinishReason(StrEnum):
    """Why a choice ended."""

    STOP = "stop"  # a stop token
    LENGTH = "length"  # max_tokens, or the context is full
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one choice. `completion_tokens` counts the stop token, which is in no TokenEvent."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # of the prompt, found in the prefix cache


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds: in the queue, from first scheduled to first token, from first to last token, all in all."""

    queue: float
    prefill: float
    decode: float
    total: float
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class PromptEvent:
    """Logprobs of prompt tokens 1.. (the first has none), sent once, before the first token."""

    request_id: str
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """New tokens of one choice; `logprobs` is empty unless asked for. `time` is that of time.monotonic()."""

    request_id: str
    choice: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    time: float = 0.0


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of one choice; `last` tells that no choice of the request is left. `stop_token`: what ended it, if the
    reason is a stop token; `seed`: what the draws were made from."""

    request_id: str
    choice: int
    reason: FinishReason
    usage: Usage
    timings: Timings
    seed: int
    last: bool
    stop_token: int | None = None
    score: float | None = None  # of beam search: sum of logprobs / length ** length_penalty


@dataclass(frozen=True, slots=True)
class Failed:
    """The end of one choice by an error."""

    request_id: str
    choice: int
    error: InhouseError
    last: bool


@dataclass(frozen=True, slots=True)
class Input:
    """One input of an EmbedRequest: token ids and the token type of each."""

    ids: "array[int]"
    types: "array[int]"


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """Inputs run whole and answered with vectors: `role` of the Program `embed` (`pooled`, `scores`, `hidden`).

    An input of no token, or types of another length, is a UsageError."""

    id: str
    inputs: "tuple[array[int], ...]"  # token ids, type code "i"
    types: "tuple[array[int], ...]" = ()  # token types of each input; (): all 0
    role: str = "pooled"
    priority: int = 0  # lower is served first

    def __post_init__(self) -> None:
        if not self.inputs:
            raise UsageError("there is no input", remedy="Give at least one", param="input")
        if not all(len(ids) for ids in self.inputs):
            raise UsageError("an input has no tokens", remedy="Give each at least one token", param="input")
        if self.types and [len(kinds) for kinds in self.types] != [len(ids) for ids in self.inputs]:
            raise UsageError("token types and inputs differ in length", param="input")

    @property
    def tokens(self) -> int:
        """Tokens of all inputs."""
        return sum(len(ids) for ids in self.inputs)


@dataclass(frozen=True, slots=True)
class Embedded:
    """The answer to one input: float32 [width] of `pooled` or `scores`, [tokens, width] of what has a row a token.
    `last`: no input of the request is left. Inputs may end in any order."""

    request_id: str
    index: int
    values: npt.NDArray[np.float32]
    tokens: int
    timings: Timings
    last: bool


EmbedEvent: TypeAlias = "Embedded | Failed"  # a Failed ends the whole request
EmbedSink: TypeAlias = Callable[[list[EmbedEvent]], None]

Event: TypeAlias = PromptEvent | TokenEvent | Finished | Failed
Sink: TypeAlias = Callable[[list[Event]], None]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits of one engine; each has a unit and a price."""

    context_length: int | None = None  # tokens; None: the model's own, or what of it fits the memory
    max_running: int = 32  # sequences in a step; each may hold a whole context of blocks
    max_queue: int = 1024  # requests that wait, beside those for which max_running leaves a slot
    step_tokens: int = 512  # tokens a step; more: faster prompts, longer pauses between tokens of the others
    logit_rows: int = 64  # rows of logits a step (4 * vocab bytes each); at least max_running is used
    prefix_cache: bool = True
    blocks: Mapping[str, int] | None = None  # blocks of each state group; None: from kv_budget
    kv_budget: int | None = None  # bytes for state; None: contexts of max_running, as memory allows

    def __post_init__(self) -> None:
        for name in ("max_running", "max_queue", "step_tokens", "logit_rows"):
            _whole(name, getattr(self, name), 1, math.inf)
        if self.context_length is not None:
            _whole("context_length", self.context_length, 2, math.inf)
