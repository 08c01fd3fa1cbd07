"""The gate: whether a finished model may be promoted, judged beside the model it was made of.

Knows limits and what is measured through the engine that will serve both: divergence, loss, paired questions. A failed
model is stored as failed, and nothing points a name at it unless forced.

    rounded, pruned, factored   mean KL divergence at most `max_kld`; and where codes were chosen by data, at least 30 %
                                below plain weighted rounding in the same formats, which is the same bytes
    healed (trained)            perplexity at most `max_rise` above, KL reported: training moves logits without harm
    any                         no significant loss on the questions, where there are some (McNemar)
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from inhouse.compress.calibrate import read_texts
from inhouse.compress.evaluate import SEPARATOR, Divergence, Evaluation, compare_pieces, pieces
from inhouse.compress.generated import sample_documents
from inhouse.compress.recipe import Gate, Recipe
from inhouse.compress.tasks import Paired, Question, answers, paired, read_questions
from inhouse.core.progress import Progress, silent
from inhouse.core.settings import load_settings
from inhouse.engine.session import Session

OWN_SEQUENCES, OWN_TOKENS = 16, 256  # of the parent's own text, where the recipe names no other
OWN_SEED = 900_001  # far from what calibration draws
DIGITS = 9  # of figures that are recorded
BASELINE_SHARE = 0.7  # of plain rounding's divergence: what a data-aware method must stay below
HEALING = ("distill", "finetune", "qat")  # stages that train


@dataclass(frozen=True, slots=True)
class GateReport:
    """What was measured (KL divergences in nats a token), against which limits. `passed` None: there was none.
    `reasons`: what it failed by. `baseline_kld`: of plain rounding at the same bytes, where that was measured."""

    passed: bool | None
    max_kld: float | None
    max_rise: float | None
    kld_mean: float
    kld_median: float
    kld_p99: float
    top1: float
    perplexity: float
    reference_perplexity: float
    tokens: int
    protocol: str
    text: str
    healed: bool = False
    baseline_kld: float | None = None
    questions: Paired | None = None
    reasons: tuple[str, ...] = ()
    kv_dtype: str = ""  # what the judged model kept K and V as

    def to_dict(self) -> dict[str, Any]:
        """For the manifest and `--json`."""
        return {key: round(value, DIGITS) if isinstance(value, float) else value for key, value in asdict(self).items()}

    @property
    def word(self) -> str:
        """`passed`, `failed` or `measured`."""
        return {True: "passed", False: "failed", None: "measured"}[self.passed]


@dataclass(frozen=True, slots=True)
class Judged:
    """The report, and the divergence position by position for whoever draws it."""

    report: GateReport
    divergence: Divergence


def is_healed(recipe: Recipe) -> bool:
    """Whether any stage trains."""
    return any(stage.kind in HEALING for stage in recipe.stages)


def gate(
    parent: str,
    child: str,
    recipe: Recipe,
    baseline: str | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> Judged:
    """Measures `child`, and `baseline` if there is one, against `parent` (references or folders of decoders) and
    applies the recipe's limits. Of the first two, which are about to be moved and removed, no packs are kept."""
    wish = recipe.gate
    settings = load_settings({"threads": threads, "max_sequences": 16})
    asked = read_questions(Path(wish.questions)) if wish.questions is not None else []
    with Session.open(parent, settings) as reference:
        texts, protocol, text = _texts(wish, reference)
        before = answers(reference, asked, progress)
        with Session.open(child, settings, cache=False) as session:
            found, divergence = compare_pieces(session, texts, protocol, reference, progress)
            kept = session.model.executor.kv_dtype
            task = _task(asked, before, session, progress)
        plain = None
        if baseline is not None:
            with Session.open(baseline, settings, cache=False) as session:
                plain = compare_pieces(session, texts, protocol, reference, progress)[0].kld_mean
    report = judge(wish, found, text, is_healed(recipe), plain, task)
    return Judged(replace(report, kv_dtype=kept), divergence)


def _task(asked: list[Question], before: list[bool], session: Session, progress: Progress) -> Paired | None:
    return paired(before, answers(session, asked, progress)) if asked else None


def scored_text(file: str, protocol: str) -> str:
    """The documents of a text file as one text, parted as the protocol parts them: `stories` scores each of its own."""
    found = read_texts([Path(file)], what="gate text", key="gates.text")
    return (SEPARATOR if protocol == "stories" else "\n\n").join(document.text for document in found)


def _texts(wish: Gate, reference: Session) -> tuple[list[list[int]], str, str]:
    """(token sequences, protocol, what text it is)."""
    context = reference.engine.context_length
    if wish.text is not None:
        scored = scored_text(wish.text, wish.protocol)
        return pieces(reference.tokenizer, scored, wish.protocol, context), wish.protocol, wish.text
    length = min(OWN_TOKENS, context)
    drawn = [row for row in sample_documents(reference, OWN_SEQUENCES, length=length, seed=OWN_SEED) if len(row) > 1]
    if sum(map(len, drawn)) >= OWN_TOKENS:
        return drawn, "own", "text that the parent wrote"
    random = np.random.default_rng(OWN_SEED).integers(0, reference.engine.vocab_size, (OWN_SEQUENCES, length))
    return (
        [list(map(int, row)) for row in random],
        "random",
        "random tokens, as the parent writes nothing",
    )


def judge(
    wish: Gate, found: Evaluation, text: str, healed: bool, baseline: float | None = None, task: Paired | None = None
) -> GateReport:
    """Applies the limits to what was measured beside a reference."""
    kld, median, p99 = found.kld_mean or 0.0, found.kld_median or 0.0, found.kld_p99 or 0.0
    before = found.reference_perplexity or found.perplexity
    reasons = []
    by_loss = healed and wish.max_rise is not None
    limited = by_loss or wish.max_kld is not None
    if by_loss and wish.max_rise is not None and not found.perplexity <= before * (1 + wish.max_rise):
        reasons.append(f"perplexity rose by {found.perplexity / before - 1:.2%}, the limit is {wish.max_rise:.2%}")
    if not by_loss and wish.max_kld is not None and not kld <= wish.max_kld:
        reasons.append(f"KL divergence {kld:.5f}, the limit is {wish.max_kld:g}")
    if limited and baseline is not None and not kld <= BASELINE_SHARE * baseline:
        reasons.append(f"KL divergence {kld:.5f} is not 30 % below plain rounding's {baseline:.5f} at the same bytes")
    if limited and task is not None and task.worse:
        reasons.append(f"{task.lost} right answers lost, {task.gained} gained (McNemar p {task.p:.2g})")
    return GateReport(
        not reasons if limited else None, wish.max_kld, wish.max_rise, kld, median, p99, found.top1 or 0.0,
        found.perplexity, before, found.tokens, found.protocol, text, healed, baseline, task, tuple(reasons),
    )  # fmt: skip
