"""Cutting a decoder's weights: which axis of which canonical weight is what, and the spec that remains.

A `Cut` names what stays: layers, hidden channels, FFN channels and heads of each layer. Every layer keeps the same
number, because one spec (and one config.json) has to describe them all. Knows names and shapes; no scores, no files.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from inhouse.core.errors import UnsupportedError, UsageError
from inhouse.model.spec import ModelSpec, check_spec

Index = tuple[int, ...]

MULTIPLES = (256, 64, 32)
_WHY = {
    256: "K-quants (q4_k and the like) have super-blocks of 256 inputs; other widths fall back to 32-wide formats",
    64: "groups of 64 (u4_g64, nf4_g64) divide it; multiples of 256 are too far from what was asked for",
    32: "code formats have blocks of 32 inputs and pad what is between: nothing would be saved there",
    1: "the width is below one block of 32",
}
_AXES = {
    "embed.weight": ("vocab", "hidden"),
    "positions.weight": ("", "hidden"),
    "head.weight": ("vocab", "hidden"),
    "head.bias": ("vocab",),
    "attn.q.weight": ("q", "hidden"),
    "attn.k.weight": ("kv", "hidden"),
    "attn.v.weight": ("kv", "hidden"),
    "attn.o.weight": ("hidden", "q"),
    "attn.q.bias": ("q",),
    "attn.k.bias": ("kv",),
    "attn.v.bias": ("kv",),
    "attn.o.bias": ("hidden",),
    "attn.sinks": ("heads",),
    "mlp.gate.weight": ("ffn", "hidden"),
    "mlp.up.weight": ("ffn", "hidden"),
    "mlp.down.weight": ("hidden", "ffn"),
    "mlp.gate.bias": ("ffn",),
    "mlp.up.bias": ("ffn",),
    "mlp.down.bias": ("hidden",),
}


@dataclass(frozen=True, slots=True)
class Cut:
    """What stays, ascending; None: all. `ffn`, `heads` and `kv_heads` are by layer of the model before the cut."""

    layers: Index | None = None
    hidden: Index | None = None
    ffn: Mapping[int, Index] | None = None
    heads: Mapping[int, Index] | None = None
    kv_heads: Mapping[int, Index] | None = None


def kept_width(total: int, share: float, multiple: int = 0) -> tuple[int, str]:
    """How many of `total` channels stay when about `share` go, and why that number.

    Args:
        multiple: what the width must be a multiple of; 0: the largest of 256, 64 and 32 that is within a sixteenth of
            `total` of what was asked for, else 32, since formats pad to that anyway.

    Raises UsageError for a share that is no share, or that leaves nothing.
    """
    if not 0.0 <= share < 1.0:
        raise UsageError(f"a share of {share:g} to remove", remedy="Use a share of 0 or more and below 1")
    wanted = total * (1.0 - share)
    for m in (multiple,) if multiple else MULTIPLES:
        kept = max(m, round(wanted / m) * m)
        if kept <= total and (multiple or m == MULTIPLES[-1] or abs(kept - wanted) <= total / 16):
            if kept == total and share:
                raise UsageError(
                    f"{share:.1%} of {total} channels is less than half of {m}, the least that can go: nothing would",
                    remedy="Ask for more, or name a smaller multiple",
                )
            return kept, _WHY.get(m, f"a multiple of {m} was asked for")
    if multiple:
        raise UsageError(f"no multiple of {multiple} is left of {total}", remedy="Name a smaller multiple")
    return max(1, round(wanted)), _WHY[1]


def axes(name: str, spec: ModelSpec) -> tuple[str, ...]:
    """What each axis of a canonical weight is: vocab, hidden, ffn, q, kv, heads, or "" for what is never cut. Raises
    UnsupportedError for weights that no cut is known for (mixtures of experts, latent attention)."""
    local = re.sub(r"^layers\.\d+\.", "", name)
    if local in _AXES:
        return _AXES[local]
    if local.removesuffix("_bias") in ("attn.q_norm", "attn.k_norm"):
        wide = "q" if local.startswith("attn.q") else "kv"
        return (wide if spec.qk_norm_width else "",)
    if local.removesuffix("_bias").endswith("norm"):
        return ("hidden",)
    raise UnsupportedError(f"{name} is of a part whose widths are not cut", param=name)


def _known(name: str) -> bool:
    local = re.sub(r"^layers\.\d+\.", "", name)
    return local in _AXES or local.removesuffix("_bias").endswith("norm")


def cut_spec(spec: ModelSpec, cut: Cut) -> ModelSpec:
    """The spec of what stays.

    Raises:
        UsageError: layers keep different numbers, an index is out of range, or query heads do not fall evenly on the
            key-value heads that stay.
        UnsupportedError: the part has no such cut (experts, latent attention, heads with ALiBi).
    """
    layers = _checked(cut.layers, spec.layers, "layers")
    hidden = _checked(cut.hidden, spec.hidden, "hidden channels")
    check_parts(spec, wide=bool(cut.ffn or cut.hidden), heads=bool(cut.heads or cut.kv_heads))
    ffn = _even(cut.ffn, layers, spec.ffn, "FFN channels")
    kv_heads = _even(cut.kv_heads, layers, spec.kv_heads, "key-value heads")
    heads = _even(cut.heads, layers, spec.heads, "heads")
    if cut.heads is not None or cut.kv_heads is not None:
        _check_heads(spec, cut, layers)
    moved = {layer: place for place, layer in enumerate(layers)}
    moe = spec.moe and replace(spec.moe, layers=tuple(moved[i] for i in spec.moe.layers if i in moved))
    return check_spec(
        replace(
            spec,
            layers=len(layers),
            hidden=len(hidden),
            ffn=ffn,
            heads=heads,
            kv_heads=kv_heads,
            windows=tuple(spec.windows[i] for i in layers) if spec.windows else (),
            rope_layers=tuple(spec.rope_layers[i] for i in layers) if spec.rope_layers else (),
            moe=moe if moe and moe.layers else None,
        )
    )


def check_parts(spec: ModelSpec, *, wide: bool, heads: bool) -> None:
    """Raises UnsupportedError where widths of FFN or residual stream (`wide`), or heads, cannot be cut."""
    if (spec.mla and (wide or heads)) or (spec.moe and wide):
        raise UnsupportedError("widths of experts and of latent attention are not cut", remedy="Cut layers alone")
    if heads and spec.alibi:
        raise UnsupportedError("heads with ALiBi are not cut: their slopes follow from the number of heads")


def _checked(index: Index | None, total: int, what: str) -> Index:
    if index is None:
        return tuple(range(total))
    if not index or list(index) != sorted(set(index)) or index[0] < 0 or index[-1] >= total:
        raise UsageError(f"{what} that stay must be ascending within 0..{total - 1} and not none, got {index[:8]}")
    return index


def _even(by_layer: Mapping[int, Index] | None, layers: Index, total: int, what: str) -> int:
    """The number that every layer keeps."""
    if by_layer is None:
        return total
    counts = {len(_checked(by_layer[i], total, what)) for i in layers}
    if len(counts) != 1:
        raise UsageError(f"layers keep different numbers of {what}: {sorted(counts)}", remedy="Keep one number in all")
    return counts.pop()


def _check_heads(spec: ModelSpec, cut: Cut, layers: Index) -> None:
    group = spec.heads // spec.kv_heads
    for i in layers:
        heads = cut.heads[i] if cut.heads is not None else tuple(range(spec.heads))
        kv_heads = cut.kv_heads[i] if cut.kv_heads is not None else tuple(range(spec.kv_heads))
        counts = [sum(head // group == kv for head in heads) for kv in kv_heads]
        if sum(counts) != len(heads) or len(set(counts)) != 1:
            raise UsageError(
                f"layer {i} keeps {counts} query heads of its key-value heads {kv_heads} (and {len(heads)} in all)",
                remedy="Remove whole key-value groups, or as many query heads from each",
            )


def cut_weight(name: str, weight: Tensor, spec: ModelSpec, cut: Cut) -> Tensor:
    """What stays of one canonical weight of the model before the cut; `weight` itself where that is all."""
    layer = layer_of(name)
    if (spec.moe or spec.mla) and cut.hidden is None and not _known(name):
        return weight  # experts and latent attention go with their layer, whole
    for axis, kind in enumerate(axes(name, spec)):
        index = _axis_index(kind, layer, spec, cut)
        if index is not None:
            weight = weight.index_select(axis, torch.tensor(index, dtype=torch.int64))
    return weight


def _axis_index(kind: str, layer: int, spec: ModelSpec, cut: Cut) -> Index | None:
    match kind:
        case "hidden":
            return cut.hidden
        case "ffn":
            return None if cut.ffn is None else cut.ffn[layer]
        case "heads":
            return None if cut.heads is None else cut.heads[layer]
        case "q":
            return None if cut.heads is None else spread_heads(cut.heads[layer], spec.head_dim)
        case "kv":
            return None if cut.kv_heads is None else spread_heads(cut.kv_heads[layer], spec.head_dim)
    return None


def spread_heads(heads: Iterable[int], head_dim: int) -> Index:
    """Rows of the heads named."""
    return tuple(head * head_dim + i for head in heads for i in range(head_dim))


def layer_of(name: str) -> int:
    """The layer of a canonical weight; -1 outside the layers."""
    found = re.match(r"layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def renamed(name: str, layers: Index | None) -> str | None:
    """The name that a weight has after layers went; None where its layer went."""
    layer = layer_of(name)
    if layers is None or layer < 0:
        return name
    if layer not in layers:
        return None
    return f"layers.{layers.index(layer)}." + name.split(".", 2)[2]


def cut_weights(weights: Iterable[tuple[str, Tensor]], spec: ModelSpec, cut: Cut) -> Iterator[tuple[str, Tensor]]:
    """(new name, what stays) of every weight that stays."""
    for name, weight in weights:
        new = renamed(name, cut.layers)
        if new is not None:
            yield new, cut_weight(name, weight, spec, cut)
