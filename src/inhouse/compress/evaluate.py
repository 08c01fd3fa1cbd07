"""How good a model is on a text: perplexity, and its divergence from a reference, through the engine that serves it.

Protocols (what is scored, so that figures can be compared):
    stories    split at <|endoftext|>, each story stripped, the first 40; BOS + story, the first 256 tokens of each
    full       the whole text in consecutive pieces as long as the context; each piece begins with BOS
    window:N   the same with pieces of N tokens
Every token of a piece but its first is scored. Perplexity is exp of the mean negative log-likelihood over all of them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import ExecutorError, UsageError
from inhouse.core.progress import Progress, silent
from inhouse.engine.session import Session
from inhouse.model.tokens.tokenizer import Tokenizer

STORIES, STORY_TOKENS = 40, 256
SEPARATOR = "<|endoftext|>"

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result. Divergences are KL(reference || model) in nats a token; None without a reference."""

    perplexity: float
    tokens: int
    protocol: str
    kld_mean: float | None = None
    kld_p99: float | None = None
    top1: float | None = None  # share of positions where both find the same token likeliest
    reference_perplexity: float | None = None
    kld_median: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Divergence:
    """A model beside its reference, position by position (all pieces after one another)."""

    kld: npt.NDArray[np.float64]  # nats
    agree: npt.NDArray[np.bool_]  # both find the same token likeliest
    position: npt.NDArray[np.int64]  # of the scored token in its piece, 1 ..


def documents(text: str, protocol: str) -> list[str]:
    """The documents of a text that a protocol scores, stripped."""
    found = [part.strip() for part in text.split(SEPARATOR)]
    return [part for part in found if part][: STORIES if protocol == "stories" else None]


def pieces(tokenizer: Tokenizer, text: str, protocol: str, context: int) -> list[list[int]]:
    """The token sequences that a protocol scores. Raises UsageError for an unknown protocol or an empty text."""
    if protocol == "stories":
        out = [tokenizer.encode(story)[: min(STORY_TOKENS, context)] for story in documents(text, protocol)]
    else:
        size = context if protocol == "full" else _window(protocol, context)
        begin = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
        ids = tokenizer.encode(text, add_special=False, parse_special=False)
        step = size - len(begin)
        out = [begin + ids[i : i + step] for i in range(0, len(ids), step)]
    out = [piece for piece in out if len(piece) > 1]
    if not out:
        raise UsageError("the text has nothing to score", remedy="Give a text of at least two tokens", param="text")
    return out


def check_protocol(protocol: str, context: int) -> None:
    """Raises UsageError for a protocol that there is none of for that context."""
    if protocol not in ("stories", "full"):
        _window(protocol, context)


def _window(protocol: str, context: int) -> int:
    kind, _, number = protocol.partition(":")
    if kind != "window" or not number.isdigit() or not 2 <= int(number) <= context:
        raise UsageError(
            f"unknown protocol {protocol!r}",
            remedy=f"Use stories, full, or window:N with 2 <= N <= {context}",
            param="protocol",
        )
    return int(number)


def log_softmax(rows: Rows) -> npt.NDArray[np.float64]:
    """Natural-log probabilities, float64 [n, vocab], of logits float32 [n, vocab]. Raises ExecutorError for NaN."""
    wide = rows.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    if not np.isfinite(wide[:, :1]).all():
        raise ExecutorError("the model's logits are not finite", remedy="The weights are damaged, or f16 overflows")
    return wide


class _Likelihood:
    """Adds up negative log-likelihood over slices of rows of one piece."""

    def __init__(self, ids: list[int]) -> None:
        self._ids, self.total, self.count = ids, 0.0, 0

    def __call__(self, first: int, rows: Rows) -> None:
        rows = rows[: max(0, len(self._ids) - 1 - first)]
        if len(rows):
            self.add(first, log_softmax(rows))

    def add(self, first: int, logs: npt.NDArray[np.float64]) -> None:
        """`logs` [n, vocab] follow positions first .. first + n - 1."""
        targets = self._ids[first + 1 : first + 1 + len(logs)]
        self.total -= float(logs[np.arange(len(logs)), targets].sum())
        self.count += len(logs)


