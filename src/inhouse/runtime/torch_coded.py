"""K and V as codes in torch: a block's codes from its f16 form, and back (kv_codes.py says what they are). The truth
that native/src/ops/attention_codes-inl.h is compared with; knows no steps and no tables."""

import torch
from torch import Tensor

from inhouse.runtime.program import StateGroup
from inhouse.runtime.step import BLOCK_SIZE

VALUE_GROUP = 32  # elements of V that share a scale and a minimum


def plane_shapes(group: StateGroup) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """What is kept of a block: K codes [kv, head_dim, 16], K scales and minimums [kv, head_dim], their units [kv, 3],
    V codes [16, kv, v_dim], V scales and minimums [16, kv, groups, 2]. A code takes a byte here."""
    kv, dim, groups = group.kv_heads, group.head_dim, -(-group.v_dim // VALUE_GROUP)
    byte = torch.uint8
    return (
        ((kv, dim, BLOCK_SIZE), byte), ((kv, dim), byte), ((kv, dim), byte), ((kv, 3), torch.float32),
        ((BLOCK_SIZE, kv, group.v_dim), byte), ((BLOCK_SIZE, kv, groups, 2), torch.float16),
    )  # fmt: skip


def encode_block(group: StateGroup, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Whole blocks k [n, 16, kv, head_dim], v [n, 16, kv, v_dim], both f16, as `plane_shapes` says."""
    return *_encode_keys(k.float(), 2**group.k_bits - 1), *_encode_values(v.float(), 2**group.v_bits - 1)


def decode_block(group: StateGroup, planes: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """What the codes stand for: f32 K [n, 16, kv, head_dim], V [n, 16, kv, v_dim]."""
    codes, scales, minimums, units, v_codes, params = planes
    scale, minimum = _channels(units, scales, minimums)
    k = torch.addcmul(minimum[..., None], codes.float(), scale[..., None])
    wide = params.float().repeat_interleave(VALUE_GROUP, dim=-2)[..., : group.v_dim, :]
    return k.permute(0, 3, 1, 2), torch.addcmul(wide[..., 1], v_codes.float(), wide[..., 0])


def _channels(units: Tensor, scales: Tensor, minimums: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and minimum of each channel, f32 [n, kv, head_dim], from their bytes and units [n, kv, 3]."""
    unit, base, step = (units[..., i, None] for i in range(3))
    return unit * scales.float(), base + step * minimums.float()


def _encode_keys(x: Tensor, levels: int) -> tuple[Tensor, ...]:
    low, high = x.amin(dim=1), x.amax(dim=1)
    finite = x.isfinite().all(dim=3).all(dim=1)  # [n, kv]
    base = low.amin(dim=-1)
    step = torch.where(finite, (low.amax(dim=-1) - base) / 255, 0.0)
    at = torch.where(step[..., None] > 0, (low - base[..., None]) / step[..., None], 0.0)
    minimums = at.nan_to_num().clamp(0, 255).to(torch.uint8)
    bare = torch.stack([torch.zeros_like(base), base, step], dim=-1)
    wide = (high - _channels(bare, minimums, minimums)[1]) / levels
    unit = wide.amax(dim=-1).clamp(min=0) / 255
    steps = torch.where((unit[..., None] > 0) & (wide > 0), wide / unit[..., None], 0.0)
    scales = steps.nan_to_num().ceil().clamp(0, 255).to(torch.uint8)
    nan = torch.full_like(unit, torch.nan)
    units = torch.stack([torch.where(finite, unit, nan), torch.where(finite, base, nan), step], dim=-1)
    scale, minimum = _channels(units, scales, minimums)
    return _round(x.permute(0, 2, 3, 1), scale[..., None], minimum[..., None], levels), scales, minimums, units


def _encode_values(x: Tensor, levels: int) -> tuple[Tensor, ...]:
    groups = torch.split(x, VALUE_GROUP, dim=-1)
    minimum = torch.stack([part.amin(dim=-1) for part in groups], dim=-1)
    scale = (torch.stack([part.amax(dim=-1) for part in groups], dim=-1) - minimum) / levels
    finite = torch.stack([part.isfinite().all(dim=-1) for part in groups], dim=-1)
    scale, minimum = torch.where(finite, scale, 0.0), torch.where(finite, minimum, torch.nan)
    params = torch.stack([scale, minimum], dim=-1).half()
    wide = params.float().repeat_interleave(VALUE_GROUP, dim=-2)[..., : x.shape[-1], :]
    return _round(x, wide[..., 0], wide[..., 1], levels), params


def _round(x: Tensor, scale: Tensor, minimum: Tensor, levels: int) -> Tensor:
    """The nearest code of each element, uint8; 0 where the scale is 0 or not a number."""
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
    return ((x - minimum) * inverse).round().nan_to_num().clamp(0, levels).to(torch.uint8)
