"""GPTAQ: rounding with feedback towards what the first model's layers gave, on the inputs that the rounded ones give.

Li et al. 2025, arXiv 2504.02692 (asymmetric calibration), over GPTQ (Frantar et al. 2022, 2210.17323); matrices that
write into the residual stream also make up the stream's loss so far, and norms are re-solved. One layer at a time.
"""

from typing import Any

from inhouse.compress.blocks import Block
from inhouse.compress.drift import DriftOptions, drift_layer
from inhouse.compress.work import Work
from inhouse.core.errors import UsageError


def gptaq(work: Work, layer: int, block: Block, options: DriftOptions, fmt: str) -> dict[str, Any]:
    """Rounds the linears of a layer to `fmt`, or each to its own of `block.formats`. Raises UsageError without one."""
    formats = block.formats
    if not any(formats.values()):
        raise UsageError("gptaq needs a format", remedy="Write format: i4_g32 beside the method", param="format")
    return drift_layer(work, block, lambda name: formats.get(name, ""), options)
