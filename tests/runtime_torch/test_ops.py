"""Each operation against an independent account of it: numpy in float64, torch's own layers, transformers."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from inhouse.core.errors import UnsupportedError
from inhouse.runtime import torch_moe as moe
from inhouse.runtime import torch_ops as ops
from inhouse.runtime.ops import ACTIVATIONS, POOLINGS
from inhouse.runtime.packed import quantize_rows_reference
from inhouse.runtime.torch_attention import Mask, attend, position_bias, relative_buckets, visible

pytestmark = pytest.mark.torch


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Any, tolerance: float = 2e-6) -> None:
    b = torch.as_tensor(b, dtype=torch.float32)
    assert a.shape == b.shape
    assert float((a - b).abs().max() / b.abs().max()) < tolerance


def test_rms_norm_of_each_head() -> None:
    x, w = randn(5, 12).double(), randn(4, seed=1).double()
    heads = x.reshape(5, 3, 4)
    expected = (heads / (heads.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (1 + w)).reshape(5, 12)
    close(ops.rms_norm(x.float(), w.float(), eps=1e-5, heads=3, offset=1.0), expected)


def test_no_rows_are_no_trouble() -> None:
    none, weight = torch.zeros(0, 12), torch.ones(12)
    assert ops.rms_norm(none, weight[:4], eps=1e-5, heads=3).shape == (0, 12)
    assert ops.linears(ops.quantize_rows(none, group=8), [randn(5, 12)], [None])[0].shape == (0, 5)
    table = ops.rotary(torch.zeros(0, dtype=torch.int64), weight[:2])
    assert ops.rope(none, table, head_dim=4).shape == (0, 12)
    routing = moe.route(torch.zeros(0, 4), top_k=2)
    (rows,) = moe.expert_linears(moe.dispatch(none, routing), routing, [randn(5, 12)] * 4, [None] * 4, 4)
    assert moe.combine(rows, routing).shape == (0, 5)
    for mode in POOLINGS:
        assert ops.pool(none, torch.zeros(0, dtype=torch.int64), 2, mode=mode).tolist() == [[0.0] * 12] * 2


def test_layer_norm_with_and_without_bias() -> None:
    x, w, b = randn(5, 12), randn(12, seed=1), randn(12, seed=2)
    y = x.double()
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * w.double()
    close(ops.layer_norm(x, w, None, eps=1e-5), y)
    close(ops.layer_norm(x, w, b, eps=1e-5), y + b)


@pytest.mark.parametrize("powers", [False, True])
@pytest.mark.parametrize("group", [0, 32, 16])
@pytest.mark.parametrize("width", [32, 172, 7])
def test_quantised_rows_are_bit_equal_to_the_definition(group: int, width: int, powers: bool) -> None:
    x = randn(9, width) * torch.logspace(-6, 6, 9)[:, None]
    x[1] = 0
    x[2, 3] = 1e-35
    x[3, 0], x[4, 1] = math.nan, math.inf
    ours = ops.quantize_rows(x, group=group, powers=powers)
    codes, scales = quantize_rows_reference(x.numpy(), group, powers)
    np.testing.assert_array_equal(ours.codes.numpy(), codes)
    np.testing.assert_array_equal(ours.scales.numpy(), scales)
    assert (
        float((ours.dequantize()[5:] - x[5:]).abs().max())
        <= float(x[5:].abs().max()) / (127 if powers else 254) * 1.001
    )


def test_linears_of_quantised_rows_multiply_the_integers() -> None:
    x, weights = randn(4, 100), [randn(6, 100, seed=1), randn(3, 100, seed=2)]
    rows, bias = ops.quantize_rows(x, group=32), randn(3, seed=3)
    a, b = ops.linears(rows, weights, [None, bias])
    spread = np.repeat(rows.scales.double().numpy(), 32, axis=1)[:, :100]
    exact = rows.codes.double().numpy() * spread
    close(a, exact @ weights[0].double().numpy().T)
    close(b, exact @ weights[1].double().numpy().T + bias.double().numpy())


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_turns_pairs_by_their_angles(interleaved: bool) -> None:
    x, positions, inv_freq = randn(3, 2 * 10), torch.tensor([0, 7, 100_000]), torch.tensor([1.0, 0.1, 0.003])
    y = ops.rope(x, ops.rotary(positions, inv_freq, factor=1.5), head_dim=10, interleaved=interleaved)
    for row, head, pair in np.ndindex(3, 2, 3):
        first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + 3)
        angle = int(positions[row]) * float(inv_freq[pair])
        turned = (
            complex(x[row, head * 10 + first], x[row, head * 10 + second])
            * 1.5
            * complex(math.cos(angle), math.sin(angle))
        )
        assert float(y[row, head * 10 + first]) == pytest.approx(turned.real, abs=1e-6)
        assert float(y[row, head * 10 + second]) == pytest.approx(turned.imag, abs=1e-6)
    torch.testing.assert_close(y.reshape(3, 2, 10)[..., 6:], x.reshape(3, 2, 10)[..., 6:], rtol=0, atol=0)


def test_every_activation_of_the_table() -> None:
    x = torch.linspace(-6, 6, 61)[None]
    d = x.double().numpy()
    erf = np.vectorize(math.erf)
    expected = {
        "silu": d / (1 + np.exp(-d)), "gelu": d * 0.5 * (1 + erf(d / math.sqrt(2))),
        "gelu_tanh": 0.5 * d * (1 + np.tanh(math.sqrt(2 / math.pi) * (d + 0.044715 * d**3))),
        "relu": np.maximum(d, 0), "quick_gelu": d / (1 + np.exp(-1.702 * d)), "tanh": np.tanh(d),
        "sigmoid": 1 / (1 + np.exp(-d)),
    }  # fmt: skip
    assert set(expected) == set(ACTIVATIONS)
    for name, values in expected.items():
        close(ops.act(x, name), values)
    with pytest.raises(UnsupportedError, match="mish"):
        ops.act(x, "mish")


def test_pooling_of_ragged_sequences() -> None:
    x, sequences = randn(6, 3), torch.tensor([0, 0, 2, 2, 2, 3])
    parts = [x[:2], x[:0], x[2:5], x[5:]]
    pick: dict[str, Any] = {"cls": lambda p: p[0], "last": lambda p: p[-1], "mean": lambda p: p.mean(0),
                            "max": lambda p: p.amax(0)}  # fmt: skip
    assert set(pick) == set(POOLINGS)
    for mode, of in pick.items():
        expected = torch.stack([of(p) if len(p) else torch.zeros(3) for p in parts])
        close(ops.pool(x, sequences, 4, mode=mode), expected)
        close(ops.pool(x, sequences, 4, mode=mode, normalize=True)[0], expected[0] / expected[0].norm())


def plain_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, **options: Any) -> Tensor:
    """One score at a time, in float64."""
    softcap, bias, sinks = options.get("softcap", 0.0), options.get("bias"), options.get("sinks")
    shared = q.shape[1] // k.shape[1]
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b, h, i in np.ndindex(*q.shape[:3]):
        keys = [j for j in range(k.shape[2]) if seen[b % seen.shape[0], i, j]]
        scores = [scale * float(q[b, h, i].double() @ k[b, h // shared, j].double()) for j in keys]
        scores = [softcap * math.tanh(s / softcap) if softcap else s for s in scores]
        if bias is not None:
            scores = [s + float(bias[b % bias.shape[0], h, i, j]) for s, j in zip(scores, keys, strict=True)]
        extra = [float(sinks[h])] if sinks is not None else []
        top = max(scores + extra)
        weights = [math.exp(s - top) for s in scores + extra]
        for weight, j in zip(weights, keys, strict=False):
            out[b, h, i] += weight / sum(weights) * v[b, h // shared, j].double()
    return out


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
def test_attention_in_all_its_forms(softcap: float, with_sinks: bool, with_bias: bool, with_mask: bool) -> None:
    q, k, v = randn(2, 4, 5, 6), randn(2, 2, 5, 6, seed=1), randn(2, 2, 5, 3, seed=2)
    at = torch.arange(5)[None]
    causal = visible(at, at, Mask())
    seen = visible(at, at, Mask(window=2)) if with_mask else causal
    bias = position_bias(at, at, torch.tensor([0.5, 0.25, 0.125, 1.0]), bias="alibi", buckets=0, max_distance=0,
                         mask="causal") if with_bias else None  # fmt: skip
    sinks = randn(4, seed=3) if with_sinks else None
    ours = attend(q, k, v, seen if with_mask or with_bias else None, scale=0.4, softcap=softcap, bias=bias, sinks=sinks)
    close(ours, plain_attention(q, k, v, seen, 0.4, softcap=softcap, bias=bias, sinks=sinks))


def test_masks() -> None:
    at = torch.tensor([[4, 5]])
    keys = torch.arange(7)[None]
    assert visible(at, keys, Mask())[0].int().tolist() == [[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 0]]
    assert visible(at, keys, Mask(window=2))[0].int().tolist() == [[0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 0]]
    assert visible(at, keys, Mask("bidirectional")).all()
    with pytest.raises(UnsupportedError, match="prefix"):
        visible(at, keys, Mask("prefix"))


@pytest.mark.parametrize("both_ways", [True, False])
def test_relative_buckets_are_those_of_t5(both_ways: bool) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    gap = torch.arange(-300, 301)
    bucket: Any = T5Attention._relative_position_bucket
    theirs = bucket(gap, both_ways, num_buckets=32, max_distance=128)
    ours = relative_buckets(gap, buckets=32, max_distance=128, both_ways=both_ways)
    torch.testing.assert_close(ours, theirs)
    table, at = randn(32, 4), torch.arange(5)[None]
    bias = position_bias(at, at, table, bias="relative", buckets=32, max_distance=128,
                         mask="bidirectional" if both_ways else "causal")  # fmt: skip
    assert bias.shape == (1, 4, 5, 5)
    assert bias[0, 2, 4, 1] == table[relative_buckets(torch.tensor(-3), buckets=32, max_distance=128,
                                                      both_ways=both_ways), 2]  # fmt: skip
