"""QAT and learned rounding: exported codes equal what was trained bit for bit, gradients are LSQ's, training helps."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from inhouse.compress.fake_quant import FakeQuant
from inhouse.compress.fit import FitConfig, Setup, fit
from inhouse.compress.grids import Grid, Params
from inhouse.compress.methods.signround import LearnedRounding, SignRoundOptions, signround
from inhouse.compress.objective import Response
from inhouse.compress.teacher import LiveTeacher
from inhouse.core.errors import UnsupportedError, UsageError
from inhouse.model.rewrite import quantize_activations
from tests.compress.test_compress_fit import CONFIG, model, some_data

pytestmark = pytest.mark.torch

# uniform, low-bit, asymmetric with zero points, with minimums, lookup codes, two levels; scales f16, bf16, f32, e8m0
LEARNED = (
    "i4_g32",
    "i4_row_bf16",
    "q6_0",
    "q8_0",
    "u2_g32",
    "u3_row",
    "u4_g64_f32",
    "q4_1",
    "q5_1",
    "nf4_g64",
    "iq4_nl",
)
FIXED = ("mxfp4", "nvfp4", "q4_k", "q2_k")


def matrix(seed: int, rows: int = 24, inputs: int = 64) -> Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed)) * 0.1


def stir(hook: FakeQuant, seed: int) -> None:
    """Moves every learned parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in hook.parameters().values():
            value += 0.3 * torch.randn(value.shape, generator=generator)


@pytest.mark.parametrize("name", [*LEARNED, *FIXED])
def test_exported_codes_are_the_trained_ones_bit_for_bit(name: str) -> None:
    inputs = 256 if name in ("q4_k", "q2_k") else 64
    weight = matrix(0, inputs=inputs)
    hook = FakeQuant(weight, Grid(name, inputs))
    assert bool(hook.parameters()) == (name in LEARNED)
    for seed in range(3):
        moved = weight + 0.05 * matrix(seed + 1, inputs=inputs)
        trained = hook(moved).detach().numpy()
        packed = hook.pack(moved)
        assert np.array_equal(packed.dequantize().view(np.int32), trained.view(np.int32))
        assert hook.form(moved).value().tobytes() == trained.tobytes()
        stir(hook, seed)


def test_it_starts_where_plain_rounding_ends() -> None:
    weight, importance = matrix(0), matrix(1)[0].square()
    for name in ("i4_g32", "u3_g64", "q4_1"):
        grid = Grid(name, 64)
        hook = FakeQuant(weight, grid, importance)
        assert np.array_equal(hook.pack(weight).dequantize(), grid.quantize(weight, importance).dequantize())


def surrogate(grid: Grid, params: Params, weight: Tensor, step: Tensor, zero: Tensor, base: Tensor) -> Tensor:
    """What LSQ differentiates, by autograd alone: rounding replaced by x + (round(x) - x).detach()."""
    index = grid.index()
    scale = (base * step)[:, index]
    scale = scale + (params.scale[:, index] - scale).detach()
    low, high = grid.code_range()
    place = weight / scale
    place = place + (torch.round(place) - place).detach()
    at = torch.zeros_like(scale) + grid.format.zero if params.zero is None else params.zero[:, index]
    at = at.detach() + (zero[:, index] - zero[:, index].detach())
    return (torch.clamp(place + at, low, high) - at) * scale


@pytest.mark.parametrize("name", ["i4_g32", "u3_g32_f32"])
def test_gradients_are_those_of_lsq(name: str) -> None:
    grid, weight = Grid(name, 64), matrix(0).requires_grad_()
    hook = FakeQuant(weight.detach(), grid)
    with torch.no_grad():
        hook.parameters()["step"].mul_(0.7)  # so that something is clipped
    out = matrix(5)
    torch.autograd.backward(hook(weight), out)
    mine = weight.detach().clone().requires_grad_()
    step = hook.parameters()["step"].detach().clone().requires_grad_()
    zero = torch.zeros_like(step).requires_grad_()
    base = grid.fit(weight.detach()).scale
    torch.autograd.backward(surrogate(grid, hook.params(), mine, step, zero, base), out)
    clipped = hook.codes(weight) == grid.code_range()[1]
    assert bool(clipped.any())
    assert weight.grad is not None
    assert mine.grad is not None
    assert torch.allclose(weight.grad, mine.grad)
    assert torch.allclose(hook.parameters()["step"].grad, step.grad, atol=1e-6)  # type: ignore[arg-type]
    if "zero" in hook.parameters():
        assert torch.allclose(hook.parameters()["zero"].grad, zero.grad, atol=1e-6)  # type: ignore[arg-type]


