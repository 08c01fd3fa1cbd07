"""GPTQ: columns are rounded one after another, and what each lost is made up by those not yet rounded.

Frantar, Ashkboos, Hoefler, Alistarh 2022, arXiv 2210.17323; static act-order as in the authors' later code.
"""

from typing import Any

from torch import Tensor

from inhouse.compress.feedback import GptqOptions, gptq_codes
from inhouse.compress.grids import Grid
from inhouse.compress.quadratic import relative_error
from inhouse.compress.stats import LinearStats
from inhouse.core.errors import UsageError
from inhouse.runtime.form import Form

ERROR_INPUTS = 4096  # of wider matrices the error would take as long as the rounding


def gptq(weight: Tensor, stats: LinearStats | None, options: GptqOptions, fmt: str) -> tuple[Form, dict[str, Any]]:
    """weight f32 [out, in], stats with a Gram matrix -> Form, and a record: `error`, the share of the output's energy
    that is lost; `note`, `fallback` and another `method` where something was done otherwise. Raises UsageError without
    a Gram matrix."""
    if stats is None or stats.gram is None:
        raise UsageError("GPTQ needs the Gram matrix of the inputs", remedy="Give calibration texts")
    grid = Grid(fmt, weight.shape[1])
    done = gptq_codes(weight, stats.gram, grid, options)
    packed = grid.pack(done.codes, done.params)
    record: dict[str, Any] = {"note": done.note} if done.note else {}
    if done.plain:
        record |= {"method": "rtn", "fallback": {"done": f"rtn {fmt}", "why": done.plain}}
    if weight.shape[1] <= ERROR_INPUTS:
        record["error"] = relative_error(weight, grid.decode(done.codes, done.params, grid.index()), stats.gram)
    return Form(packed), record
