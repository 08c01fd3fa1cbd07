"""What a model computes on its way: hidden states and the heads of attention, taken off a whole-sequence pass.

Knows the ops of a decoder's Program; knows no loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inhouse.core.errors import UnsupportedError
from inhouse.runtime.program import Op
from inhouse.runtime.torch_program import TorchValue


@dataclass(frozen=True, slots=True)
class Heads:
    """One layer's attention as it meets the softmax: q [B, heads, L, D], k [B, kv_heads, L, D], v [B, kv_heads, L, Dv]
    and the factor of q k^T."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float

    def maps(self) -> Tensor:
        """Causal attention probabilities, [B, heads, L, L]."""
        length = self.q.shape[2]
        k = self.k.repeat_interleave(self.q.shape[1] // self.k.shape[1], dim=1)
        scores = self.scale * (self.q @ k.transpose(-1, -2))
        later = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
        return torch.softmax(scores.masked_fill(later, -torch.inf), dim=-1)


@dataclass(frozen=True, slots=True)
class Features:
    """Values of every layer; `hidden[l]` [B * L, width] is the residual stream after layer l."""

    hidden: dict[int, Tensor]
    heads: dict[int, Heads]

    @property
    def layers(self) -> int:
        return len(self.hidden)


class Tap:
    """An `observe` of torch_dense.forward that keeps each layer's last value and its attention's inputs.

    Raises UnsupportedError for attention whose maps are no plain causal softmax (a window, a cap, a bias, latent V).
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self._batch, self._length = shape
        self._hidden: dict[int, Tensor] = {}
        self._heads: dict[int, Heads] = {}

    def __call__(self, op: Op, inputs: Sequence[TorchValue], outputs: Sequence[TorchValue]) -> None:
        if op.layer < 0:
            return
        if op.kind == "attention":
            self._heads[op.layer] = self._attention(op, inputs)
        if outputs and isinstance(outputs[0], Tensor):
            self._hidden[op.layer] = outputs[0]

    def features(self) -> Features:
        """What was seen."""
        return Features(self._hidden, self._heads)

    def _attention(self, op: Op, inputs: Sequence[TorchValue]) -> Heads:
        plain = op.attrs["mask"] == "causal" and not any(
            op.attrs.get(name) not in (None, 0, 0.0, False, "none", "")
            for name in ("window", "softcap", "bias", "v_from_k", "cross")
        )
        if not plain:
            raise UnsupportedError(f"layer {op.layer} has no plain causal attention: its maps are not distilled")
        kv_heads = int(op.attrs["kv_heads"])
        q, k, v = (x for x in inputs if isinstance(x, Tensor))
        return Heads(
            self._split(q, int(op.attrs["heads"])), self._split(k, kv_heads), self._split(v, kv_heads),
            float(op.attrs["scale"]),
        )  # fmt: skip

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.reshape(self._batch, self._length, heads, -1).transpose(1, 2)
