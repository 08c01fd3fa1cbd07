"""Pieces of slow references, written from the published descriptions: one sequence, one head at a time, no cache."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Turn = Callable[[Tensor, int], Tensor]  # (vector of a head, row) -> rotated


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [L, W] divided by its root mean square, times the weight."""
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps) * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x [L, W] less its mean, divided by its deviation."""
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / torch.sqrt((centred * centred).mean(dim=-1, keepdim=True) + eps) * weight + bias


def halves(x: Tensor, position: float, base: float = 10000.0) -> Tensor:
    """A head rotated in pairs (i, i + half)."""
    half = len(x) // 2
    angle = position * base ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angle.cos().float(), angle.sin().float()
    return torch.cat([x[:half] * cos - x[half:] * sin, x[half:] * cos + x[:half] * sin])


def pairs(x: Tensor, position: float, base: float = 10000.0) -> Tensor:
    """A vector rotated in pairs (2i, 2i + 1)."""
    y = x.clone()
    for i in range(len(x) // 2):
        angle = position * base ** (-2.0 * i / len(x))
        cos, sin = math.cos(angle), math.sin(angle)
        y[2 * i], y[2 * i + 1] = x[2 * i] * cos - x[2 * i + 1] * sin, x[2 * i] * sin + x[2 * i + 1] * cos
    return y


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    turn: Turn | None = None,
    slopes: list[float] | None = None,
    prefix: int = 0,
) -> Tensor:
    """q [L, heads, D], k and v [L, kv heads, D] -> [L, heads * D]; `prefix`: rows before it see one another."""
    length, heads, dim = q.shape
    out = torch.zeros(length, heads, dim)
    for head in range(heads):
        group = head // (heads // k.shape[1])
        keys = torch.stack([turn(k[j, group], j) if turn else k[j, group] for j in range(length)])
        for i in range(length):
            seen = max(i + 1, prefix if i < prefix else 0)
            query = turn(q[i, head], i) if turn else q[i, head]
            scores = keys[:seen] @ query / math.sqrt(dim)
            if slopes is not None:
                scores = scores - slopes[head] * (i - torch.arange(seen))
            out[i, head] = torch.softmax(scores, dim=0) @ v[:seen, group]
    return out.reshape(length, heads * dim)


def silu(x: Tensor) -> Tensor:
    """x times its sigmoid."""
    return x / (1.0 + torch.exp(-x))


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
