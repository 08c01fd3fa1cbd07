"""The gate: whether a finished model may be promoted, judged by its divergence from the model it was made of.

Knows absolute limits on the mean KL divergence, measured through the engine that will serve both; a failed model is
stored as failed, and nothing points a name at it unless forced.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from inhouse.compress.calibrate import read_texts
from inhouse.compress.evaluate import Evaluation, evaluate_pieces, pieces
from inhouse.compress.generated import sample_documents
from inhouse.compress.recipe import Gate, Recipe
from inhouse.core.errors import UsageError
from inhouse.core.progress import Progress, silent
from inhouse.core.settings import load_settings
from inhouse.engine.session import Session

OWN_SEQUENCES, OWN_TOKENS = 16, 256  # of the parent's own text, where the recipe names no other
OWN_SEED = 900_001  # far from what calibration draws
DIGITS = 9  # of figures that are recorded


@dataclass(frozen=True, slots=True)
class GateReport:
    """What was measured (KL divergences in nats a token), against which limit; `passed` None: there was none."""

    passed: bool | None
    max_kld: float | None
    kld_mean: float
    kld_p99: float
    top1: float
    perplexity: float
    reference_perplexity: float
    tokens: int
    protocol: str
    text: str

    def to_dict(self) -> dict[str, Any]:
        """For the manifest and `--json`."""
        return {key: round(value, DIGITS) if isinstance(value, float) else value for key, value in asdict(self).items()}

    @property
    def word(self) -> str:
        """`passed`, `failed` or `measured`."""
        return {True: "passed", False: "failed", None: "measured"}[self.passed]


def gate(
    parent: str, child: str, recipe: Recipe, threads: int | None = None, progress: Progress = silent
) -> GateReport:
    """Measures `child` against `parent` (references or folders of decoders) and applies the recipe's limit."""
    settings = load_settings({"threads": threads, "max_sequences": 16})
    with Session.open(parent, settings) as reference:
        context = reference.engine.context_length
        texts, protocol, text = _texts(recipe.gate, reference, context)
        with Session.open(child, settings) as session:
            found = evaluate_pieces(session, texts, protocol, reference, progress)
    return _judged(recipe.gate, found, text)


def _texts(wish: Gate, reference: Session, context: int) -> tuple[list[list[int]], str, str]:
    """(token sequences, protocol, what text it is)."""
    if wish.text is not None:
        joined = "\n\n".join(document.text for document in read_texts([Path(wish.text)]))
        return pieces(reference.tokenizer, joined, wish.protocol, context), wish.protocol, wish.text
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


def _judged(wish: Gate, found: Evaluation, text: str) -> GateReport:
    kld, p99, top1, before = found.kld_mean, found.kld_p99, found.top1, found.reference_perplexity
    if kld is None or p99 is None or top1 is None or before is None:
        raise UsageError("a gate needs a reference")
    passed = None if wish.max_kld is None else kld <= wish.max_kld
    return GateReport(
        passed, wish.max_kld, kld, p99, top1, found.perplexity, before, found.tokens, found.protocol, text
    )
