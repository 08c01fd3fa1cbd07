"""Whole sequences at once, without a cache: the differentiable form of a Program that training, compression and
evaluation run. Gradients flow to whatever weights the caller passes; autocast and every device work."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from inhouse.core.errors import UnsupportedError, UsageError
from inhouse.runtime.program import Axis, Op, Program
from inhouse.runtime.torch_attention import Mask, attend_op, visible
from inhouse.runtime.torch_program import Observe, TorchValue, evaluate


def forward(
    program: Program,
    tokens: Tensor,
    weights: Mapping[str, Tensor],
    *,
    positions: Tensor | None = None,
    segments: Tensor | None = None,
    rows: Tensor | None = None,
    observe: Observe | None = None,
) -> dict[str, Tensor]:
    """Runs `program` over whole sequences; differentiable with respect to `weights`.

    Args:
        program: a Program over tokens (`step`, `embed`).
        tokens: int64 [B, L] token ids; pad short rows on the right and leave their logits out of the loss.
        weights: canonical name -> tensor; linears [out, in], vectors; constants (`const.*`) among them.
        positions: int64 [B, L]; default 0..L-1 in each row. With `segments`, pass positions that restart.
        segments: int64 [B, L]; tokens attend only tokens of the same segment of their row (packed documents).
        rows: int64 [S], indices into the flattened B * L; logits are computed for these alone.
        observe: called after each op with (op, inputs, outputs).

    Returns:
        role -> tensor: over all tokens [B, L, width] (with `rows`, selected values are [S, width]), pooled
        [B, width].

    Raises:
        UsageError: a weight is missing. UnsupportedError: the Program has cross attention.
    """
    if tokens.dim() != 2:
        raise UsageError(f"tokens must be [batch, length], got {list(tokens.shape)}")
    dense = DenseRows(tokens, positions, segments, rows)
    outputs = evaluate(program, weights, dense, observe)
    shaped = dict(outputs)
    for role, value in program.outputs.items():
        if value.axis is Axis.TOKENS or (value.axis is Axis.SAMPLED and rows is None):
            shaped[role] = outputs[role].reshape(*tokens.shape, -1)
    return shaped


class DenseRows:
    """Rows of B sequences of L tokens, flattened to B * L; implements `torch_program.Rows`."""

    def __init__(self, tokens: Tensor, positions: Tensor | None, segments: Tensor | None, rows: Tensor | None) -> None:
        self._batch, self._length = tokens.shape
        self._index = torch.arange(self._length, device=tokens.device)
        self._tokens = tokens
        self._positions = self._index.expand(self._batch, -1) if positions is None else positions
        self._segments, self._rows = segments, rows
        self._masks: dict[Mask, Tensor | None] = {}

    def ids(self, source: str, axis: Axis) -> Tensor:
        if axis is not Axis.TOKENS:
            raise UnsupportedError(f"whole-sequence mode has no rows of axis {axis}")
        if source == "prefixes":
            raise UnsupportedError("whole-sequence mode knows no prefixes")
        if source == "types":
            return torch.zeros_like(self._tokens).flatten()
        return (self._tokens if source == "tokens" else self._positions).flatten()

    def select(self, x: Tensor) -> Tensor:
        return x if self._rows is None else x[self._rows]

    def sequences(self, axis: Axis) -> tuple[Tensor, int]:
        batch = torch.arange(self._batch, device=self._tokens.device)
        return batch.repeat_interleave(self._length), self._batch

    def attention(self, op: Op, inputs: Sequence[Tensor], weights: Sequence[Tensor | None]) -> Tensor:
        if op.attrs["cross"]:
            raise UnsupportedError("whole-sequence mode has no cross attention")
        q = inputs[0]
        heads, kv_heads = int(op.attrs["heads"]), int(op.attrs["kv_heads"])
        seen = self._seen(Mask.of(op))
        at = (self._positions, self._positions)
        k = self._heads(inputs[1], kv_heads)
        v = k[..., : int(op.attrs["v_dim"])] if op.attrs["v_from_k"] else self._heads(inputs[2], kv_heads)
        y = attend_op(op, self._heads(q, heads), k, v, seen, at, weights)
        return y.transpose(1, 2).reshape(q.shape[0], -1)

    def write_cross(self, op: Op, k: Tensor, v: Tensor) -> None:
        raise UnsupportedError("whole-sequence mode has no cross attention")

    def adapt(self, op: Op, x: TorchValue, made: Sequence[Tensor]) -> Sequence[Tensor]:
        return made  # whole-sequence mode trains adapters as weights of their own

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        """[B * L, heads * D] -> [B, heads, L, D]."""
        return x.reshape(self._batch, self._length, heads, -1).transpose(1, 2)

    def _seen(self, mask: Mask) -> Tensor | None:
        """bool [B or 1, L, L]; None: plain causal, which has the fastest kernels."""
        if mask.window >= self._length:
            mask = replace(mask, window=0, sink=0, stride=0)
        if mask not in self._masks:
            if mask == Mask() and self._segments is None:
                self._masks[mask] = None
            else:
                seen = visible(self._index[None], self._index[None], mask)
                if self._segments is not None:
                    seen = seen & (self._segments[:, :, None] == self._segments[:, None, :])
                self._masks[mask] = seen
        return self._masks[mask]
