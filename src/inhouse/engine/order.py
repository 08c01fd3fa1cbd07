"""Whose prompt goes next: the one with the fewest tokens left, but nobody is overtaken for long.

Shortest remaining time first has the least mean time to the first token (Schrage, A Proof of the Optimality of the
Shortest Remaining Processing Time Discipline, 1968); under load it is what keeps most requests within a limit on that
time. Alone it would let a long prompt wait for ever, so tokens of later comers that ran before a prompt are counted,
and after `PATIENCE` steps' worth of them it goes first. Knows no blocks and no budgets.
"""

from collections.abc import Collection, Iterable

from inhouse.engine.plan import Chunk
from inhouse.engine.sequence import Sequence

PATIENCE = 4  # steps of tokens by which a prompt is overtaken at most (and the step in which it was reached)


class PromptOrder:
    """The order of prompts in an engine whose steps have at most `step_tokens` tokens."""

    def __init__(self, step_tokens: int) -> None:
        self._patience = PATIENCE * step_tokens

    def prompts(self, running: Collection[Sequence], waiting: Iterable[Sequence], slots: int) -> list[Sequence]:
        """The sequences with a prompt to run, first the one that gets tokens first; of those that wait none while all
        `slots` are taken."""
        begun = [s for s in running if not s.decoding]
        slots -= sum(s.choices for s in running)
        return sorted([*begun, *waiting] if slots > 0 else begun, key=self._key)

    def _key(self, sequence: Sequence) -> tuple[int, bool, int, int, int]:
        """Priority, those overtaken enough, tokens left, arrival. What has an encoder input goes by arrival alone, as
        the inputs do: one that goes first while the inputs of others have its memory would wait for ever."""
        priority, order, choice = sequence.rank
        if sequence.request.encoder is not None:
            return priority, True, 0, order, choice
        patient = sequence.overtaken < self._patience
        return priority, patient, sequence.remaining if patient else 0, order, choice

    def count(self, chunks: Iterable[Chunk], prompts: Iterable[Sequence]) -> None:
        """Notes by how many tokens of a step's `chunks` the `prompts` that still have tokens left were overtaken.
        To be called before the step is recorded."""
        ran = [(chunk.sequence, chunk.count) for chunk in chunks if not chunk.sequence.decoding]
        for sequence in prompts:
            sequence.overtaken += sum(count for other, count in ran if other.rank > sequence.rank)
