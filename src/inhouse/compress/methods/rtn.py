"""Round to nearest with a good scale: each group's scale is what weighted least squares finds for its codes.

The baseline of every data-aware method (as in Frantar et al. 2022, arXiv 2210.17323), with the closed-form re-solving
of llama.cpp's quantisers and the mean squares of the inputs as weights of the errors (its importance matrix).
"""

from dataclasses import dataclass

from torch import Tensor

from inhouse.compress.grids import Convention, Grid, ScaleMode, Search
from inhouse.compress.stats import LinearStats
from inhouse.runtime.form import Form


@dataclass(frozen=True, slots=True)
class RtnOptions:
    """search: how scales are found. importance: errors weigh as the mean square of their input, where calibration gave
    it. convention: of symmetric scales under minmax and mse. scale: `pow2` for powers of two (dynamic fixed point)."""

    search: Search = "wls"
    importance: bool = True
    convention: Convention = "signed"
    scale: ScaleMode = "free"


def rtn(weight: Tensor, stats: LinearStats | None, options: RtnOptions, fmt: str) -> Form:
    """weight f32 [out, in] -> Form; stats may be None."""
    grid = Grid(fmt, weight.shape[1], options.convention, options.scale)
    heed = stats.mean_square if stats is not None and stats.count and options.importance else None
    return Form(grid.quantize(weight, heed, options.search))
