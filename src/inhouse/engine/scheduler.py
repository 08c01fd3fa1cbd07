"""Who runs in the next step, with how many tokens, in which blocks; and what a step's draws change.

Pure Python: ids and counts, no tensors, no thread, no clock but the one it is given. The rules:

1. Sequences that decode go first, one token each, in order of (priority, arrival).
2. The rest of the step's budget goes to prompts, those with the fewest tokens left first (order.py), in chunks. Once
   half of a step's budget is used it ends where a prompt ends, so that its first token does not wait for the others.
3. Waiting sequences are admitted in that order, too, as long as blocks for all their known tokens are there.
4. Encoder inputs (encoder-decoders) run whole, in steps of their own, in the order of the queue; while both wait,
   steps of inputs and steps of tokens take turns.
5. When blocks run out, the last in order gives its blocks back and waits again; its tokens are recomputed later.

A sequence that fits when it is alone (checked on submission) therefore always ends.
"""

from array import array
from bisect import insort
from collections.abc import Callable, Iterable

from inhouse.core.errors import InhouseError
from inhouse.engine.admission import without_slot
from inhouse.engine.beams import Branch
from inhouse.engine.blocks import Blocks
from inhouse.engine.encoders import Encoders
from inhouse.engine.order import PromptOrder
from inhouse.engine.plan import Chunk, ChunkResult, Counters, Draw, Encode, Plan, Planner
from inhouse.engine.request import (
    EngineConfig,
    Event,
    Failed,
    Finished,
    FinishReason,
    PromptEvent,
    TokenEvent,
)
from inhouse.engine.search import broken_off, found
from inhouse.engine.sequence import Clock, Sequence, Status
from inhouse.runtime.step import BLOCK_SIZE


