"""Requests that are answered with vectors: their queue, and the steps of Program `embed` beside those that generate.

An input runs whole, in one step, with blocks lent for that step alone; inputs of many requests share a step within the
budget of tokens. Order: (priority, arrival), and within a request that of its inputs. Called in the engine's thread,
but for `check` and `add`, which the engine calls with its lock held.
"""

from array import array
from bisect import insort
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from inhouse.core.errors import (
    CancelledError,
    CapacityError,
    ContextLengthError,
    ExecutorError,
    InhouseError,
    UnsupportedError,
    UsageError,
)
from inhouse.engine.batch import stack_tables
from inhouse.engine.blocks import Blocks, Tables
from inhouse.engine.encoders import Encoders
from inhouse.engine.request import Embedded, EmbedEvent, EmbedRequest, EmbedSink, EngineConfig, Failed, Timings
from inhouse.runtime.executor import F32, Executor
from inhouse.runtime.program import Axis
from inhouse.runtime.step import BLOCK_SIZE, I32, Step, step_rules

PROGRAM = "embed"


@dataclass(slots=True, eq=False)
class _Job:
    """A living request: which inputs have run."""

    request: EmbedRequest
    sink: EmbedSink
    order: int
    arrival: float  # time.monotonic() seconds
    begun: int = 0  # inputs that are in a step or done
    done: int = 0

    @property
    def rank(self) -> tuple[int, int]:
        return (self.request.priority, self.order)


@dataclass(slots=True, eq=False)
class _Item:
    """One input in a step, and the blocks lent for it."""

    job: _Job
    index: int
    own: Tables
    scratch: Tables

    @property
    def ids(self) -> "array[int]":
        return self.job.request.inputs[self.index]


@dataclass(slots=True)
class EmbedCounters:
    """Totals since the engine began."""

    steps: int = 0
    inputs: int = 0  # that were answered
    tokens: int = 0  # of these
    failed: int = 0  # requests


@dataclass(frozen=True, slots=True)
class EmbedStep:
    """What one step did; `error`: why it failed, None if it did not."""

    tokens: int
    inputs: int
    error: InhouseError | None = None


