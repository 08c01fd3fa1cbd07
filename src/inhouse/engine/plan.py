"""The words between scheduler and runner: what runs in a step, what it gave, and a step under construction."""

from dataclasses import dataclass, field

from inhouse.core.errors import InhouseError
from inhouse.engine.beams import Candidates
from inhouse.engine.blocks import Copy, Tables
from inhouse.engine.encoders import Encoding
from inhouse.engine.request import TokenLogprob
from inhouse.engine.sequence import Sequence


@dataclass(slots=True, eq=False)
class Chunk:
    """A run of one sequence's tokens in a step: positions start..start+count-1."""

    sequence: Sequence
    start: int
    count: int
    draws: int  # tokens to draw from the last row; 0 while the prompt is not done
    all_rows: bool  # the logits of every row are wanted
    copies: list[Copy]

    @property
    def searches(self) -> bool:
        """Whether its last row is a beam's, that wants candidates in place of draws."""
        return self.draws > 0 and self.sequence.group is not None

    @property
    def logit_rows(self) -> int:
        return self.count if self.all_rows else min(self.draws, 1)


@dataclass(slots=True, eq=False)
class Encode:
    """A whole encoder input in a step of `encode`, with the scratch blocks lent for it."""

    encoding: Encoding
    scratch: Tables


@dataclass(slots=True)
class Plan:
    """One step: chunks of sequences, or encoder inputs; never both, as they are Programs of their own."""

    chunks: list[Chunk] = field(default_factory=list)
    encodes: list[Encode] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks) + sum(len(e.encoding.tokens) for e in self.encodes)

    @property
    def entries(self) -> int:
        """Sequences or inputs that run; 0: there is nothing to do."""
        return len(self.chunks) + len(self.encodes)


@dataclass(frozen=True, slots=True)
class Draw:
    """A token drawn for one choice, or why none could be."""

    token: int
    logprob: TokenLogprob | None = None
    error: InhouseError | None = None


@dataclass(frozen=True, slots=True)
class ChunkResult:
    """What a step gave for one chunk: a draw for each choice, logprobs of the prompt tokens that follow its rows."""

    draws: tuple[Draw, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    candidates: Candidates = ()  # of a beam
    error: InhouseError | None = None  # of a beam that has none


@dataclass(slots=True)
class Counters:
    """Totals since the engine began; tokens unless said otherwise."""

    steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0  # times a sequence lost its blocks
    finished: dict[str, int] = field(default_factory=dict)  # reason -> choices


class Planner:
    """A step under construction: its chunks and what is left of its budgets."""

    def __init__(self, tokens: int, rows: int) -> None:
        self.chunks: dict[int, Chunk] = {}
        self.tokens = tokens
        self.rows = rows
        self.admitting = True  # may waiting sequences come in

    def place(self, sequence: Sequence, count: int, copies: list[Copy]) -> None:
        draws = sequence.draws if count == sequence.remaining else 0
        all_rows = sequence.request.wants_rows and sequence.computed < sequence.prompt_length
        chunk = Chunk(sequence, sequence.computed, count, draws, all_rows, copies)
        self.chunks[id(sequence)] = chunk
        self.tokens -= count
        self.rows -= chunk.logit_rows

    def ends(self, sequence: Sequence) -> bool:
        """Whether the step runs all that is left of the sequence."""
        chunk = self.chunks.get(id(sequence))
        return chunk is not None and chunk.count == sequence.remaining

    def withdraw(self, sequence: Sequence) -> None:
        """Takes back the chunk of a sequence that is being preempted, if it has one."""
        chunk = self.chunks.pop(id(sequence), None)
        if chunk is not None:
            self.tokens += chunk.count
            self.rows += chunk.logit_rows
