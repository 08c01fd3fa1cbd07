"""Structured pruning: scores of FFN channels, heads, hidden channels and layers, and what the rest makes up for.

Minitron (Muralidharan et al. 2024, arXiv 2407.14679): activation-based scores, uniform widths, one round. ShortGPT (Men
et al. 2024, arXiv 2403.03853): layers by block influence. What remains of `down` and `o` is fitted by least squares to
the outputs before the cut (as ZipLM, arXiv 2302.04089, does for groups), and the norms are scaled to what stays.
Scores and indices here; which axis of which weight is what is told by `compress.slicing`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from inhouse.compress.activations import Seen, observe
from inhouse.compress.calibrate import Calibration
from inhouse.compress.slicing import (
    Cut,
    Index,
    check_parts,
    cut_spec,
    cut_weight,
    kept_width,
    layer_of,
    renamed,
    spread_heads,
)
from inhouse.compress.values import LessThanOne, Natural, NotNegative
from inhouse.compress.work import Work
from inhouse.core.errors import UnsupportedError, UsageError
from inhouse.core.progress import Progress, silent
from inhouse.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class StructuredOptions:
    """What goes. Shares are of the width now; `multiple` 0: see `slicing.kept_width`."""

    ffn: LessThanOne = 0.0  # share of the FFN channels
    kv_groups: Natural = 0  # key-value heads, each with all its query heads
    heads_per_group: Natural = 0  # query heads taken from each key-value group that stays
    layers: Natural = 0
    hidden: LessThanOne = 0.0  # share of the hidden channels
    multiple: Natural = 0
    contiguous: bool = False  # layers that go are neighbours
    compensate: bool = True  # fit what stays of `down` and `o`
    damping: NotNegative = 1e-3


@dataclass(frozen=True, slots=True)
class Scores:
    """How much each part matters; f64. By layer of the model at hand."""

    ffn: Mapping[int, Tensor]  # [ffn]
    heads: Mapping[int, Tensor]  # [heads]
    hidden: Tensor  # [hidden]
    influence: Tensor  # [layers]


def channel_scores(weight: Tensor, mean_square: Tensor) -> Tensor:
    """Energy that each input adds to the outputs of a linear [out, in]: E[x_j^2] * |w_j|^2, f64 [in]."""
    return mean_square.double() * weight.double().square().sum(0)


def head_scores(weight: Tensor, gram: Tensor, heads: int) -> Tensor:
    """Energy that each head adds to the outputs of `o` [hidden, heads * dim]: tr(W_h G_hh W_h^T), f64 [heads]."""
    w, g = weight.double(), gram.double()
    dim = weight.shape[1] // heads
    runs = [slice(h * dim, (h + 1) * dim) for h in range(heads)]
    return torch.stack([((w[:, run] @ g[run, run]) * w[:, run]).sum() for run in runs])


def plan_cut(spec: ModelSpec, scores: Scores, options: StructuredOptions) -> tuple[Cut, list[str]]:
    """What stays, and one sentence about each width. Ties fall in favour of the earlier part.

    Raises UsageError where more is to go than there is.
    """
    notes: list[str] = []
    layers = _layers(spec, scores.influence, options)
    ffn = hidden = None
    if options.ffn:
        count, why = kept_width(spec.ffn, options.ffn, options.multiple)
        notes.append(f"FFN {spec.ffn} -> {count}: {why}")
        ffn = {i: _highest(scores.ffn[i], count) for i in scores.ffn}
    heads, kv_heads = _heads(spec, scores.heads, options)
    if options.hidden:
        count, why = kept_width(spec.hidden, options.hidden, options.multiple)
        notes.append(f"hidden {spec.hidden} -> {count}: {why}")
        hidden = _highest(scores.hidden, count)
    if layers is not None:
        gone = [i for i in range(spec.layers) if i not in layers]
        told = ", ".join(f"{i} ({float(scores.influence[i]):.4g})" for i in gone)
        notes.append(f"layers {spec.layers} -> {len(layers)}: by block influence {told}")
    if heads is not None:
        notes.append(f"heads {spec.heads} -> {len(heads[0])}, key-value heads {spec.kv_heads} -> {len(kv_heads[0])}")
    return Cut(layers, hidden, ffn, heads, kv_heads or None), notes


def scores_of(work: Work, seen: Seen) -> Scores:
    """Scores of every part of a model, from what flowed through it. The influence of a part is that of its outputs:
    FFN channels and heads by the energy they add to the residual stream, hidden channels by their mean square in front
    of the linears that read them."""
    spec = work.spec
    assert isinstance(spec, ModelSpec)
    ffn: dict[int, Tensor] = {}
    heads: dict[int, Tensor] = {}
    hidden = torch.zeros(spec.hidden, dtype=torch.float64)
    for i in range(spec.layers):
        for reader in ("attn.q", "mlp.up"):
            found = seen.inputs.get(f"layers.{i}.{reader}.weight")
            if found is not None:
                hidden += found.mean_square
        down, o = f"layers.{i}.mlp.down.weight", f"layers.{i}.attn.o.weight"
        if down in seen.inputs:
            ffn[i] = channel_scores(work.value(down), seen.inputs[down].mean_square)
        if o in seen.inputs and not spec.mla:
            heads[i] = head_scores(work.value(o), seen.inputs[o].mean_gram, spec.heads)
    return Scores(ffn, heads, hidden, seen.influence(spec.layers))


def takes_nothing(options: StructuredOptions) -> tuple[str, str] | None:
    """Why such a stage would do nothing, and the remedy."""
    if options.ffn or options.kv_groups or options.heads_per_group or options.layers or options.hidden:
        return None
    return "every share is 0", "Give at least one of ffn, kv_groups, heads_per_group, layers, hidden"


def structured(
    work: Work,
    calibration: Calibration | None,
    options: StructuredOptions,
    report: dict[str, Any],
    progress: Progress = silent,
) -> None:
    """Scores the model on the calibration texts, removes what the options say, and puts what stays into `work`.

    `report` gets `parameters` before and after, `widths`, and `notes`. Raises UnsupportedError for what is no decoder,
    UsageError where there are no texts or more is to go than there is.
    """
    spec = work.spec
    if not isinstance(spec, ModelSpec):
        raise UnsupportedError(f"{spec.family} is no decoder; structured pruning cuts decoders")
    if calibration is None:
        raise UsageError("structured pruning needs texts to score the parts on", param="calibration")
    check_parts(
        spec, wide=bool(options.ffn or options.hidden), heads=bool(options.kv_groups or options.heads_per_group)
    )
    if options.layers >= spec.layers:
        raise UsageError(
            f"layers: {options.layers} of {spec.layers} layers are to go", remedy=f"Give at most {spec.layers - 1}",
            param="layers",
        )  # fmt: skip
    grams = [f"layers.{i}.{part}.weight" for i in range(spec.layers) for part in ("mlp.down", "attn.o")]
    seen = observe(
        work.program, work.weights(), calibration.tokens, lengths=calibration.lengths, grams=grams, progress=progress
    )
    cut, notes = plan_cut(spec, scores_of(work, seen), options)
    before = sum(work.value(name).numel() for name in work.names())
    apply_cut(work, cut, seen, options)
    after = sum(work.value(name).numel() for name in work.names())
    changed = work.spec
    assert isinstance(changed, ModelSpec)
    widths = {key: getattr(changed, key) for key in ("layers", "hidden", "ffn", "heads", "kv_heads")}
    report |= {"parameters": [before, after], "widths": widths, "notes": notes}


def apply_cut(work: Work, cut: Cut, seen: Seen, options: StructuredOptions) -> None:
    """Puts what stays of every weight, fitted to what went."""
    spec = work.spec
    assert isinstance(spec, ModelSpec)
    changed = cut_spec(spec, cut)
    if cut.hidden is not None and spec.norm == "rms":
        changed = replace(changed, norm_eps=spec.norm_eps * spec.hidden / len(cut.hidden))
    origin = {new: old for old in work.names() if (new := renamed(old, cut.layers)) is not None}
    masks = {new: mask for new, old in origin.items() if (mask := work.mask(old)) is not None}
    work.replace_spec(changed, origin)
    for new, old in origin.items():
        whole = work.value(new)
        value = cut_weight(old, _fitted(old, whole, spec, cut, seen, options), spec, cut)
        if value.shape != whole.shape or not torch.equal(value, whole):
            work.put(new, value)
        if new in masks:
            work.put_mask(new, cut_weight(old, masks[new], spec, cut))


def _fitted(name: str, whole: Tensor, spec: ModelSpec, cut: Cut, seen: Seen, options: StructuredOptions) -> Tensor:
    """The weight before its axes are cut, with what stays making up for what goes."""
    layer, kept = layer_of(name), None
    if name.endswith("mlp.down.weight") and cut.ffn is not None:
        kept = cut.ffn[layer]
    elif name.endswith("attn.o.weight") and cut.heads is not None:
        kept = spread_heads(cut.heads[layer], spec.head_dim)
    if kept is not None and options.compensate:
        whole = whole.clone()
        whole[:, torch.tensor(kept)] = compensated(whole, seen.inputs[name].mean_gram, kept, options.damping)
    is_norm = whole.dim() == 1 and len(whole) == spec.hidden and name.endswith("norm") and name in seen.inputs
    if cut.hidden is not None and spec.norm == "rms" and is_norm:
        factor = norm_factor(seen.inputs[name].mean_square, cut.hidden)
        whole = (whole + spec.norm_offset).mul_(factor).sub_(spec.norm_offset)
    return whole


def _highest(scores: Tensor, count: int) -> Index:
    order = torch.argsort(scores, descending=True, stable=True)[:count]
    return tuple(sorted(int(i) for i in order))


def _layers(spec: ModelSpec, influence: Tensor, options: StructuredOptions) -> Index | None:
    if not options.layers:
        return None
    if not 0 < options.layers < spec.layers:
        raise UsageError(
            f"layers: {options.layers} of {spec.layers} layers are to go", remedy=f"Give at most {spec.layers - 1}",
            param="layers",
        )  # fmt: skip
    if not options.contiguous:
        return _highest(influence, spec.layers - options.layers)
    sums = [float(influence[i : i + options.layers].sum()) for i in range(spec.layers - options.layers + 1)]
    first = sums.index(min(sums))
    return tuple(i for i in range(spec.layers) if not first <= i < first + options.layers)


def _heads(
    spec: ModelSpec, scores: Mapping[int, Tensor], options: StructuredOptions
) -> tuple[dict[int, Index] | None, dict[int, Index]]:
    """Query heads and key-value heads that stay, by layer; None where all do."""
    if not options.kv_groups and not options.heads_per_group:
        return None, {}
    group = spec.heads // spec.kv_heads
    if not (0 <= options.kv_groups < spec.kv_heads and 0 <= options.heads_per_group < group):
        raise UsageError(
            f"{options.kv_groups} of {spec.kv_heads} key-value heads and {options.heads_per_group} of {group} query "
            f"heads of each are to go", remedy="Leave one at least", param="heads",
        )  # fmt: skip
    heads: dict[int, Index] = {}
    kv_heads: dict[int, Index] = {}
    for layer, score in scores.items():
        by_group = score.reshape(spec.kv_heads, group)
        kv_heads[layer] = _highest(by_group.sum(1), spec.kv_heads - options.kv_groups)
        heads[layer] = tuple(
            kv * group + head
            for kv in kv_heads[layer]
            for head in _highest(by_group[kv], group - options.heads_per_group)
        )
    return heads, kv_heads


def compensated(weight: Tensor, gram: Tensor, kept: Sequence[int], damping: float) -> Tensor:
    """What stays of a linear's columns, fitted to the outputs of all: argmin over V of E|W x - V x_K|^2.

    Args:
        weight: f32 [out, in]. gram: [in, in] of its inputs.
        kept: columns that stay. damping: of the mean diagonal; it pulls towards the columns as they are.

    Returns f32 [out, kept]; exactly the columns themselves where the others' inputs are all 0.
    """
    index = torch.tensor(list(kept), dtype=torch.int64)
    gone = torch.ones(weight.shape[1], dtype=torch.bool)
    gone[index] = False
    w, g = weight.double(), gram.double()
    rest = g[gone][:, index]  # [gone, kept]
    plain = w[:, index]
    if not bool(rest.any()):
        return weight[:, index].clone()
    inner = g[index][:, index].clone()
    inner.diagonal().add_(damping * float(inner.diagonal().mean()) + 1e-30)
    solved = torch.linalg.solve(inner, rest.T)  # [kept, gone]
    fitted: Tensor = plain + w[:, gone] @ solved.T
    return fitted.float()


def norm_factor(mean_square: Tensor, kept: Sequence[int]) -> float:
    """What the weight of an RMS norm is multiplied by when hidden channels go, so that what stays is scaled as before:
    sqrt(mean square of what stays / mean square of all), f64; exact together with `eps * hidden / kept` where the
    channels that go are 0.

    Args:
        mean_square: [hidden] of the norm's input over the calibration tokens.
    """
    index = torch.tensor(list(kept), dtype=torch.int64)
    square = mean_square.double()
    return float((square[index].mean() / square.mean().clamp_min(1e-300)).sqrt())
