"""Logarithmic codes and dynamic fixed point: exact sets of values, best codes by enumeration, exponents that follow."""

import itertools

import numpy as np
import pytest
import torch

from inhouse.compress.methods.fixed import Exponent, FixedOptions, fixed, fraction, mantissas, quantised
from inhouse.compress.methods.logcodes import LogOptions, decode, encode, logcodes, table_codes
from inhouse.compress.stats import collect
from inhouse.core.errors import FormatError, UsageError
from inhouse.runtime.packed_stored import stored_nbytes_of


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def every_level() -> torch.Tensor:
    return torch.tensor([0.0, *(sign * 2.0**-q for q in range(7) for sign in (1, -1))])


@pytest.mark.parametrize("rounding", ["log", "linear"])
def test_every_representable_value_is_kept_exactly(rounding: str) -> None:
    values = torch.cat([every_level(), torch.zeros(17)])[None] * torch.tensor([[1.0], [0.375], [24.0]])
    codes, scales = encode(values, rounding=rounding)
    assert torch.equal(decode(codes, scales[:, 0]), values)
    assert scales.flatten().tolist() == [1.0, 0.375, 24.0]
    assert codes.abs().max() == 7


@pytest.mark.parametrize("rounding", ["log", "linear"])
def test_each_code_is_the_nearest_in_its_own_measure(rounding: str) -> None:
    weight = drawn(4, 64, seed=1)
    codes, scales = encode(weight, rounding=rounding)
    scale = scales.repeat_interleave(32, dim=1)
    value = decode(codes.reshape(4, 2, 32), scales).reshape(4, 64)
    levels = every_level()[None, None] * scale[..., None]
    if rounding == "linear":
        nearest = (levels - weight[..., None]).abs().min(2).values
        assert torch.allclose((value - weight).abs(), nearest, atol=1e-7)
    else:
        kept = codes != 0
        ratio = (value / weight)[kept].log2().abs()
        inside = (weight.abs() / scale)[kept] <= 2**0.5
        assert float(ratio[inside].max()) <= 0.5 + 1e-5
    zeros = torch.cat([torch.zeros(2, 32), torch.full((2, 32), 1e-30)], dim=1)
    assert not encode(zeros)[0][:, :32].any()


def test_the_scale_is_as_good_as_a_fine_search() -> None:
    weight = drawn(1, 32, seed=2)
    codes, scales = encode(weight)
    found = float((decode(codes, scales[:, 0]) - weight).square().sum())
    tried = []
    for scale in torch.linspace(0.2, 2.0, 400) * weight.abs().max():
        levels = every_level() * scale
        tried.append(float((levels[None] - weight.T).abs().min(1).values.square().sum()))
    assert found <= 1.02 * min(tried)
    importance = torch.ones(32)
    importance[5] = 1e4
    weighted, other = encode(weight, importance)
    gaps = [(decode(c, s[:, 0]) - weight)[0, 5].abs() for c, s in ((weighted, other), (codes, scales))]
    assert gaps[0] <= gaps[1]


def test_the_packed_form_means_what_the_codes_mean() -> None:
    weight = drawn(33, 70, seed=3)
    form = logcodes(weight, collect([drawn(50, 70, seed=4)], 70), LogOptions(importance=False))
    codes, scales = encode(weight)
    padded = torch.nn.functional.pad(codes, (0, 96 - 70)).reshape(33, 3, 32)
    assert torch.equal(torch.from_numpy(form.value()), decode(padded, scales).reshape(33, 96)[:, :70])
    assert table_codes(codes).max() < 16
    with pytest.raises(UsageError, match="stored as"):
        logcodes(weight, None, LogOptions(), "q4_0")


