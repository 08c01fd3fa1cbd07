"""The engine's door: requests in, events out, one thread that runs steps over one executor.

    submit -> inbox -> [ engine thread:  schedule -> run -> sample -> commit ] -> one list of events a step -> sink

Knows neither text nor sockets. The thread owns scheduler, runner and executor; callers touch only inbox and counters.
"""

import os
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable
from dataclasses import dataclass, field
from queue import SimpleQueue
from uuid import uuid4

from inhouse.core.errors import (
    CancelledError,
    CapacityError,
    ConflictError,
    ExecutorError,
    InhouseError,
    UnavailableError,
    UnsupportedError,
    UsageError,
)
from inhouse.engine.adapters import Adapters
from inhouse.engine.admission import check_encoder, check_ids, limit_of, prefix_of
from inhouse.engine.beams import BeamGroup
from inhouse.engine.blocks import Blocks, root_digest
from inhouse.engine.embed import Embedder
from inhouse.engine.encoders import Encoders
from inhouse.engine.plan import Plan
from inhouse.engine.recipe import make_recipe
from inhouse.engine.request import (
    EmbedRequest,
    EmbedSink,
    EngineConfig,
    Event,
    Failed,
    Finished,
    FinishReason,
    PromptEvent,
    Request,
    SamplingParams,
    Sink,
    Tap,
    TokenLogprob,
)
from inhouse.engine.runner import Runner
from inhouse.engine.scheduler import Scheduler
from inhouse.engine.sequence import Clock, Sequence
from inhouse.engine.sizes import sizes_of
from inhouse.plan import memory
from inhouse.plan.memory import share_groups
from inhouse.runtime.executor import Executor, require
from inhouse.runtime.program import StateKind
from inhouse.runtime.sampling import Sampler
from inhouse.runtime.sampling_native import NativeSampler

SCHEDULED = (StateKind.PAGED, StateKind.WINDOW, StateKind.LATENT)  # kinds of state that grow in blocks
MAX_FAILURES = 3  # steps that fail one after another before the executor counts as damaged for good


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot. Tokens unless said otherwise; the totals count from the engine's beginning."""

    running: int  # sequences
    waiting: int  # sequences
    kv_usage: float  # used share of the fullest pool, 0..1
    steps: int
    prompt_tokens: int  # of prompts that were completed, cached ones included
    generation_tokens: int
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    finished: dict[str, int]  # stop, length, cancelled, error -> choices
    state_bytes: int  # allocated for state
    embed_waiting: int = 0  # requests for vectors that are not wholly answered
    embed_inputs: int = 0  # inputs answered with vectors
    embed_tokens: int = 0  # of these


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step, for whoever watches: tokens computed, sequences, seconds."""

    tokens: int
    sequences: int
    seconds: float


@dataclass(slots=True)
class _Mail:
    """What callers left for the engine's thread."""

    submitted: deque[tuple[Sequence, Sink]] = field(default_factory=deque)
    cancelled: deque[tuple[str, int | None]] = field(default_factory=deque)