def test_masks_survive_because_zero_is_on_the_grid() -> None:
    programs, weights = model()
    name = "layers.0.mlp.up.weight"
    mask = torch.rand(weights[name].shape, generator=torch.Generator().manual_seed(0)) < 0.5
    hook = FakeQuant(weights[name] * mask, Grid("u3_g32", 32))
    result = fit(programs, weights, some_data(), CONFIG, setup=Setup(masks={name: mask}, hooks={name: hook}))
    assert not np.any(hook.pack(result.weights[name]).dequantize()[~mask.numpy()])


def test_training_beats_rounding_on_a_tiny_model() -> None:
    programs, weights = model()
    taught = fit(programs, weights, some_data(), FitConfig(steps=60, batch_tokens=128, learning_rate=1e-2, warmup=2))
    teacher = Response(LiveTeacher(programs, taught.weights))
    matrices = {n: w for n, w in taught.weights.items() if w.dim() == 2}
    hooks = {n: FakeQuant(w, Grid("u2_g32", w.shape[1])) for n, w in matrices.items()}
    rounded = quantize_activations(programs, dict.fromkeys(matrices, "u2_g32")).programs["step"]
    config = replace(CONFIG, steps=40, learning_rate=3e-3, validate_every=20)
    result = fit(
        programs, taught.weights, some_data(), config, objective=teacher, validation=some_data(),
        setup=Setup(hooks=hooks, program=rounded),
    )  # fmt: skip
    assert result.best is not None
    assert result.best < 0.5 * result.validation[0][1]
    for name, hook in hooks.items():
        assert np.array_equal(hook.pack(result.weights[name]).dequantize(), hook(result.weights[name]).detach().numpy())


# ---- learned rounding ----------------------------------------------------------------------------------------------


def correlated(seed: int, rows: int = 256, inputs: int = 64) -> Tensor:
    return matrix(seed, rows, 24) @ matrix(seed + 50, 24, inputs) * 10 + matrix(seed + 99, rows, inputs) * 0.3


@pytest.mark.parametrize("name", ["i4_g32", "u2_g32", "q4_1"])
def test_no_shift_is_plain_rounding(name: str) -> None:
    weight, grid = matrix(0), Grid(name, 64)
    rounded = LearnedRounding(weight, grid)
    assert np.array_equal(rounded.pack(weight).data, grid.quantize(weight).data)
    assert np.array_equal(rounded(weight).detach().numpy(), grid.quantize(weight).dequantize())


@pytest.mark.parametrize("name", ["i4_g32", "u3_g64", "u2_g32", "q4_1"])
def test_learned_rounding_is_never_worse_and_helps(name: str) -> None:
    weight, inputs = matrix(0), correlated(3)
    options = SignRoundOptions(iters=100, batch=128, clip_rate=0.1)
    form, history = signround(weight, inputs, options, name)
    assert all(b <= a for a, b in zip(history, history[1:], strict=False))
    plain = Grid(name, 64).quantize(weight, inputs.square().mean(0)).dequantize()
    target = inputs @ weight.T
    errors = [float((inputs @ torch.from_numpy(v).T - target).square().mean()) for v in (plain, form.value())]
    assert history[0] == pytest.approx(errors[0], rel=1e-4)
    assert history[-1] == pytest.approx(errors[1], rel=1e-4)
    assert errors[1] < (0.98 if name == "q4_1" else 0.85) * errors[0]
    again, _ = signround(weight, inputs, options, name)
    assert again.main is not None
    assert form.main is not None
    assert np.array_equal(again.main.data, form.main.data)


def test_what_cannot_be_learned_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="nf4_g64"):
        LearnedRounding(matrix(0), Grid("nf4_g64", 64))
    with pytest.raises(UsageError, match="do not fit"):
        signround(matrix(0), matrix(1, 5, 32), SignRoundOptions(), "i4_g32")
