"""The operations of `runtime.ops` in torch, one small pure function each, apart from attention.

Values are [rows, width]. Every function is differentiable where its mathematics is, and none knows whether its rows
are a step over paged state or whole sequences in training. Row sums and norms are taken in float32 whatever
the type of the rows, so that autocast and bfloat16 weights lose nothing there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inhouse.core.errors import UnsupportedError
from inhouse.runtime.packed_quantize import LEAST_POWER, TINY


@dataclass(frozen=True, slots=True)
class QuantRows:
    """Rows quantised by `quantize_rows`: int8 codes [rows, width], float32 scales [rows, ceil(width / group)]."""

    codes: Tensor
    scales: Tensor
    group: int
    source: Tensor | None = None  # the floats, where a gradient is to reach them

    def dequantize(self) -> Tensor:
        """float32 [rows, width]: what the integers stand for. Gradients pass to the source as if nothing had been
        rounded (the straight-through estimator, arXiv 1308.3432)."""
        spread = self.scales.repeat_interleave(self.group, dim=1)[:, : self.codes.shape[1]]
        values = self.codes.float() * spread
        return values if self.source is None else straight_through(self.source, values)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def straight_through(x: Tensor, values: Tensor) -> Tensor:
    """`values`, bit for bit; the gradient goes to `x` unchanged."""
    out: Tensor = _StraightThrough.apply(x, values.detach())  # type: ignore[no-untyped-call]
    return out


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def embed(ids: Tensor, table: Tensor, *, offset: int = 0, scale: float = 1.0) -> Tensor:
    """ids [rows], table [entries, width] -> [rows, width]."""
    y = F.embedding(ids.long() + offset, table)
    return y if scale == 1.0 else y * scale


def embed_train(ids: Tensor, tables: Sequence[Tensor], widths: Sequence[int], *, scale: float = 1.0) -> Tensor:
    """ids [rows], tables [m_k, r_(k-1) n_k r_k] of a tensor train -> [rows, prod n_k]."""
    digits = []
    for table in reversed(tables):
        digits.append(ids.long() % len(table))
        ids = ids.long() // len(table)
    y = tables[0].new_ones(len(ids), 1, 1)
    for table, width, index in zip(tables, widths, reversed(digits), strict=True):
        slices = F.embedding(index, table).reshape(len(index), y.shape[2], -1)
        y = (y @ slices).reshape(len(index), y.shape[1] * width, -1)
    return y[:, :, 0] if scale == 1.0 else y[:, :, 0] * scale


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, heads: int = 1, offset: float = 0.0) -> Tensor:
    """x [rows, width], weight [width / heads] -> the same shape, normalised over each head apart."""
    y = x.float().reshape(len(x), heads, x.shape[1] // heads)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    gain = weight.float() if offset == 0.0 else weight.float() + offset
    return (y * gain).reshape(x.shape).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float) -> Tensor:
    """x [rows, width], weight [width], bias [width] or None -> the same shape."""
    return F.layer_norm(x.float(), weight.shape, weight.float(), None if bias is None else bias.float(), eps).to(
        x.dtype
    )


def quantize_rows(x: Tensor, *, group: int = 0, powers: bool = False) -> QuantRows:
    """int8 rows with a scale for each `group` elements (0: the row), bit for bit as
    `packed_quantize.quantize_rows_reference` defines them: codes = round-half-even(x * (127 / max|x|)); with `powers`,
    of x over a scale that is a power of two."""
    width = x.shape[1]
    size = group or width
    source = x if x.requires_grad and torch.is_grad_enabled() else None
    x = x.detach()
    padded = F.pad(x.float(), (0, -width % size)).reshape(len(x), -(-width // size), size)
    most = padded.abs().amax(-1)
    finite = torch.isfinite(most)
    usable = finite & (powers | (most >= float(TINY)))
    safe = torch.where(usable, most, torch.ones_like(most))
    exact = most_power(safe / 127.0) if powers else safe / 127.0
    inverse = 1.0 / exact if powers else 127.0 / safe
    codes = torch.round(torch.where(usable[..., None], padded, 0.0) * inverse[..., None]).to(torch.int8)
    scales = torch.where(usable, exact, torch.zeros_like(most)).masked_fill(~finite, torch.nan)
    return QuantRows(codes.flatten(1)[:, :width], scales, size, source)


def most_power(x: Tensor) -> Tensor:
    """The least powers of two that are not below x > 0, and at least LEAST_POWER; float32 of x's shape."""
    bits = (x.view(torch.int32) + 0x7FFFFF) & 0x7F800000
    return bits.view(torch.float32).clamp(min=float(LEAST_POWER))


