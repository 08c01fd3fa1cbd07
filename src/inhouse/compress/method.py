"""What a row of the table of methods is. Knows no method."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

SCOPES = ("matrix", "block", "model")
NEEDS = ("nothing", "moments", "gram", "gradients")


@dataclass(frozen=True, slots=True)
class NoOptions:
    """Options of a method that has none."""


@dataclass(frozen=True, slots=True)
class Method:
    """One technique.

    name: what a recipe calls it. family: the stage that it serves (`quantize`, `prune`, `lowrank`, `smooth`, ...).
    scope and what `run` is then called with:
        matrix  run(weight f32 [out, in], stats: LinearStats | None, options, format: str) -> Form, f32 tensor (new
                weights; where some are exactly 0 and the family is `prune`, their mask too) or bool tensor (a mask);
                or one of these and a dict that the unit's record takes (its "fallback": {"done", "why"} says what
                was not done as asked; its "method", which other was used instead). `format` is "" where the recipe
                names none. `rows_apart`: rows do not influence one another, so that a large matrix may be given in
                runs of rows.
        block   run(work, layer: int, block: blocks.Block, options, format) -> dict of the unit's record; puts its
                results into work and leaves `save` to the pipeline.
        model   run(work, calibration: Calibration | None, options, report: dict[, progress=]) -> None; as block. What
                it puts into `report` is recorded and must be a function of the inputs alone (no times); under "texts"
                it lists what else it learned from, as `Calibration.texts` does.
    check: check(work, weight or "", format, options) -> None, called before any work begins, for each weight of a stage
    of scope `matrix`, else once; raises what the shapes tell. Not called after a stage that changes shapes.
    options: a frozen dataclass with defaults. needs: what calibration must give. paper: authors, year, arXiv number.
    """

    name: str
    family: str
    scope: str
    run: Callable[..., Any]
    options: type = NoOptions
    needs: str | Callable[[Any], str] = "nothing"  # or of the options
    paper: str = ""
    rows_apart: bool = False
    summary: str = ""  # one line for the table of docs/compression.md
    defaults: Mapping[str, Any] = field(default_factory=dict)  # where this row begins from others than the dataclass
    place: str = ""  # a key of recipe.ORDER, where it is not the family's own ("structured" of prune)
    masks: bool = False  # matrix scope: `run` takes `mask` (bool [out, in] or None) as a keyword and keeps its zeros
    takes_form: bool = False  # matrix scope: `run` takes `form` (the weight's Form or None) as a keyword
    check: Callable[..., None] | None = None
    plain: tuple[str, ...] = ()  # options that a plain value sets, all of them: `kv: int8`
    idle: Callable[[Any], tuple[str, str] | None] = lambda options: None  # why these options do nothing, and a remedy
    fallback: str = ""  # matrix scope: the method for weights without statistics (embeddings, experts without tokens)

    def need(self, options: Any) -> str:
        """One of NEEDS: what the method asks of calibration with these options."""
        return self.needs(options) if callable(self.needs) else self.needs