@dataclass(slots=True)
class Embedder:
    """The embed requests of one engine.

    Args:
        blocks, encoders: where state is lent from: groups of sequences, and scratch groups.
        context_length: tokens of one input at most, before the blocks bound it.
    """

    executor: Executor
    blocks: Blocks
    encoders: Encoders
    config: EngineConfig
    context_length: int
    clock: Callable[[], float]
    counters: EmbedCounters = field(default_factory=EmbedCounters)
    starved: bool = False  # an input waits for blocks; nobody else may be admitted meanwhile
    _jobs: list[_Job] = field(default_factory=list)
    _new: deque[_Job] = field(default_factory=deque)
    _order: int = 0

    @property
    def limit(self) -> int:
        """Tokens of one input at most."""
        pools = [pool.count for pool in self.blocks.pools.values()]
        room = min([count * BLOCK_SIZE for count in pools] + [self.encoders.capacity])
        return min(self.context_length, room)

    @property
    def roles(self) -> tuple[str, ...]:
        """What Program `embed` gives; () where the model has none."""
        program = self.executor.programs.programs.get(PROGRAM)
        return tuple(program.outputs) if program is not None else ()

    @property
    def living(self) -> bool:
        """True while a request has not ended; any thread may ask."""
        return bool(self._jobs or self._new)

    @property
    def mail(self) -> bool:
        """True if a request has come in since the last step."""
        return bool(self._new)

    @property
    def waiting(self) -> int:
        """Requests that have not been answered wholly; a snapshot."""
        return len(self._jobs) + len(self._new)

    # ---- the door -------------------------------------------------------------------------------------------------

    def check(self, request: EmbedRequest) -> None:
        """Raises UnsupportedError for a role that the model does not give, UsageError for an id or type outside its
        tables, ContextLengthError for an input that is too long, CapacityError if the queue is full."""
        if request.role not in self.roles:
            can = ", ".join(self.roles) or "nothing of the kind"
            raise UnsupportedError(f"this model gives no {request.role!r}; it gives {can}", param="model")
        programs, limit = self.executor.programs, self.limit
        longest = max(map(len, request.inputs))
        if longest > limit:
            raise ContextLengthError(
                f"an input has {longest} tokens, this model takes {limit} at once", remedy="Shorten it, or cut it up",
                param="input", prompt_tokens=longest, context_length=limit,
            )  # fmt: skip
        _within("token", request.inputs, programs.vocab_size)
        types = step_rules(programs, PROGRAM).types
        if types:
            _within("token type", request.types, types)
        elif any(any(kinds) for kinds in request.types):
            raise UsageError("this model knows no token types", param="input")
        if self.waiting >= self.config.max_queue:
            raise CapacityError(
                f"{self.waiting} embed requests wait, the queue holds {self.config.max_queue}",
                remedy="Try again later",
            )

    def lives(self, request_id: str) -> bool:
        """Whether a request of that id has not ended."""
        return any(job.request.id == request_id for job in chain(self._jobs, self._new))

    def add(self, request: EmbedRequest, sink: EmbedSink) -> None:
        """Queues a request that `check` let pass."""
        self._order += 1
        self._new.append(_Job(request, sink, self._order, self.clock()))

    # ---- the engine's thread --------------------------------------------------------------------------------------

    def take_mail(self) -> None:
        """Puts what came in into the queue."""
        while self._new:
            insort(self._jobs, self._new.popleft(), key=lambda job: job.rank)

    def cancel(self, request_id: str) -> None:
        """Ends a request; an id that is not living is no error."""
        for job in [job for job in self._jobs if job.request.id == request_id]:
            self._fail(job, CancelledError("the request was cancelled"))

    def end_all(self, error: InhouseError) -> None:
        """Fails every living request."""
        self.take_mail()
        for job in list(self._jobs):
            self._fail(job, error)

    def step(self) -> EmbedStep | None:
        """Runs one step; None if there is nothing to run, or nothing for which blocks are free."""
        items = self._plan()
        if not items:
            return None
        began, tokens = self.clock(), sum(len(item.ids) for item in items)
        try:
            outputs = self.executor.run(PROGRAM, _batch(items))
            answers = self._answers(items, outputs)
        except Exception as error:  # whatever a step raises must not end the engine
            known = error if isinstance(error, InhouseError) else ExecutorError(f"a step failed: {error!r}")
            for job in {id(item.job): item.job for item in items}.values():
                self._fail(job, known)
            return EmbedStep(tokens, len(items), known)
        finally:
            for item in items:
                self._give_back(item.own, item.scratch)
        self.counters.steps += 1
        self._post(items, answers, began)
        return EmbedStep(tokens, len(items))

    def _plan(self) -> list[_Item]:
        """Inputs of the next step: the first always, more while budget, sequences and blocks suffice."""
        items: list[_Item] = []
        left = self.config.step_tokens
        self.starved = False
        for job in self._jobs:
            for index in range(job.begun, len(job.request.inputs)):
                length = len(job.request.inputs[index])
                if items and (length > left or len(items) >= self.config.max_running):
                    return items
                lent = self._lend(length)
                if lent is None:
                    self.starved = not items
                    return items
                items.append(_Item(job, index, *lent))
                job.begun += 1
                left -= length
        return items

    def _lend(self, length: int) -> tuple[Tables, Tables] | None:
        own = self.blocks.empty_tables()
        if self.blocks.extend(own, 0, length) is None:
            return None
        scratch = self.encoders.lend_scratch(length)
        if scratch is None:
            self.blocks.release(own)
            return None
        return own, scratch

    def _give_back(self, own: Tables, scratch: Tables) -> None:
        self.blocks.release(own)
        self.encoders.return_scratch(scratch)

    def _answers(self, items: list[_Item], outputs: Mapping[str, F32]) -> list[F32]:
        """Each item's rows of its role, copied: the executor's arrays last until its next step only."""
        axes = {role: value.axis for role, value in self.executor.programs.programs[PROGRAM].outputs.items()}
        answers, first = [], 0
        for n, item in enumerate(items):
            role, end = item.job.request.role, first + len(item.ids)
            rows = outputs[role]
            values = np.array(rows[first:end] if axes[role] is Axis.TOKENS else rows[n], np.float32)
            if not np.isfinite(values).all():
                raise ExecutorError(f"the model gave {role} that are not finite")
            answers.append(values)
            first = end
        return answers

    def _post(self, items: list[_Item], answers: list[F32], began: float) -> None:
        """Hands each request its events, one list; a sink that raises loses its request."""
        now = self.clock()
        lists: dict[int, tuple[_Job, list[EmbedEvent]]] = {}
        for item, values in zip(items, answers, strict=True):
            job = item.job
            job.done += 1
            last = job.done == len(job.request.inputs)
            timings = Timings(began - job.arrival, now - began, 0.0, now - job.arrival)
            event = Embedded(job.request.id, item.index, values, len(item.ids), timings, last)
            lists.setdefault(id(job), (job, []))[1].append(event)
            self.counters.inputs += 1
            self.counters.tokens += len(item.ids)
            if last:
                self._jobs.remove(job)
        for job, events in lists.values():
            try:
                job.sink(events)
            except Exception:  # the receiver's fault; it has no other way to hear of it
                if job in self._jobs:
                    self._jobs.remove(job)

    def _fail(self, job: _Job, error: InhouseError) -> None:
        if job in self._jobs:
            self._jobs.remove(job)
        self.counters.failed += 1
        try:
            job.sink([Failed(job.request.id, 0, error, True)])
        except Exception:  # as above
            return


def _within(what: str, lists: "tuple[array[int], ...]", size: int) -> None:
    for values in lists:
        if min(values) < 0 or max(values) >= size:
            wrong = next(value for value in values if not 0 <= value < size)
            raise UsageError(
                f"an input holds the {what} {wrong}, allowed are 0..{size - 1}",
                remedy="Use this model's own tokenizer", param="input",
            )  # fmt: skip


def _batch(items: list[_Item]) -> Step:
    """The arrays of a step over whole inputs."""
    tokens = [np.frombuffer(item.ids, np.int32) for item in items]
    counts = np.array([part.size for part in tokens], np.int32)
    kinds = [_types(item) for item in items]
    return Step(
        tokens=np.concatenate(tokens),
        positions=np.concatenate([np.arange(count, dtype=np.int32) for count in counts]),
        sequences=np.repeat(np.arange(len(items), dtype=np.int32), counts),
        lengths=counts,
        tables=stack_tables([item.own | item.scratch for item in items]),
        sampled=np.zeros(0, np.int32),
        adapters=np.zeros(len(items), np.int32),
        types=np.concatenate(kinds),
    )


def _types(item: _Item) -> I32:
    types = item.job.request.types
    return np.frombuffer(types[item.index], np.int32) if types else np.zeros(len(item.ids), np.int32)