def linears(x: Tensor | QuantRows, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """x [rows, in], weights [out_i, in], biases [out_i] or None -> n values [rows, out_i].

    Quantised rows are multiplied as the numbers they stand for: with float32 weights the sums differ from the
    integer kernels' by float32 rounding alone (the codes and scales are the same).
    """
    rows = x.dequantize() if isinstance(x, QuantRows) else x
    return [linear(rows, w, b) for w, b in zip(weights, biases, strict=True)]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b in the weight's type, or in autocast's where that is on."""
    if torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    return F.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))


def rotary(positions: Tensor, inv_freq: Tensor, *, factor: float = 1.0) -> Tensor:
    """positions [rows], inv_freq [half] -> float32 [rows, 2 * half]: cosines, then sines, both times `factor`.

    Angles are float64: at position 100,000 a float32 product is off by thousandths of a radian."""
    device = positions.device if positions.device.type != "mps" else torch.device("cpu")  # mps has no float64
    angles = positions.to(device, torch.float64)[:, None] * inv_freq.to(device, torch.float64)
    table = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1) * factor
    return table.to(torch.float32).to(positions.device)


def two_part_rotary(positions: Tensor, prefixes: Tensor, inv_freq: Tensor, *, factor: float = 1.0) -> Tensor:
    """`rotary` whose first half of angles stops at the end of each row's prefix, where the second half begins
    (prefixes [rows]; ChatGLM-6B)."""
    turn = (prefixes - 1).clamp(min=0)
    parts = [torch.minimum(positions, turn), (positions - turn).clamp(min=0)]
    tables = [rotary(at, part, factor=factor) for at, part in zip(parts, inv_freq.chunk(2), strict=True)]
    halves = [table.chunk(2, dim=1) for table in tables]  # cosines, sines
    return torch.cat([half[i] for i in range(2) for half in halves], dim=1)


def rope(x: Tensor, table: Tensor, *, head_dim: int, interleaved: bool = False) -> Tensor:
    """x [rows, heads * head_dim], table [rows, D] of `rotary` -> x with the first D of each head rotated."""
    heads = x.reshape(len(x), x.shape[1] // head_dim, head_dim)
    half = table.shape[1] // 2
    cos, sin = table[:, None, :half], table[:, None, half:]  # float32, so the product is
    turned, rest = heads[..., : 2 * half], heads[..., 2 * half :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return torch.cat([turned.to(x.dtype), rest], dim=-1).reshape(x.shape)


def act(x: Tensor, name: str) -> Tensor:
    """The activation called `name`, element by element."""
    if name not in ACTIVATIONS:
        raise UnsupportedError(f"unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name](x)


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap)."""
    return cap * torch.tanh(x / cap)


def pool(x: Tensor, sequences: Tensor, count: int, *, mode: str, normalize: bool = False) -> Tensor:
    """x [rows, width], sequences [rows] ascending -> [count, width], one row a sequence; empty ones are zero."""
    if not len(x):
        return x.new_zeros(count, x.shape[1])
    lengths = torch.bincount(sequences, minlength=count)
    ends = lengths.cumsum(0)
    full = (lengths > 0)[:, None]
    last = x.shape[0] - 1
    if mode == "cls":
        y = x[(ends - lengths).clamp(max=last)]
    elif mode == "last":
        y = x[(ends - 1).clamp(min=0)]
    elif mode == "mean":
        total = torch.zeros(count, x.shape[1], dtype=torch.float32, device=x.device)
        y = total.index_add(0, sequences, x.float()) / lengths.clamp(min=1)[:, None]
    elif mode == "max":
        lowest = torch.full((count, x.shape[1]), -torch.inf, dtype=x.dtype, device=x.device)
        y = lowest.scatter_reduce(0, sequences[:, None].expand_as(x), x, "amax")
    else:
        raise UnsupportedError(f"unknown pooling {mode!r}")
    y = torch.where(full, y, torch.zeros_like(y))
    return F.normalize(y.float(), dim=-1) if normalize else y


def glu(gate: Tensor, up: Tensor, name: str, *, limit: float = 0.0, offset: float = 0.0) -> Tensor:
    """act(gate) * (up + offset); limit > 0: gate at most that, up within -limit..limit."""
    if limit > 0.0:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return act(gate, name) * (up if offset == 0.0 else up + offset)


def concat(x: Tensor, y: Tensor, *, heads: int) -> Tensor:
    """x [rows, heads * a], y [rows, heads * b] -> [rows, heads * (a + b)]: in each head x's elements, then y's."""
    parts = [v.reshape(len(v), heads, v.shape[1] // heads) for v in (x, y)]
    return torch.cat(parts, dim=-1).flatten(1)


def head_linears(x: Tensor | QuantRows, weight: Tensor, *, heads: int) -> Tensor:
    """x [rows, heads * in], weight [heads * out, in] -> [rows, heads * out]: each head times its own rows."""
    rows = x.dequantize() if isinstance(x, QuantRows) else x
    each = rows.reshape(len(rows), heads, -1).transpose(0, 1).to(weight.dtype)
    y = torch.bmm(each, weight.reshape(heads, -1, weight.shape[1]).transpose(1, 2))
    return y.transpose(0, 1).flatten(1)
