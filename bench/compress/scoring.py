"""Scores of stories260K by the native engine: the protocol `stories` on stories 0-39, which nothing else may see."""

import gzip
from pathlib import Path

from bench.compress.teacher_text import model_folder, realdata

from inhouse.compress.evaluate import Evaluation, evaluate
from inhouse.core.settings import load_settings
from inhouse.engine.session import Session


def score(model: Path, reference: Path | None = None, activations: str = "int8") -> Evaluation:
    """Perplexity of a stored model, and its divergence from `reference` (default: the float model)."""
    text = gzip.decompress((realdata() / "text" / "tinystories_sample_2MiB.txt.gz").read_bytes()).decode()
    settings = load_settings({"threads": 1, "activations": activations})
    with (
        Session.open(str(model), settings) as session,
        Session.open(str(reference or model_folder()), load_settings({"threads": 1})) as other,
    ):
        return evaluate(session, text, "stories", other)