def evaluate(
    session: Session, text: str, protocol: str = "full", reference: Session | None = None, progress: Progress = silent
) -> Evaluation:
    """Scores a text; with a reference also the divergence from it.

    Raises UsageError (unknown protocol, empty text, vocabularies that differ).
    """
    context = session.engine.context_length
    if reference is not None:
        context = min(context, reference.engine.context_length)
    return evaluate_pieces(session, pieces(session.tokenizer, text, protocol, context), protocol, reference, progress)


def evaluate_pieces(
    session: Session,
    texts: Sequence[list[int]],
    protocol: str,
    reference: Session | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Scores token sequences as they are; `protocol` is what the result calls them.

    Raises UsageError where the vocabularies differ."""
    if reference is not None:
        return compare_pieces(session, texts, protocol, reference, progress)[0]
    total, done = sum(len(piece) for piece in texts), 0
    nll, counted = 0.0, 0
    for ids in texts:
        likelihood = _Likelihood(ids)
        session.engine.score(ids, tap=likelihood)
        nll, counted, done = nll + likelihood.total, counted + likelihood.count, done + len(ids)
        progress("evaluating", done, total)
    return Evaluation(math.exp(nll / counted), counted, protocol)


def compare_pieces(
    session: Session, texts: Sequence[list[int]], protocol: str, reference: Session, progress: Progress = silent
) -> tuple[Evaluation, Divergence]:
    """Scores token sequences with both models. Raises UsageError where the vocabularies differ."""
    if reference.engine.vocab_size != session.engine.vocab_size:
        sizes = f"{session.engine.vocab_size} and {reference.engine.vocab_size}"
        raise UsageError(f"the vocabularies have {sizes} tokens", remedy="Compare models of one tokenizer")
    total, done = sum(len(piece) for piece in texts), 0
    ours, theirs, counted = 0.0, 0.0, 0
    found: list[Divergence] = []
    for ids in texts:
        likelihood = _Likelihood(ids)
        other, divergence = _compare(session, reference, ids, likelihood)
        found.append(divergence)
        ours, theirs, counted = ours + likelihood.total, theirs + other, counted + likelihood.count
        done += len(ids)
        progress("evaluating", done, total)
    joined = Divergence(*(np.concatenate(parts) for parts in zip(*map(_fields, found), strict=True)))
    kld = joined.kld
    evaluation = Evaluation(
        math.exp(ours / counted), counted, protocol, float(kld.mean()), float(np.quantile(kld, 0.99)),
        float(joined.agree.mean()), math.exp(theirs / counted), float(np.median(kld)),
    )  # fmt: skip
    return evaluation, joined


def _fields(one: Divergence) -> tuple[npt.NDArray[Any], ...]:
    return one.kld, one.agree, one.position


def _compare(session: Session, reference: Session, ids: list[int], likelihood: _Likelihood) -> tuple[float, Divergence]:
    """Scores a piece with both: the reference's NLL, and how far apart they are at each position."""
    kept: list[tuple[int, Rows]] = []
    reference.engine.score(ids, tap=lambda first, rows: kept.append((first, rows.copy())))
    expected = _Likelihood(ids)
    klds: list[npt.NDArray[np.float64]] = []
    agree: list[npt.NDArray[np.bool_]] = []
    places: list[npt.NDArray[np.int64]] = []
    wanted = _slices(kept, len(ids) - 1)

    def take(first: int, rows: Rows) -> None:
        rows = rows[: max(0, len(ids) - 1 - first)]
        if not len(rows):
            return
        logs = log_softmax(rows)
        likelihood.add(first, logs)
        truth = log_softmax(np.stack([next(wanted) for _ in range(len(rows))]))
        expected.add(first, truth)
        klds.append((np.exp(truth) * (truth - logs)).sum(axis=1))
        agree.append(truth.argmax(axis=1) == logs.argmax(axis=1))
        places.append(np.arange(first + 1, first + 1 + len(rows)))

    session.engine.score(ids, tap=take)
    return expected.total, Divergence(np.concatenate(klds), np.concatenate(agree), np.concatenate(places))


def _slices(kept: list[tuple[int, Rows]], count: int) -> Iterator[Rows]:
    """The kept rows one by one, in order of position, `count` of them."""
    given = 0
    for _, rows in sorted(kept, key=lambda entry: entry[0]):
        for row in rows:
            if given < count:
                given += 1
                yield row
