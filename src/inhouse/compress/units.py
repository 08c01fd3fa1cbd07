"""What the numbers of a run's progress count, by stage; of those not named here they are bytes. Knows no methods."""

from collections.abc import Mapping

from inhouse.compress.recipe import Recipe
from inhouse.compress.table import METHODS

STAGES: Mapping[str, str] = {
    "evaluating": "tokens", "asking": "questions", "sampling": "texts", "observing": "sequences",
    "moments": "sequences", "caching the teacher": "sequences", "calibrate": "parts of the model",
    "measuring cuts": "cuts", "sensitivities": "groups of matrices", "report": "tensors", "prove": "tensors",
    "search": "recipes", "quantization-aware training": "steps", "distilling": "steps", "fine-tuning": "steps",
}  # fmt: skip


def units_of(recipe: Recipe) -> dict[str, str]:
    """Stage, as progress calls it -> what is counted."""
    scopes = {"matrix": "weights", "block": "layers", "model": "weights"}
    of_stages = {f"{s.kind} {s.method}": scopes[METHODS[s.method].scope] for s in recipe.stages}
    rounds = max(
        (getattr(stage.options, "rounds", 0) for stage in recipe.stages if stage.method == "gradual"), default=0
    )
    of_stages |= {f"healing round {at + 1}": "steps" for at in range(rounds)}
    return {**STAGES, "quantize rtn": "weights", **of_stages}  # rtn: the baseline