class Engine:
    """Serves requests over one executor until closed; owns the executor and closes it.

    Args:
        executor: loaded, not in use elsewhere; its state is allocated here.
        config: limits.
        eos_ids: tokens that end a sequence unless it ignores them.
        digest: of the weights (and whatever else changes their meaning); prefixes are never shared across digests.
        sampler: the native one by default.
        on_step: called in the engine's thread after each step.
        start: False leaves the thread to the caller, who runs `step()` itself (tests).

    Raises: UnsupportedError for kinds of state that it cannot schedule, CapacityError if one context does not fit.
    """

    def __init__(
        self,
        executor: Executor,
        config: EngineConfig | None = None,
        eos_ids: Collection[int] = (),
        digest: str = "",
        *,
        sampler: Sampler | None = None,
        on_step: Callable[[StepReport], None] | None = None,
        start: bool = True,
    ) -> None:
        self.config = config or EngineConfig()
        self.executor = executor
        programs = executor.programs
        if "step" not in programs.programs:
            require(programs, "embed")
        shares = share_groups(programs)
        for group in shares.own:
            if group.kind not in SCHEDULED:
                raise UnsupportedError(f"the engine cannot schedule state of kind {group.kind} ({group.name})")
        self.vocab_size = programs.vocab_size
        sizes = sizes_of(executor, self.config)
        self.context_length, counts = sizes.context_length, sizes.blocks
        executor.allocate(counts)
        executor.reserve(sizes.step_tokens, sizes.logit_rows, self.config.max_running)
        self.state_bytes = sum(counts[g.name] * memory.block_bytes(g, executor.kv_dtype) for g in programs.groups)
        self._eos = frozenset(eos_ids)
        self._digest = f"{digest}/{executor.kv_dtype}"
        self._blocks = Blocks(shares.own, counts)
        self._encoders = Encoders(shares.cross, shares.scratch, counts)
        self._longest_chunk = sizes.longest_chunk
        self.capacity = self._blocks.capacity(sizes.longest_chunk)  # tokens that one sequence can hold
        self._scheduler = Scheduler(self._blocks, self.config, time.monotonic, self._encoders)
        self._runner = Runner(executor, sampler or NativeSampler())
        self._embeds = Embedder(
            executor, self._blocks, self._encoders, self.config, self.context_length, time.monotonic
        )
        self.adapters = Adapters(executor, self._notify)
        self._on_step = on_step
        self._sinks: dict[str, Sink] = {}  # living requests
        self._mail = _Mail()
        self._changed = threading.Condition()
        self._order = 0
        self._failures = 0
        self._refusal: InhouseError | None = None  # why submit says no
        self._stopping = False
        self._thread = threading.Thread(target=self._serve, name="inhouse-engine", daemon=True) if start else None
        if self._thread:
            self._thread.start()

    # ---- for callers, any thread ----------------------------------------------------------------------------------

    def submit(self, request: Request, sink: Sink) -> str:
        """Queues a request; its events go to `sink`, in the engine's thread, one list a step. Returns its id.

        Raises, before anything is queued: UsageError (an id outside the vocabulary, more choices than sequences can
        run, min_tokens beyond the room), ContextLengthError (beyond the context or all blocks), CapacityError (queue
        full), ConflictError (the id is in use), UnavailableError (draining, closed, or the executor is damaged).
        """
        require(self.executor.programs, "step")
        width = 1 if request.params.beams is None else request.params.beams.width
        limit = limit_of(request, self.context_length, self._blocks.capacity(self._longest_chunk, width))
        check_ids(request, self.vocab_size)
        check_encoder(request, self._encoders.present, self.context_length, self._encoders.capacity)
        recipe = make_recipe(request.params, self.vocab_size)
        seed = request.params.seed if request.params.seed is not None else int.from_bytes(os.urandom(8), "little")
        stops = frozenset(request.params.stop_token_ids) | (frozenset() if request.params.ignore_eos else self._eos)
        with self._changed:
            self._check_door(request)
            adapter = self.adapters.hold(request.adapter)
            self._order += 1
            sequence = Sequence(
                request, 0, self._order, seed & (2**64 - 1), limit, stops, array("i", request.prompt),
                self._blocks.empty_tables(), self._root(request, adapter), recipe,
                clock=Clock(time.monotonic()), prefix=prefix_of(request, self.executor.programs.prefix_token),
            )  # fmt: skip
            if request.params.beams is not None:
                sequence.group = BeamGroup(request.params.beams, stops, len(request.prompt), limit, [sequence])
            self._sinks[request.id] = sink
            self._mail.submitted.append((sequence, sink))
            self._changed.notify_all()
        return request.id

    def _root(self, request: Request, adapter: str) -> bytes:
        """Where the chain of a request's blocks begins; what a decoder computes depends on the encoder's input too."""
        read = b"" if request.encoder is None else request.encoder.tobytes()
        return root_digest(self._digest, adapter, request.salt, read)

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        """Ends a request, or one choice of it, before the next step; an id that is not living is no error."""
        with self._changed:
            self._mail.cancelled.append((request_id, choice))
            self._changed.notify_all()

    def embed(self, request: EmbedRequest, sink: EmbedSink) -> str:
        """Queues inputs that are answered with vectors; their events go to `sink`, in the engine's thread. Returns the
        request's id; `cancel` takes it.

        Raises, before anything is queued: UnsupportedError (the model gives no such role), UsageError (an id or type
        outside its tables), ContextLengthError, CapacityError, ConflictError, UnavailableError.
        """
        with self._changed:
            self._check_open(request.id)
            self._embeds.check(request)
            self._embeds.add(request, sink)
            self._changed.notify_all()
        return request.id

    @property
    def embeds(self) -> Embedder:
        """The embed requests: what may be asked for (`roles`, `limit`) and their counters. Read only."""
        return self._embeds

    def stream(self, request: Request) -> Generator[Event, None, None]:
        """Submits and yields the events until the last; leaving early cancels. Not for the engine's thread.
        Raises what `submit` raises, when the first event is asked for."""
        events: SimpleQueue[list[Event]] = SimpleQueue()
        self.submit(request, events.put)
        try:
            while True:
                for event in events.get():
                    yield event
                    if getattr(event, "last", False):
                        return
        finally:
            self.cancel(request.id)

    def score(
        self, ids: Iterable[int], *, top: int = 0, tap: Tap | None = None, adapter: int = 0
    ) -> list[TokenLogprob]:
        """Logprobs of ids[1:], each given all before it; runs like any request, in slices of the step's budget.
        `tap` sees every row of logits. Raises the error that ended the request, and what `submit` raises."""
        request = Request(f"score-{uuid4()}", array("i", ids), SamplingParams(), 0, top, tap=tap, adapter=adapter)
        found: tuple[TokenLogprob, ...] = ()
        for event in self.stream(request):
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished) and event.reason is FinishReason.CANCELLED:
                raise CancelledError("the scoring was cancelled")
            if isinstance(event, PromptEvent):
                found = event.logprobs
        return list(found)

    def stats(self) -> Stats:
        """A snapshot; taken without stopping the engine."""
        c, used = self._scheduler.counters, max(self._blocks.usage(), self._encoders.usage())
        return Stats(
            len(self._scheduler.running), len(self._scheduler.waiting) + len(self._mail.submitted),
            used, c.steps, c.prompt_tokens, c.generation_tokens, c.prefix_queries, c.prefix_hits,
            c.preemptions, dict(c.finished), self.state_bytes, self._embeds.waiting, self._embeds.counters.inputs,
            self._embeds.counters.tokens,
        )  # fmt: skip

    @property
    def busy(self) -> bool:
        """Whether any request is living."""
        return bool(self._sinks) or self._embeds.living

    @property
    def error(self) -> InhouseError | None:
        """Why requests are refused; None while the engine is well and open."""
        return self._refusal

    def drain(self, timeout: float | None = None) -> bool:
        """Refuses new requests and waits for the living ones; False if some are left after `timeout` seconds."""
        with self._changed:
            self._refusal = self._refusal or UnavailableError("the engine is draining", remedy="Ask another server")
            return self._changed.wait_for(lambda: not self.busy, timeout)

    def close(self) -> None:
        """Fails what still lives, stops the thread and closes the executor. May be called twice."""
        with self._changed:
            already, self._stopping = self._stopping, True
            self._refusal = UnavailableError("the engine is closed", remedy="Open the model again")
            self._changed.notify_all()
        if self._thread and self._thread is not threading.current_thread():
            self._thread.join()
        if not already:
            self._end_all(self._refusal)
            self.executor.close()

    # ---- admission ------------------------------------------------------------------------------------------------

    def _check_door(self, request: Request) -> None:
        """May the request come in now; called with the lock held."""
        self._check_open(request.id)
        most = self.config.max_running
        wide = request.params.width
        if wide > most:
            name = "n" if request.params.beams is None else "num_beams"
            raise UsageError(
                f"{name} is {wide}, the engine runs {most} sequences at most (max_sequences)",
                remedy=f"Choose {name} of at most {most}, or start with a larger --max-sequences", param=name,
            )  # fmt: skip
        submitted = [sequence for sequence, _ in self._mail.submitted]
        waiting = self._scheduler.without_slot(submitted)
        if waiting >= self.config.max_queue:
            raise CapacityError(
                f"{waiting} sequences wait, the queue holds {self.config.max_queue}", remedy="Try again later"
            )

    def _check_open(self, request_id: str) -> None:
        """Raises UnavailableError if nobody is let in, ConflictError if the id is in use."""
        if self._refusal is not None:
            raise self._refusal
        if request_id in self._sinks or self._embeds.lives(request_id):
            raise ConflictError(f"a request {request_id!r} is living", remedy="Use a new id")

    # ---- the engine's thread --------------------------------------------------------------------------------------

    def step(self) -> bool:
        """A step of tokens (take the mail, schedule, run, commit), then one of vectors. False if neither had work."""
        events = self._take_mail()
        plan = self._scheduler.schedule()
        if plan.entries:
            events += self._run(plan)
        self._post(events)
        return self._embed() or bool(plan.entries)

    def _embed(self) -> bool:
        """One step of Program `embed`; False if there was nothing to run."""
        began = time.monotonic()
        done = self._embeds.step()
        self._scheduler.held = self._embeds.starved
        if done is None:
            return False
        if done.error is None:
            self._failures = 0
            if self._on_step:
                self._on_step(StepReport(done.tokens, done.inputs, time.monotonic() - began))
        elif self._count_failure(done.error):
            self._end_all(self._refusal or done.error)
        with self._changed:
            self._changed.notify_all()
        return True

    def check(self) -> None:
        """Asserts the invariants of scheduler and blocks; for tests, and when idle."""
        self._scheduler.check()

    def _take_mail(self) -> list[tuple[Sequence, Event]]:
        """Queues what was submitted and ends what was cancelled."""
        with self._changed:
            mail, self._mail = self._mail, _Mail()
            for sequence, _ in mail.submitted:
                self._scheduler.add(sequence)
            self._embeds.take_mail()
        self.adapters.apply()
        for id_, _ in mail.cancelled:
            self._embeds.cancel(id_)
        return [event for id_, choice in mail.cancelled for event in self._scheduler.cancel(id_, choice)]

    def _run(self, plan: Plan) -> list[tuple[Sequence, Event]]:
        """Runs a plan; its events, or those of its failure. The sequences of a failed step end, the others go on."""
        began = time.monotonic()
        try:
            results = self._runner.run(plan)
        except Exception as error:  # whatever a step raises must not end the engine
            return self._fail(plan, error)
        self._failures = 0
        events = self._scheduler.commit(plan, results)
        if self._on_step:
            self._on_step(StepReport(plan.tokens, plan.entries, time.monotonic() - began))
        return events

    def _fail(self, plan: Plan, error: Exception) -> list[tuple[Sequence, Event]]:
        """Ends the sequences of a failed step; after several in a row all of them, and the door is shut."""
        known = error if isinstance(error, InhouseError) else ExecutorError(f"a step failed: {error!r}")
        if not self._count_failure(known):
            return self._scheduler.fail_plan(plan, known)
        self._embeds.end_all(known)
        return self._scheduler.fail_plan(plan, known) + self._scheduler.fail(self._scheduler.sequences, known)

    def _count_failure(self, known: InhouseError) -> bool:
        """Counts a failed step; True if it was one too many and the door is shut."""
        self._failures += 1
        if self._failures < MAX_FAILURES:
            return False
        self._refusal = UnavailableError(
            f"{self._failures} steps failed one after another, the last with: {known.message}",
            remedy="The executor is damaged; load the model again",
        )
        return True

    def _post(self, events: list[tuple[Sequence, Event]]) -> None:
        """Hands each sink its events, one list a request; a sink that raises loses its request, not the engine."""
        lists: dict[str, list[Event]] = {}
        for sequence, event in events:
            lists.setdefault(sequence.request.id, []).append(event)
        for request_id, batch in lists.items():
            try:
                self._sinks[request_id](batch)
            except Exception:  # the receiver's fault; it has no other way to hear of it
                self.cancel(request_id)
        ended = [s.request for s, event in events if getattr(event, "last", False)]
        if ended:
            with self._changed:
                for request in ended:
                    self._sinks.pop(request.id, None)
                    self.adapters.release(request.adapter)
                self._changed.notify_all()

    def _serve(self) -> None:
        """The thread: steps while there is work, sleeps while there is none, ends when told."""
        try:
            while not self._stopping:
                if not self.step():
                    self._sleep()
        except Exception as error:  # a fault of our own: nobody may wait for ever
            self._end_all(ExecutorError(f"the engine itself failed: {error!r}", remedy="Report it; reload the model"))

    def _sleep(self) -> None:
        mail, embeds, adapters = self._mail, self._embeds, self.adapters
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopping or mail.submitted or mail.cancelled or embeds.mail or adapters.waiting
            )

    def _end_all(self, error: InhouseError) -> None:
        """Fails every living request and lets no other in."""
        self._refusal = error
        self._embeds.end_all(error)
        self.adapters.end(error)
        self._post(self._take_mail() + self._scheduler.fail(self._scheduler.sequences, error))
        for request_id, sink in self._sinks.items():  # what the scheduler has lost, if the fault was its own
            sink([Failed(request_id, 0, error, True)])
        with self._changed:
            self._sinks.clear()
            self._changed.notify_all()
