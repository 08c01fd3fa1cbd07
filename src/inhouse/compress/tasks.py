"""Questions with known answers, put to a model before and after: a paired test that perplexity cannot flatter.

A file of questions is UTF-8, one a line: the question, a tab, then what the answer must contain: groups parted by `;`,
of each group any of the strings parted by `|`, whatever the case. Lines that begin with # are comments. Answers are
greedy. Knows the statistics of paired answers; does not know where questions come from.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from inhouse.core.errors import NotFoundError, UsageError
from inhouse.core.progress import Progress, silent
from inhouse.engine.request import Failed, SamplingParams, TokenEvent, make_request
from inhouse.engine.session import Session

ANSWER_TOKENS = 96
SIGNIFICANT = 0.05
_Z_ALPHA, _Z_BETA = 1.959964, 0.841621  # two-sided 5 %, power 80 %


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and the keys of a right answer: any of each group."""

    text: str
    keys: tuple[tuple[str, ...], ...]

    def is_right(self, answer: str) -> bool:
        """Whether every group is met."""
        said = answer.lower()
        return all(any(key in said for key in group) for group in self.keys)


@dataclass(frozen=True, slots=True)
class Paired:
    """The same questions, before and after.

    lost: right before and wrong after; gained: the other way round. p: exact McNemar (McNemar 1947), two-sided: how
    likely so unlike counts are if nothing has changed. detectable: the smallest change of the share of right answers
    that so many questions would show four times in five (Connor 1987).
    """

    questions: int
    before: int
    after: int
    lost: int
    gained: int
    p: float
    detectable: float

    @property
    def worse(self) -> bool:
        """Whether the loss is more than chance."""
        return self.lost > self.gained and self.p < SIGNIFICANT

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_questions(path: Path) -> list[Question]:
    """Raises NotFoundError, UsageError naming the line that is none."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except FileNotFoundError:
        raise NotFoundError(
            f"there is no file of questions {path}", remedy="Check the path", param="gates.questions"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"cannot read {path} as UTF-8 text: {error}", remedy="Give plain text", param="gates.questions"
        ) from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        text, tab, keys = line.partition("\t")
        groups = tuple(tuple(k.strip().lower() for k in g.split("|") if k.strip()) for g in keys.split(";"))
        if not tab or not text.strip() or not all(groups):
            raise UsageError(
                f"{path.name}, line {number}: {line[:60]!r} is no question", remedy="Write QUESTION<TAB>KEY|KEY;KEY",
                param="gates.questions",
            )  # fmt: skip
        found.append(Question(text.strip(), groups))
    if not found:
        raise UsageError(
            f"{path.name} has no questions", remedy="Write QUESTION<TAB>KEY|KEY;KEY, one a line",
            param="gates.questions",
        )  # fmt: skip
    return found


def answers(session: Session, questions: Sequence[Question], progress: Progress = silent) -> list[bool]:
    """Which questions a model answers rightly, greedily, one after the other through its chat template."""
    found = []
    for done, question in enumerate(questions, 1):
        ids = session.chat_ids([{"role": "user", "content": question.text}])
        room = session.engine.context_length - len(ids)
        if room < 1:
            raise UsageError(f"a question has {len(ids)} tokens, beyond the context", param="gates.questions")
        request = make_request(f"question-{uuid4()}", ids, SamplingParams(temperature=0.0), min(ANSWER_TOKENS, room))
        out: list[int] = []
        for event in session.engine.stream(request):
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, TokenEvent):
                out += event.tokens
        found.append(question.is_right(session.tokenizer.decode(out)))
        progress("asking", done, len(questions))
    return found


def paired(before: Sequence[bool], after: Sequence[bool]) -> Paired:
    """The test of two runs over the same questions, in the same order."""
    lost = sum(a and not b for a, b in zip(before, after, strict=True))
    gained = sum(b and not a for a, b in zip(before, after, strict=True))
    return Paired(
        len(before), sum(before), sum(after), lost, gained, mcnemar(lost, gained),
        detectable(len(before), lost + gained),
    )  # fmt: skip


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p of the binomial test that a changed answer is as likely lost as gained."""
    n, k = lost + gained, min(lost, gained)
    tail: float = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    return min(1.0, 2 * tail)


def detectable(questions: int, changed: int) -> float:
    """The smallest difference of shares that a McNemar test of so many questions finds with power 80 % at 5 %, for the
    share of changed answers that was seen (half a question, where none changed)."""
    share = max(changed, 0.5) / questions
    low, high = 0.0, share
    for _ in range(60):
        middle = (low + high) / 2
        need = _Z_ALPHA * math.sqrt(share) + _Z_BETA * math.sqrt(max(share - middle * middle, 0.0))
        low, high = (middle, high) if middle * math.sqrt(questions) < need else (low, middle)
    return high
