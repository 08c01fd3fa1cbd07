"""GGUF mixtures: llama.cpp's choice of block types by what a matrix does, encoded with an importance matrix.

llama.cpp's quantize tool (`Q3_K_M`, `Q4_K_M`, `Q5_K_M`; its importance matrix is the mean square of each input): v and
down of the first and last eighth of the layers and of every third between get more bits, the head six. Where a width is
no multiple of a super-block, the type that llama.cpp falls back to. Which matrices are v and down is derived from the
graph.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from inhouse.compress.blocks import BlockRunner, Tap
from inhouse.compress.calibrate import Calibration
from inhouse.compress.fallbacks import KEY, fallback
from inhouse.compress.graph import matrices_of, readers
from inhouse.compress.grids import Grid, fitting
from inhouse.compress.work import Work
from inhouse.core.errors import UnsupportedError
from inhouse.core.progress import Progress
from inhouse.runtime.form import Form
from inhouse.runtime.program import Program

Mixture = Literal["q2_k", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k"]
# Mixture -> (format of most matrices, of some layers' v and down).
MIXTURES: Mapping[str, tuple[str, str]] = {
    "q2_k": ("q2_k", "q3_k"), "q3_k_m": ("q3_k", "q5_k"), "q4_k_m": ("q4_k", "q6_k"), "q5_k_m": ("q5_k", "q6_k"),
    "q6_k": ("q6_k", "q6_k"),
}  # fmt: skip
NARROWER: Mapping[str, str] = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}


@dataclass(frozen=True, slots=True)
class GgufMixOptions:
    """mixture: by llama.cpp's name. importance: errors weigh as the mean squares of the inputs."""

    mixture: Mixture = "q4_k_m"
    importance: bool = True


def roles(program: Program) -> dict[str, str]:
    """Matrix -> `v` (what attention reads as values), `down` (what reads a gated product or an activation in a layer),
    `head` (a linear outside the layers) or `other`."""
    reading = readers(program)
    found: dict[str, str] = {}
    for op in program.ops:
        for place, name in enumerate(matrices_of(op)):
            users = reading.get(op.outputs[place % len(op.outputs)].id, []) if op.outputs else []
            value = op.outputs[place % len(op.outputs)].id
            if op.layer < 0:
                found[name] = "head"
            elif any(user.kind == "attention" and [i.id for i in user.inputs].index(value) == 2 for user in users):
                found[name] = "v"
            elif any(o.kind in ("glu", "act") and o.outputs[0].id == op.inputs[0].id for o in program.ops):
                found[name] = "down"
            else:
                found.setdefault(name, "other")
    return found


def more_bits(layer: int, layers: int) -> bool:
    """Whether llama.cpp gives v and down of this layer the better type."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def choose(work: Work, mixture: str) -> tuple[dict[str, str], list[dict[str, str]]]:
    """(matrix -> format, fallbacks where it is not the mixture's own)."""
    base, more = MIXTURES[mixture]
    layer_of = {name: op.layer for op in work.program.ops for name in matrices_of(op)}
    layers = len({layer for layer in layer_of.values() if layer >= 0})
    role = roles(work.program)
    chosen: dict[str, str] = {}
    notes: list[dict[str, str]] = []
    for name in work.matrices():
        kind = role.get(name, "head")
        fmt = "q6_k" if kind == "head" else base
        if kind in ("v", "down") and more_bits(layer_of[name], layers):
            fmt = more
        inputs = work.shape(name)[1]
        if not fitting(fmt, inputs):
            narrow = NARROWER[fmt]
            notes.append(fallback(name, fmt, narrow, f"{inputs} inputs are no multiple of 256"))
            fmt = narrow
        chosen[name] = fmt
    return chosen, notes


def ggufmix(
    work: Work, calibration: Calibration | None, options: GgufMixOptions, report: dict[str, Any], progress: Progress
) -> None:
    """Model scope: every matrix as the mixture says, true-sequentially where there is calibration. Raises
    UnsupportedError for a model with experts, whose matrices this page does not tell apart."""
    if any(op.kind == "expert_linears" for op in work.program.ops):
        raise UnsupportedError("gguf mixtures of models with experts are not made", remedy="Use auto or rtn per format")
    chosen, notes = choose(work, options.mixture)
    done: set[str] = set()

    def encode(name: str, importance: Any) -> None:
        grid = Grid(chosen[name], work.shape(name)[1])
        work.put_form(name, Form(grid.quantize(work.value(name), importance)))
        done.add(name)

    def visit(tap: Tap) -> None:
        for name, stats in tap.stats.items():
            encode(name, stats.mean_square if stats.count and bool((stats.mean_square > 0).any()) else None)

    if options.importance and calibration is not None:
        BlockRunner(work, calibration, work.folder).run(visit, lambda name: False, progress)
    for name in chosen:
        if name not in done:
            encode(name, None)
    report["formats"] = chosen
    if notes:
        report[KEY] = notes
