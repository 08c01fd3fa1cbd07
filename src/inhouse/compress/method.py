"""What a row of the table of methods is. Knows no method."""

from collections.abc import Callable
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
        matrix  run(weight f32 [out, in], stats: LinearStats | None, options, format: str) -> Form, f32 tensor or bool
                mask; `format` is "" for methods that give no Form. `rows_apart`: rows do not influence one another, so
                that a large matrix may be given in runs of rows.
        block   run(work, layer: int, block: blocks.Block, options, format) -> dict of the unit's record; puts its
                results into work and leaves `save` to the pipeline.
        model   run(work, calibration: Calibration | None, options, report: dict, progress) -> None; as block.
    options: a frozen dataclass with defaults. needs: what calibration must give. paper: authors, year, arXiv number.
    """

    name: str
    family: str
    scope: str
    run: Callable[..., Any]
    options: type = NoOptions
    needs: str = "nothing"
    paper: str = ""
    rows_apart: bool = False
    summary: str = ""  # one line for the table of docs/compression.md
    defaults: dict[str, Any] = field(default_factory=dict)  # options that this row fixes beside the dataclass's own
