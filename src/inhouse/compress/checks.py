"""What the shapes of a model tell against a recipe before any work begins. Knows the table of methods; no method."""

from inhouse.compress.recipe import Recipe, Stage
from inhouse.compress.stages import selected
from inhouse.compress.table import METHODS
from inhouse.compress.work import Work
from inhouse.core.errors import UsageError


def check_shapes(work: Work, recipe: Recipe) -> None:
    """Asks every stage's methods, up to the first stage that changes shapes: what comes after it works on a model that
    is not there yet. Raises UsageError for a stage that selects no weight, and what the methods raise."""
    for at, stage in enumerate(recipe.stages):
        _check(work, stage, f"{at}.{stage.kind}")
        if any(row.place == "structured" for row in stage.methods()):
            return


def _check(work: Work, stage: Stage, where: str) -> None:
    row = METHODS[stage.method]
    if row.scope != "matrix":
        if row.check is not None:
            row.check(work, "", stage.format, stage.options)
        return
    names = selected(work, stage)
    if not names:
        raise UsageError(f"{where} selects no weight", remedy="Check include and exclude", param=where)
    for name in names:
        chosen, fmt, options = stage.choice(name)
        if (check := METHODS[chosen].check) is not None:
            check(work, name, fmt, options)