@pytest.mark.parametrize("size", [1e-4, 0.03, 1.0, 127.4, 3e5])
def test_weights_use_the_whole_mantissa_and_never_overflow(size: float) -> None:
    weight = drawn(20, 48, seed=5)
    weight *= size / weight.abs().max()
    form, record = fixed(weight, collect([drawn(9, 48)], 48), FixedOptions())
    length = record["fraction"]
    most = float(weight.abs().max()) * 2.0**length
    assert 63.75 <= most <= 127.5
    step = 2.0**-length
    value = torch.from_numpy(form.value())
    assert torch.equal(value, quantised(weight, length))
    assert float((value - weight).abs().max()) <= step / 2
    assert torch.equal(value / step, (value / step).round())
    assert "input_fraction" in record


def test_mantissas_of_four_bits_are_stored_in_four() -> None:
    weight = drawn(32, 64, seed=5)
    (four, record), (eight, _) = fixed(weight, None, FixedOptions(bits=4)), fixed(weight, None, FixedOptions())
    assert four.main is not None
    assert eight.main is not None
    assert four.main.format == "i4_row_f32"
    scales = 4 * 32
    assert stored_nbytes_of(four.main) - scales == (stored_nbytes_of(eight.main) - scales) / 2
    assert torch.equal(torch.from_numpy(four.value()), quantised(weight, record["fraction"], 4))
    assert len(np.unique(four.value())) <= 15


def test_fractions_are_powers_and_follow_exactly() -> None:
    weight = drawn(16, 32, seed=6)
    for power in range(-8, 9):
        assert fraction(weight * 2.0**power) == fraction(weight) - power
        assert torch.equal(
            mantissas(weight * 2.0**power, fraction(weight) - power), mantissas(weight, fraction(weight))
        )
    assert fraction(torch.zeros(4)) == 0
    outlier = torch.cat([torch.ones(999), torch.tensor([1000.0])])
    assert fraction(outlier, overflow=0.001) == fraction(torch.ones(1))
    assert fraction(outlier) < 0 < fraction(outlier, overflow=0.001)
    with pytest.raises(FormatError):
        fraction(torch.tensor([float("inf")]))
    for bad in ({"bits": 9}, {"bits": 5}, {"bits": 2}, {"overflow": 0.5}):
        with pytest.raises(UsageError):
            FixedOptions(**bad)
    with pytest.raises(UsageError, match="stored as"):
        fixed(weight, None, FixedOptions(), "q8_0")
    with pytest.raises(UsageError, match="4-bit fixed point is stored as i4_row_f32"):
        fixed(weight, None, FixedOptions(bits=4), "i8_row_f32")


def test_the_exponent_follows_when_activations_scale_by_16() -> None:
    """From any start it comes to rest where at most the share overflows and a finer one would overflow; 16 times larger
    activations move it by 4, in 4 steps, and back."""
    stream = [drawn(64, 32, seed=seed) for seed in range(40)]
    watch = Exponent(length=20, overflow=0.01)
    rest = [watch.update(x) for x in stream][-1]
    assert len({watch.update(x) for x in stream}) == 1  # at rest
    path = [watch.update(16 * x) for x in stream]
    assert path[:4] == [rest - 1, rest - 2, rest - 3, rest - 4]
    assert set(path[4:]) == {rest - 4}
    back = [watch.update(x) for x in stream]
    assert back[:4] == [rest - 3, rest - 2, rest - 1, rest]
    assert set(back[4:]) == {rest}
    low = Exponent(length=-20, overflow=0.01)
    assert [low.update(x) for x in stream][-1] == rest


def test_overflows_are_counted() -> None:
    watch = Exponent(bits=4, length=0, overflow=0.5)
    watch.update(torch.tensor([7.0, 7.5, 7.6, -9.0]))
    assert (watch.seen, watch.clipped) == (4, 2)  # 7.5 rounds half to even and is clipped to 7: the last that fits
    assert Exponent(length=3).update(torch.zeros(5)) == 3
    with pytest.raises(FormatError):
        watch.update(torch.tensor([float("nan")]))
    pairs = list(itertools.pairwise([Exponent(length=f).update(torch.ones(3)) for f in (0, 3, 6, 7, 9)]))
    assert all(after >= before for before, after in pairs)
