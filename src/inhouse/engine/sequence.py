"""One sequence: its tokens, how many of them are computed, what it holds and what it was given.

    tokens:  |<------- prompt ------->|<-- output -->|
             |<-- computed -->|<---- remaining ----->|      remaining is 1 while decoding

Knows no tensors and no scheduling; the scheduler moves it from state to state.
"""

from array import array
from dataclasses import dataclass, field
from enum import StrEnum

from inhouse.engine.beams import BeamGroup, Candidates
from inhouse.engine.blocks import BlockKey, Tables, next_key
from inhouse.engine.encoders import Encoding
from inhouse.engine.recipe import Recipe
from inhouse.engine.request import FinishReason, Request, Timings, TokenLogprob, Usage
from inhouse.runtime.step import BLOCK_SIZE


class Status(StrEnum):
    """Where a sequence is."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True)
class Clock:
    """Moments of a sequence, time.monotonic() seconds; 0 where not yet reached."""

    arrival: float = 0.0
    scheduled: float = 0.0
    first_token: float = 0.0

    def timings(self, now: float, preemptions: int) -> Timings:
        scheduled, first = self.scheduled or now, self.first_token or now
        return Timings(scheduled - self.arrival, first - scheduled, now - first, now - self.arrival, preemptions)


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of a request."""

    request: Request
    choice: int
    order: int  # of arrival; with the priority it decides who is served first
    seed: int
    limit: int  # tokens, prompt included, at which it ends
    stops: frozenset[int]  # ids that end it
    tokens: "array[int]"
    tables: Tables
    root: bytes  # digest that its chain of blocks begins with
    recipe: Recipe  # how its tokens are drawn
    status: Status = Status.WAITING
    computed: int = 0
    cached: int = 0
    preemptions: int = 0
    forked: bool = False  # the other choices exist already (or are not wanted)
    clock: Clock = field(default_factory=Clock)
    keys: list[BlockKey] = field(default_factory=list)  # of full blocks, as far as needed
    published: int = 0  # leading blocks that others may find
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    encoding: Encoding | None = None  # what it holds of its encoder input
    prefix: int = 0  # positions of its prompt that see one another
    encoder_cached: int = 0  # tokens of its encoder input that were computed before it came
    group: "BeamGroup[Sequence] | None" = None  # of beam search
    score: float = 0.0  # of a beam: sum of its logprobs
    candidates: Candidates | None = None  # of a beam whose last token is computed, until all its group are
    overtaken: int = 0  # prompt tokens of later comers that ran while its own waited

    @property
    def rank(self) -> tuple[int, int, int]:
        """Who goes first: lower is served earlier and preempted later."""
        return (self.request.priority, self.order, self.choice)

    @property
    def encoder(self) -> "array[int]":
        """Its encoder input; the caller knows that there is one."""
        assert self.request.encoder is not None
        return self.request.encoder

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt)

    @property
    def remaining(self) -> int:
        """Tokens whose state is not computed yet."""
        return len(self.tokens) - self.computed

    @property
    def output_length(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def decoding(self) -> bool:
        return self.remaining == 1 and self.output_length > 0

    @property
    def draws(self) -> int:
        """How many tokens are drawn once all is computed: one for each choice that begins here."""
        if self.limit <= self.prompt_length:
            return 0
        return self.choices if self.group is None else 1

    @property
    def choices(self) -> int:
        """Sequences that it is, or will be once its prompt is done."""
        return 1 if self.forked else self.request.params.width

    def extend_keys(self, count: int) -> list[BlockKey]:
        """Keys of the first `count` blocks, all of whose tokens are known."""
        while len(self.keys) < count:
            parent = self.keys[-1].digest if self.keys else self.root
            self.keys.append(next_key(parent, self.tokens, len(self.keys) * BLOCK_SIZE))
        return self.keys[:count]

    def usage(self) -> Usage:
        encoder = self.request.encoder
        if encoder is not None:  # the prompt is what was given to read; how the decoder begins is no one's input
            return Usage(len(encoder), self.output_length, self.encoder_cached)
        return Usage(self.prompt_length, self.output_length, self.cached)

    def ended_by(self, token: int) -> FinishReason | None:
        """Why the sequence ends with its newest token, or None if it goes on."""
        if token in self.stops and self.output_length > self.request.params.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.tokens) >= self.limit else None
