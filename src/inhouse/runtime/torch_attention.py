"""Attention in torch: which keys a query sees, and the weighted sum over them. Knows no cache."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from inhouse.core.errors import UnsupportedError
from inhouse.runtime.program import Op
from inhouse.runtime.step import BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class Mask:
    """Which keys a query sees, as the attributes of an attention op say it (runtime/ops.py)."""

    kind: str = "causal"
    window: int = 0
    sink: int = 0
    stride: int = 0
    recent: int = 0  # with codes: positions before a query, in whole blocks, that are read as they are,
    coded: bool = False  # and whether these are the others

    @classmethod
    def of(cls, op: Op) -> Self:
        """The mask of an attention op, codes apart."""
        a = op.attrs
        return cls(str(a["mask"]), int(a["window"]), int(a["sink"]), int(a["stride"]))


def visible(queries: Tensor, keys: Tensor, mask: Mask, prefixes: Tensor | None = None) -> Tensor:
    """bool [..., Q, K]: whether the query at a position sees the key at a position (positions [..., Q], [..., K]).
    `prefixes` [...]: with the mask `prefix`, every query sees the keys below it."""
    gap = queries[..., :, None] - keys[..., None, :]
    if mask.kind == "causal":
        return (gap >= 0) & _near(gap, queries, keys, mask)
    if mask.kind == "bidirectional":
        return gap.abs() < mask.window if mask.window else torch.ones_like(gap, dtype=torch.bool)
    if mask.kind == "prefix" and prefixes is not None and not mask.window:
        return (gap >= 0) | (keys < prefixes[..., None])[..., None, :]
    raise UnsupportedError(f"the torch executor has no attention mask {mask.kind!r} here (window {mask.window})")


def _near(gap: Tensor, queries: Tensor, keys: Tensor, mask: Mask) -> Tensor:
    """What a causal mask leaves of the keys at or before a query."""
    if mask.recent:
        boundary = (queries - mask.recent).clamp(min=0) // BLOCK_SIZE * BLOCK_SIZE
        far = keys[..., None, :] < boundary[..., :, None]
        return far if mask.coded else ~far
    if not mask.window:
        return torch.ones_like(gap, dtype=torch.bool)
    seen, blocks = gap < mask.window, (keys // BLOCK_SIZE)[..., None, :]
    if mask.sink:
        seen = seen | (keys < mask.sink)[..., None, :]
    return seen | (blocks % mask.stride == 0) if mask.stride else seen


def relative_buckets(gap: Tensor, *, buckets: int, max_distance: int, both_ways: bool) -> Tensor:
    """T5's bucket of each key - query distance (arXiv 1910.10683): exact when near, logarithmic when far."""
    first = torch.zeros_like(gap)
    if both_ways:
        buckets //= 2
        first = (gap > 0).long() * buckets
        distance = gap.abs()
    else:
        distance = (-gap).clamp(min=0)
    exact = buckets // 2
    ratio = torch.log(distance.clamp(min=1).float() / exact) / torch.log(torch.tensor(max_distance / exact))
    far = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
    return first + torch.where(distance < exact, distance, far)


def position_bias(
    queries: Tensor, keys: Tensor, table: Tensor, *, bias: str, buckets: int, max_distance: int, mask: str
) -> Tensor:
    """float [..., heads, Q, K] added to the scores. alibi: table [heads] of slopes (arXiv 2108.12409);
    relative: table [buckets, heads]."""
    gap = keys[..., None, :] - queries[..., :, None]
    if bias == "alibi":
        return table.float()[:, None, None] * -gap.abs().float()[..., None, :, :]
    if bias == "relative":
        where = relative_buckets(gap, buckets=buckets, max_distance=max_distance, both_ways=mask != "causal")
        return table.float()[where].movedim(-1, -3)
    raise UnsupportedError(f"unknown attention bias {bias!r}")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None,
    *,
    scale: float,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """q [B, heads, Q, D], k [B, kv_heads, K, D], v [B, kv_heads, K, Dv] -> [B, heads, Q, Dv].

    `seen` bool [B or 1, Q, K], None: causal, Q = K. `bias` float [B or 1, heads, Q, K]. `sinks` [heads]: one more
    score in the softmax of each head that carries no value. Every query must see a key or have a sink.
    """
    if softcap == 0.0 and sinks is None:
        if seen is None and bias is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        add = None if seen is None else seen[:, None]
        if bias is not None:
            add = bias.to(q.dtype) if add is None else bias.to(q.dtype).masked_fill(~add, -torch.inf)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=add, scale=scale, enable_gqa=True)
    return _attend_plain(q, k, v, seen, scale, softcap, bias, sinks)


def _scores(
    q: Tensor, k: Tensor, seen: Tensor | None, scale: float, softcap: float, bias: Tensor | None
) -> Tensor:  # fmt: skip
    """f32 [B, heads, Q, K], minus infinity where a key is not seen."""
    scores = scale * (q.float() @ k.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1).transpose(-1, -2))
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if seen is None:
        seen = torch.ones(1, q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~seen[:, None], -torch.inf)


def _attend_plain(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float, softcap: float, bias: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """`attend` written out, for what the fused function cannot do."""
    scores = _scores(q, k, seen, scale, softcap, bias)
    if sinks is not None:
        sink = sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        weights = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    return (weights @ v.float().repeat_interleave(q.shape[1] // v.shape[1], dim=1)).to(q.dtype)


def _attend_bf16(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float, softcap: float, bias: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """`attend` over K and V of bf16, with queries and weights rounded as the attention op says (runtime/ops.py)."""
    powers = _scores(q.bfloat16(), k, seen, scale, softcap, bias) * math.log2(math.e)
    top = powers.amax(dim=-1, keepdim=True).round()
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = torch.exp2(powers - top).bfloat16().float()
    total = weights.sum(dim=-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks.float()[None, :, None, None] - top * math.log(2.0))
    return (weights @ v.float().repeat_interleave(q.shape[1] // v.shape[1], dim=1) / total).to(q.dtype)


def attend_op(
    op: Op,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None,
    positions: tuple[Tensor, Tensor],
    weights: Sequence[Tensor | None],
) -> Tensor:
    """`attend` with the attributes and optional weights (bias table, sinks) of an attention op.

    `positions` of queries [B, Q] and keys [B, K]; `seen` as in `attend`. Over K and V of bf16, queries and weights are
    rounded too; where activations are bf16 themselves, as the fused function does it.
    """
    table = weights[0] if weights else None
    sinks = weights[1] if len(weights) > 1 else None
    kind, bias = str(op.attrs["bias"]), None
    if (kind == "none") != (table is None):
        raise UnsupportedError(f"an attention op has bias={kind} and {'no' if table is None else 'a'} bias table")
    if table is not None:
        bias = position_bias(
            *positions, table, bias=kind, buckets=int(op.attrs["buckets"]),
            max_distance=int(op.attrs["max_distance"]), mask=str(op.attrs["mask"]),
        )  # fmt: skip
    scale, softcap = float(op.attrs["scale"]), float(op.attrs["softcap"])
    if k.dtype is torch.bfloat16 and q.dtype is not torch.bfloat16:
        return _attend_bf16(q, k, v, seen, scale, softcap, bias, sinks)
    return attend(q, k.to(q.dtype), v.to(q.dtype), seen, scale=scale, softcap=softcap, bias=bias, sinks=sinks)
