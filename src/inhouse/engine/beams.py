"""Beam search: which continuations of a group of sequences go on, and which are kept as finished.

Pure values: sequences with the candidates that a step gave them. The rules are those of Hugging Face transformers, with
whose results users compare: from every beam the likeliest tokens, of all these the best max(2, 1 + stops) * width; an
ended one counts only among the first `width`; finished ones rank by sum of logprobs / length ** length_penalty. Ties go
to the earlier beam, then to the lower token.
"""

from array import array
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np

from inhouse.engine.request import Beams, FinishReason

Candidates = tuple[tuple[int, float], ...]  # (token, logprob), likeliest first


class Beam(Protocol):
    """What the search reads of a sequence."""

    @property
    def tokens(self) -> "array[int]": ...

    @property
    def score(self) -> float:
        """Sum of the logprobs of its output."""

    @property
    def candidates(self) -> Candidates | None:
        """What it may go on with; None while its last token is not computed."""


B = TypeVar("B", bound=Beam)


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished output: its tokens, the stop token among them, and its score."""

    score: float
    tokens: "array[int]"
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class Branch:
    """A continuation that goes on: `token` after all that beam number `parent` has."""

    score: float  # sum of logprobs
    parent: int
    token: int


@dataclass(slots=True, eq=False)
class BeamGroup(Generic[B]):
    """The beams of one request; `beams` are its living sequences, all of one length once each has its candidates."""

    params: Beams
    stops: frozenset[int]
    prompt_length: int
    limit: int  # tokens, prompt included
    beams: list[B] = field(default_factory=list)
    finished: list[Hypothesis] = field(default_factory=list)  # best first

    @property
    def keep(self) -> int:
        """Continuations that are looked at in a turn, and so candidates that each beam must bring."""
        return max(2, 1 + len(self.stops)) * self.params.width

    @property
    def complete(self) -> bool:
        """Whether every beam has its candidates."""
        return all(beam.candidates is not None for beam in self.beams)

    def turn(self) -> list[Branch]:
        """One step of the search over complete beams: what goes on, best first; none once the search is over."""
        length = len(self.beams[0].tokens) - self.prompt_length + 1  # of the output, the new token included
        full = len(self.beams[0].tokens) + 1 >= self.limit
        going: list[Branch] = []
        fresh: list[Hypothesis] = []
        for rank, branch in enumerate(self._best()):
            stop = branch.token in self.stops
            if not stop and not full:
                going.append(branch)
            elif rank < self.params.width:
                output = self.beams[branch.parent].tokens[self.prompt_length :]
                output.append(branch.token)
                reason = FinishReason.STOP if stop else FinishReason.LENGTH
                fresh.append(Hypothesis(self._ranked(branch.score, length), output, reason))
        ranked = sorted(self.finished + fresh, key=lambda one: -one.score)  # stable: the earlier first
        self.finished = ranked[: self.params.width]
        going = going[: self.params.width]
        return [] if self._over(going, length) else going

    def _best(self) -> list[Branch]:
        """The best continuations of all beams; sums in float32, as the original adds them."""
        branches = [
            Branch(float(np.float32(beam.score) + np.float32(logprob)), parent, token)
            for parent, beam in enumerate(self.beams)
            for token, logprob in beam.candidates or ()
        ]
        return sorted(branches, key=lambda b: (-b.score, b.parent, b.token))[: self.keep]

    def _ranked(self, score: float, length: int) -> float:
        return float(np.float32(score) / np.float32(length**self.params.length_penalty))

    def _over(self, going: list[Branch], length: int) -> bool:
        """Whether nothing that goes on can, or by `early_stopping` should, change what is finished."""
        if not going or len(self.finished) < self.params.width:
            return not going
        if self.params.early_stopping is True:
            return True
        longest = self.params.early_stopping == "never" and self.params.length_penalty > 0
        hoped = self._ranked(going[0].score, self.limit - self.prompt_length if longest else length)
        return hoped <= self.finished[-1].score
