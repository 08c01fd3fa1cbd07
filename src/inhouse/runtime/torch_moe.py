"""The operations of mixtures of experts in torch. Routed rows are ordered by expert, then by token; how many rows each
expert has is known only here, at run time. Knows no layers and no specs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from inhouse.core.errors import UnsupportedError
from inhouse.runtime.torch_ops import QuantRows, linear


def route(
    logits: Tensor,
    correction: Tensor | None = None,
    *,
    top_k: int,
    normalize: bool = True,
    scoring: str = "softmax",
    scale: float = 1.0,
    groups: int = 0,
    top_groups: int = 0,
    group_score: str = "max",
    jitter: float = 0.0,
) -> Tensor:
    """router logits [T, experts], correction [experts] or None -> [T, 2 * top_k]: expert ids as floats, best first,
    then their weights, as the table of ops says. A stable sort breaks ties by the lower expert."""
    logits = logits.float()
    if scoring == "sparsemixer":
        return _sparsemixer(logits, jitter, scale)
    scores = _scores(logits, scoring)
    choice = scores if correction is None else scores + correction.float()
    if groups:
        choice = choice.masked_fill(~_in_best_groups(choice, groups, top_groups, group_score), -torch.inf)
    experts = torch.sort(choice, dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(1, experts)
    if scoring == "softmax_after":
        weights = torch.softmax(weights, dim=-1)
    elif normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return torch.cat([experts.float(), weights if scale == 1.0 else weights * scale], dim=-1)


def _scores(logits: Tensor, scoring: str) -> Tensor:
    match scoring:
        case "softmax":
            return torch.softmax(logits, dim=-1)
        case "sigmoid":
            return torch.sigmoid(logits)
        case "softmax_after":
            return logits
    raise UnsupportedError(f"unknown scoring {scoring!r}")


def _in_best_groups(choice: Tensor, groups: int, top_groups: int, group_score: str) -> Tensor:
    """bool [T, experts]: whether the expert is in one of the best groups (DeepSeek-V2, arXiv 2405.04434, by their best
    expert; DeepSeek-V3, arXiv 2412.19437, by their two best)."""
    runs = choice.reshape(len(choice), groups, -1)
    values = runs.amax(-1) if group_score == "max" else runs.topk(2, dim=-1).values.sum(-1)
    best = torch.sort(values, dim=-1, descending=True, stable=True).indices[:, :top_groups]
    kept = torch.zeros_like(values, dtype=torch.bool).scatter(1, best, True)
    return kept[..., None].expand_as(runs).reshape(choice.shape)


def _sparsemixer(logits: Tensor, jitter: float, scale: float) -> Tensor:
    """Two experts in turn (arXiv 2409.12136, as used for inference)."""
    left, experts, weights = logits, [], []
    for _ in range(2):
        best = left.argmax(-1, keepdim=True)
        top = left.gather(1, best)
        far = (top - logits) / logits.abs().clamp(min=top) > 2 * jitter
        weights.append(torch.softmax(left.masked_fill(far, -torch.inf), dim=-1).gather(1, best))
        experts.append(best)
        left = left.scatter(1, best, -torch.inf)
    return torch.cat([*(e.float() for e in experts), *(w * scale for w in weights)], dim=-1)


def routed(routing: Tensor) -> tuple[Tensor, Tensor]:
    """routing [T, 2k] -> (order [R] of flat (token, choice) pairs by expert, then token; experts [R] in that order)."""
    top_k = routing.shape[1] // 2
    flat = routing[:, :top_k].long().flatten()
    order = torch.argsort(flat, stable=True)
    return order, flat[order]


def dispatch(x: Tensor, routing: Tensor) -> Tensor:
    """x [T, width], routing [T, 2k] -> [R, width], a row for each (expert, token), by expert, then by token."""
    order, _ = routed(routing)
    return x[order // (routing.shape[1] // 2)]


def expert_linears(
    x: Tensor | QuantRows, routing: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], experts: int
) -> list[Tensor]:
    """x [R, in] of `dispatch`, routing [T, 2k], n * experts weights [out_i, in] and as many biases [out_i] or None, by
    i, then by expert -> n values [R, out_i]."""
    rows = x.dequantize() if isinstance(x, QuantRows) else x
    _, chosen = routed(routing)
    parts = torch.split(rows, torch.bincount(chosen, minlength=experts).tolist())
    out = []
    for first in range(0, len(weights), experts):
        mine = zip(parts, weights[first : first + experts], biases[first : first + experts], strict=True)
        out.append(torch.cat([linear(part, w, b) for part, w, b in mine]))
    return out


def combine(y: Tensor, routing: Tensor) -> Tensor:
    """y [R, width], routing [T, 2k] -> [T, width]: each token's experts, weighted, added in index order."""
    tokens, top_k = routing.shape[0], routing.shape[1] // 2
    order, _ = routed(routing)
    rows = torch.empty_like(order)
    rows[order] = torch.arange(order.numel(), device=order.device)  # where each (token, choice) pair went
    ascending = torch.argsort(routing[:, :top_k], dim=-1, stable=True)
    rows = rows.reshape(tokens, top_k).gather(1, ascending)
    weights = routing[:, top_k:].gather(1, ascending)
    total = y[rows[:, 0]] * weights[:, :1]
    for choice in range(1, top_k):
        total = total + y[rows[:, choice]] * weights[:, choice : choice + 1]
    return total