class Scheduler:
    """The sequences of one engine and their blocks."""

    def __init__(
        self, blocks: Blocks, config: EngineConfig, clock: Callable[[], float], encoders: Encoders | None = None
    ) -> None:
        self.blocks = blocks
        self.encoders = encoders or Encoders((), (), {})
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.counters = Counters()
        self.held = False  # nobody is admitted: blocks are being saved up for another
        self._config = config
        self._clock = clock
        self._order = PromptOrder(config.step_tokens)
        self._whole = not all(pool.group.chunkable for pool in blocks.pools.values())
        self._sharing = config.prefix_cache and blocks.shareable
        self._encoded = False  # the last step was one of encoder inputs

    @property
    def sequences(self) -> list[Sequence]:
        return self.running + self.waiting

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence into the queue; its limit must fit the blocks (the engine has checked)."""
        sequence.status = Status.WAITING
        insort(self.waiting, sequence, key=lambda s: s.rank)

    def without_slot(self, submitted: Iterable[Sequence]) -> int:
        """How many sequences of the queue and of those `submitted` but not yet added have no slot free. A snapshot; any
        thread may ask."""
        free = self._config.max_running - sum(s.choices for s in [*self.running])
        return without_slot([s.choices for s in [*self.waiting, *submitted]], free)

    # ---- schedule -------------------------------------------------------------------------------------------------

    def schedule(self) -> Plan:
        """The next step; empty if there is nothing to do."""
        plan = Plan()
        for turn in (self._tokens, self._inputs) if self._encoded else (self._inputs, self._tokens):
            plan = turn()
            if plan.entries:
                break
        self._encoded = bool(plan.encodes)
        return plan

    def _inputs(self) -> Plan:
        """Encoder inputs of the waiting sequences that could be admitted, in order, within the budget of tokens."""
        plan, left = Plan(), self._config.step_tokens
        if not self.encoders.present:
            return plan
        free = self._config.max_running - sum(s.choices for s in self.running)
        for sequence in list(self.waiting):
            free -= sequence.choices
            if free < 0:
                break
            if sequence.encoding is not None or self._find_encoding(sequence):
                continue
            length = len(sequence.encoder)
            if plan.encodes and length > left or not self._make_encoding(sequence, plan):
                break
            left -= length
        return plan

    def _find_encoding(self, sequence: Sequence) -> bool:
        found = self.encoders.find(sequence.root, sequence.encoder)
        if found is None:
            return False
        sequence.encoding = self.encoders.hold(found)
        sequence.encoder_cached = len(found.tokens) if found.ready and not sequence.preemptions else 0
        return True

    def _make_encoding(self, sequence: Sequence, plan: Plan) -> bool:
        """Lends blocks for the sequence's input, taking back those of inputs that wait behind it; False if short."""
        scratch = self.encoders.lend_scratch(len(sequence.encoder))
        if scratch is None:
            return False
        while (made := self.encoders.make(sequence.root, sequence.encoder, sequence.request.adapter)) is None:
            running = {id(e.encoding) for e in plan.encodes}
            behind = (s for s in reversed(self.waiting) if s.encoding and s.rank > sequence.rank)
            last = next((s for s in behind if id(s.encoding) not in running), None)
            if last is None:
                self.encoders.return_scratch(scratch)
                return False
            self._drop_encoding(last)
        sequence.encoding = self.encoders.hold(made)
        plan.encodes.append(Encode(made, scratch))
        return True

    def _drop_encoding(self, sequence: Sequence) -> None:
        if sequence.encoding is not None:
            self.encoders.drop(sequence.encoding)
            sequence.encoding = None

    def _tokens(self) -> Plan:
        """Tokens of the running sequences, and of those that are admitted."""
        planner = Planner(self._config.step_tokens, max(self._config.logit_rows, self._config.max_running))
        for sequence in [s for s in self.running if s.decoding]:
            self._plan(planner, sequence)
        prompts = self._order.prompts(self.running, self.waiting, self._config.max_running)
        budget = planner.tokens
        for sequence in prompts:
            if planner.tokens <= 0:
                break
            if sequence.status is Status.RUNNING:
                self._plan(planner, sequence)
            elif self._admissible(planner, sequence):
                self._admit(planner, sequence)
            else:
                planner.admitting = False
            if planner.ends(sequence) and budget - planner.tokens >= self._config.step_tokens // 2:
                break
        if not planner.chunks and self.running:  # beams that wait for others of their group, for whom there is no room
            for victim in self._last():
                self._preempt(victim)
            return self._tokens()
        self._order.count(planner.chunks.values(), (s for s in prompts if not planner.ends(s)))
        return Plan(list(planner.chunks.values()))

    def _plan(self, planner: Planner, sequence: Sequence) -> None:
        """Gives a running sequence its chunk, preempting the last in order while blocks are short."""
        if sequence.status is not Status.RUNNING:
            return  # preempted a moment ago
        count = self._chunk(planner, sequence)
        if not count:
            return
        while (copies := self.blocks.extend(sequence.tables, sequence.computed, sequence.computed + count)) is None:
            planner.admitting = False  # else the victim would come back at once, for the same blocks
            for victim in self._last():
                planner.withdraw(victim)
                self._preempt(victim)
            if sequence.status is not Status.RUNNING:
                return
        planner.place(sequence, count, copies)

    def _last(self) -> list[Sequence]:
        """Who gives blocks back next: the running sequence that is last in order, with the beams of its group."""
        last = max(self.running, key=lambda s: s.rank)
        return [last] if last.group is None else [s for s in last.group.beams if s.status is Status.RUNNING]

    def _chunk(self, planner: Planner, sequence: Sequence) -> int:
        """How many tokens the sequence may run now."""
        if self._whole:
            return sequence.remaining if sequence.remaining <= planner.tokens or not planner.chunks else 0
        if not planner.rows:
            return 0
        count = min(sequence.remaining, planner.tokens)
        return min(count, planner.rows) if sequence.request.wants_rows else count

    def _admissible(self, planner: Planner, sequence: Sequence) -> bool:
        if self.held or not planner.admitting or not planner.tokens or not planner.rows:
            return False
        if sequence.request.encoder is not None and sequence.encoding is None and not self._find_encoding(sequence):
            return False  # its input comes first
        return sum(s.choices for s in self.running) + sequence.choices <= self._config.max_running

    def _admit(self, planner: Planner, sequence: Sequence) -> None:
        """Moves a waiting sequence to the running, if blocks for all its tokens are there; else ends admission."""
        self._adopt_prefix(sequence)
        count = self._chunk(planner, sequence)
        copies = self.blocks.extend(sequence.tables, sequence.computed, sequence.computed + count) if count else None
        if copies is None or not self._room_for(sequence, count):
            self.blocks.release(sequence.tables)
            sequence.computed = sequence.cached = sequence.published = 0
            planner.admitting = False
            return
        self._count_prefix(sequence)
        self.waiting.remove(sequence)
        sequence.status = Status.RUNNING
        sequence.clock.scheduled = sequence.clock.scheduled or self._clock()
        insort(self.running, sequence, key=lambda s: s.rank)
        planner.place(sequence, count, copies)

    def _room_for(self, sequence: Sequence, count: int) -> bool:
        """True if what the sequence still needs after this chunk could be lent as well."""
        if not self.running:
            return True
        rest = -(-(sequence.remaining - count) // BLOCK_SIZE)
        return all(p.available >= rest for p in self.blocks.pools.values() if not p.group.window)

    def _adopt_prefix(self, sequence: Sequence) -> None:
        if not self._sharing or sequence.request.wants_rows:
            return
        keys = sequence.extend_keys((len(sequence.tokens) - 1) // BLOCK_SIZE)  # one token is always computed
        hits = self.blocks.match(keys)
        self.blocks.adopt(sequence.tables, keys, hits)
        sequence.computed = hits * BLOCK_SIZE
        sequence.published = hits

    def _count_prefix(self, sequence: Sequence) -> None:
        if self._sharing and not sequence.preemptions:
            sequence.cached = min(sequence.computed, sequence.prompt_length)
            self.counters.prefix_queries += sequence.prompt_length
            self.counters.prefix_hits += sequence.cached

    def _preempt(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.tables)
        self._drop_encoding(sequence)
        self.running.remove(sequence)
        sequence.computed = sequence.published = 0
        sequence.candidates = None
        sequence.preemptions += 1
        self.counters.preemptions += 1
        self.add(sequence)

    # ---- commit ---------------------------------------------------------------------------------------------------

    def commit(self, plan: Plan, results: Iterable[ChunkResult]) -> list[tuple[Sequence, Event]]:
        """Records a step that succeeded; returns its events, each with the sequence that it concerns."""
        events: list[tuple[Sequence, Event]] = []
        self.counters.steps += 1
        for encode in plan.encodes:
            encode.encoding.ready = True
            self.encoders.return_scratch(encode.scratch)
        for chunk, result in zip(plan.chunks, results, strict=True):
            sequence = chunk.sequence
            self._advance(chunk)
            self._record_prompt(chunk, result, events)
            if chunk.searches:
                self._offer(sequence, result, events)
                continue
            for member, draw in zip(self._members(chunk), result.draws, strict=True):
                self._append(member, draw, events)
            if sequence.computed >= sequence.prompt_length and sequence.limit <= sequence.prompt_length:
                self._finish(sequence, FinishReason.LENGTH, None, events)
        return events

    def _advance(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        sequence.computed += chunk.count
        if chunk.start < sequence.prompt_length <= sequence.computed and not sequence.clock.first_token:
            self.counters.prompt_tokens += sequence.usage().prompt_tokens
        if self._sharing:
            full = sequence.computed // BLOCK_SIZE
            self.blocks.publish(sequence.tables, sequence.extend_keys(full), sequence.published)
            sequence.published = full

    def _record_prompt(self, chunk: Chunk, result: ChunkResult, events: list[tuple[Sequence, Event]]) -> None:
        sequence = chunk.sequence
        known = len(sequence.prompt_logprobs)  # more than chunk.start where a preempted prompt is run again
        sequence.prompt_logprobs += result.prompt_logprobs[known - chunk.start :]
        done = chunk.start < sequence.prompt_length <= sequence.computed
        if done and sequence.request.prompt_logprobs is not None and not sequence.clock.first_token:
            events.append((sequence, PromptEvent(sequence.request.id, tuple(sequence.prompt_logprobs))))

    def _members(self, chunk: Chunk) -> list[Sequence]:
        """The sequences that draw from this chunk: itself, and at the end of the prompt its sister choices."""
        sequence = chunk.sequence
        if not chunk.draws:
            return []
        sisters = [self._sister(sequence, choice) for choice in range(1, chunk.draws)]
        sequence.forked = True
        return [sequence, *sisters]

    def _sister(self, sequence: Sequence, choice: int) -> Sequence:
        sister = Sequence(
            sequence.request, choice, sequence.order, sequence.seed, sequence.limit, sequence.stops,
            array("i", sequence.tokens), self.blocks.fork(sequence.tables), sequence.root, sequence.recipe,
            Status.RUNNING, sequence.computed, sequence.cached, 0, True,
            Clock(sequence.clock.arrival, sequence.clock.scheduled), list(sequence.keys), sequence.published,
            encoding=self.encoders.hold(sequence.encoding) if sequence.encoding else None,
            encoder_cached=sequence.encoder_cached, prefix=sequence.prefix,
        )  # fmt: skip
        insort(self.running, sister, key=lambda s: s.rank)
        return sister

    # ---- beams ----------------------------------------------------------------------------------------------------

    def _offer(self, sequence: Sequence, result: ChunkResult, events: list[tuple[Sequence, Event]]) -> None:
        """Keeps a beam's candidates; once all beams of its group have theirs, the search takes its turn."""
        group = sequence.group
        assert group is not None
        if sequence.status is Status.FINISHED:  # another beam of its group failed in this very step
            return
        if result.error is not None:
            events += self.fail([sequence], result.error)
            return
        sequence.candidates = result.candidates
        sequence.clock.first_token = sequence.clock.first_token or self._clock()
        if not group.complete:
            return
        branches = group.turn()
        parents = group.beams
        if branches:
            group.beams = [self._descend(parents[b.parent], b, slot) for slot, b in enumerate(branches)]
        for parent in parents:
            self._end(parent)
        if not branches:
            events += self._told(sequence, found(sequence, self._clock()))

    def _descend(self, parent: Sequence, branch: Branch, slot: int) -> Sequence:
        """The sequence that a branch becomes: it shares the parent's blocks, the partly filled one until it writes."""
        child = self._sister(parent, slot)
        child.tokens.append(branch.token)
        child.group, child.score, child.preemptions = parent.group, branch.score, parent.preemptions
        child.clock.first_token = parent.clock.first_token
        return child

    def _break_off(self, sequence: Sequence, error: InhouseError | None) -> list[tuple[Sequence, Event]]:
        """Ends the search that a beam belongs to, by an error or (None) by a cancel."""
        assert sequence.group is not None
        for beam in sequence.group.beams:
            self._end(beam)
        return self._told(sequence, broken_off(sequence, self._clock(), error))

    def _told(self, sequence: Sequence, events: list[Event]) -> list[tuple[Sequence, Event]]:
        """The events of a search, counted."""
        for event in events:
            if isinstance(event, Finished):
                self.counters.generation_tokens += event.usage.completion_tokens
            if isinstance(event, Finished | Failed):
                self._tally("error" if isinstance(event, Failed) else event.reason)
        return [(sequence, event) for event in events]

    def _append(self, sequence: Sequence, draw: Draw, events: list[tuple[Sequence, Event]]) -> None:
        if draw.error is not None:
            self._end(sequence)
            events.append((sequence, self._failed(sequence, draw.error)))
            return
        now = self._clock()
        sequence.clock.first_token = sequence.clock.first_token or now
        sequence.tokens.append(draw.token)
        self.counters.generation_tokens += 1
        reason = sequence.ended_by(draw.token)
        if reason is not FinishReason.STOP:
            logprobs = (draw.logprob,) if draw.logprob else ()
            events.append((sequence, TokenEvent(sequence.request.id, sequence.choice, (draw.token,), logprobs, now)))
        if reason is not None:
            self._finish(sequence, reason, draw.token if reason is FinishReason.STOP else None, events)

    # ---- ends -----------------------------------------------------------------------------------------------------

    def cancel(self, request_id: str, choice: int | None = None) -> list[tuple[Sequence, Event]]:
        """Ends all choices of a request, or one; before the first token there is only choice 0, whose end is the end
        of all. No events if there is nothing to end."""
        events: list[tuple[Sequence, Event]] = []
        for sequence in self.sequences:
            if sequence.request.id != request_id or sequence.status is Status.FINISHED:
                continue
            if sequence.group is not None:
                events += self._break_off(sequence, None)
            elif choice in (None, sequence.choice):
                self._finish(sequence, FinishReason.CANCELLED, None, events)
        return events

    def fail_plan(self, plan: Plan, error: InhouseError) -> list[tuple[Sequence, Event]]:
        """Ends the sequences of a step that failed: those of its chunks, or those that wait for its inputs."""
        for encode in plan.encodes:
            self.encoders.return_scratch(encode.scratch)
        inputs = {id(encode.encoding) for encode in plan.encodes}
        waiting = [s for s in self.waiting if s.encoding is not None and id(s.encoding) in inputs]
        return self.fail([*(chunk.sequence for chunk in plan.chunks), *waiting], error)

    def fail(self, sequences: Iterable[Sequence], error: InhouseError) -> list[tuple[Sequence, Event]]:
        """Ends sequences with an error."""
        events: list[tuple[Sequence, Event]] = []
        for sequence in sequences:
            if sequence.status is Status.FINISHED:
                continue
            if sequence.group is not None:
                events += self._break_off(sequence, error)
                continue
            self._end(sequence)
            events.append((sequence, self._failed(sequence, error)))
        return events

    def _failed(self, sequence: Sequence, error: InhouseError) -> Failed:
        self._tally("error")
        return Failed(sequence.request.id, sequence.choice, error, self._is_last(sequence))

    def _finish(
        self, sequence: Sequence, reason: FinishReason, stop: int | None, events: list[tuple[Sequence, Event]]
    ) -> None:
        self._end(sequence)
        self._tally(reason)
        timings = sequence.clock.timings(self._clock(), sequence.preemptions)
        last = self._is_last(sequence)
        finished = Finished(
            sequence.request.id, sequence.choice, reason, sequence.usage(), timings, sequence.seed, last, stop
        )
        events.append((sequence, finished))

    def _is_last(self, sequence: Sequence) -> bool:
        return not any(s.request is sequence.request for s in self.sequences)

    def _end(self, sequence: Sequence) -> None:
        """Takes the sequence out and gives its blocks back."""
        queue = self.running if sequence.status is Status.RUNNING else self.waiting
        queue.remove(sequence)
        sequence.status = Status.FINISHED
        self.blocks.release(sequence.tables)
        self._drop_encoding(sequence)

    def _tally(self, reason: str) -> None:
        self.counters.finished[reason] = self.counters.finished.get(reason, 0) + 1

    def check(self) -> None:
        """Asserts the invariants: blocks match the living tables, and a sequence holds what it has computed."""
        self.blocks.check([s.tables for s in self.sequences])
        self.encoders.check(s.encoding for s in self.sequences)
        for sequence in self.running:
            assert sequence.status is Status.RUNNING
            assert sequence.request.encoder is None or (sequence.encoding is not None and sequence.encoding.ready)
            waits = sequence.candidates is not None  # for the other beams of its group
            assert 0 <= sequence.computed < len(sequence.tokens) + waits <= sequence.limit + 2
        for sequence in self.waiting:
            assert sequence.status is Status.WAITING
            assert sequence.computed == 0
            assert not any(len(table) for table in sequence.tables.values())
