"""How token vectors become one vector a text: what sentence-transformers keeps in its `modules.json`.

Plain data, shared by encoders and by decoders that embed; knows no files and writes no operations but its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from inhouse.runtime.ops import Builder
from inhouse.runtime.program import Value, WeightSpec

UNIT = "const.unit"  # prefix of the constants that `normalise` multiplies by


@dataclass(frozen=True, slots=True)
class Dense:
    """A linear layer after pooling (a `2_Dense` folder)."""

    inputs: int
    outputs: int
    bias: bool = True
    activation: str = ""  # of ops.ACTIVATIONS; "": none


@dataclass(frozen=True, slots=True)
class Pooling:
    """Rows to one vector: `mode` of ops.POOLINGS, then the dense layers, then L2 norm 1 if `normalize`."""

    mode: str = "mean"
    normalize: bool = True
    dense: tuple[Dense, ...] = ()

    def width(self, hidden: int) -> int:
        """Elements of the vector that comes out for rows of `hidden`."""
        return self.dense[-1].outputs if self.dense else hidden


def pooling_weights(pooling: Pooling) -> dict[str, WeightSpec]:
    """The canonical weights `dense.{k}.weight` (and `.bias`)."""
    out: dict[str, WeightSpec] = {}
    for k, dense in enumerate(pooling.dense):
        out[f"dense.{k}.weight"] = WeightSpec(f"dense.{k}.weight", (dense.outputs, dense.inputs), "linear")
        if dense.bias:
            out[f"dense.{k}.bias"] = WeightSpec(f"dense.{k}.bias", (dense.outputs,), "vector")
    return out


def pooling_constants(pooling: Pooling, hidden: int) -> Mapping[str, npt.NDArray[np.float32]]:
    """The constants that `pooled` names."""
    if not (pooling.dense and pooling.normalize):
        return {}
    width = pooling.width(hidden)
    return {UNIT: np.full(width, width**-0.5, np.float32)}


def pooled(builder: Builder, pooling: Pooling, hidden: Value) -> Value:
    """hidden [T, W] -> [N, width], one row a sequence."""
    if not pooling.dense:
        return builder.one("pool", hidden, mode=pooling.mode, normalize=pooling.normalize)
    x = builder.one("pool", hidden, mode=pooling.mode)
    for k, dense in enumerate(pooling.dense):
        x = builder.one("linears", x, weights=[f"dense.{k}.weight", f"dense.{k}.bias" if dense.bias else ""])
        if dense.activation:
            x = builder.one("act", x, act=dense.activation)
    if not pooling.normalize:
        return x
    return builder.one("rms_norm", x, weights=[UNIT], eps=1e-24)  # x / sqrt(mean(x^2)) / sqrt(width) = x / |x|
