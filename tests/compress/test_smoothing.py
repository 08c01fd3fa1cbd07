"""AWQ, SmoothQuant and rotations leave what a model computes unchanged, and do what they are for; HQQ and mixtures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inhouse.compress.calibrate import Calibration
from inhouse.compress.grids import Grid
from inhouse.compress.methods.awq import AwqOptions, awq, awq_scales, clip_ranges
from inhouse.compress.methods.ggufmix import GgufMixOptions, choose, ggufmix, more_bits, roles
from inhouse.compress.methods.hadamard import HadamardOptions, hadamard, rotation, stream_of
from inhouse.compress.methods.hqq import HqqOptions, hqq, hqq_params
from inhouse.compress.methods.smoothquant import SmoothQuantOptions, smooth_scales, smoothquant
from inhouse.compress.quadratic import losses, relative_error
from inhouse.compress.work import Work
from inhouse.core.errors import UnsupportedError, UsageError
from inhouse.core.progress import silent
from inhouse.runtime.torch_dense import forward
from tests.compress.synthetic import correlated
from tests.compress.tiny_models import make

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2-biases": ("Qwen2", {"tie_word_embeddings": False, "use_sliding_window": False}),
    "gemma2": ("Gemma2", {}),
}
TOKENS = torch.randint(3, 512, (3, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folders(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: make(family, stories, root / name, **more) for name, (family, more) in MODELS.items()}


def calibration() -> Calibration:
    tokens = torch.randint(3, 512, (16, 32), generator=torch.Generator().manual_seed(0))
    return Calibration(tokens, torch.full((16,), 32), "", ())


def logits(work: Work, before: bool = False) -> torch.Tensor:
    with torch.no_grad():
        return forward(work.program, TOKENS, work.weights(before=before))["logits"]


def _smooth(work: Work) -> dict[str, Any]:
    report: dict[str, Any] = {}
    smoothquant(work, calibration(), SmoothQuantOptions(0.6, ("norm", "v_o", "up_down")), report, silent)
    return report


def _awq(work: Work) -> dict[str, Any]:
    report: dict[str, Any] = {}
    awq(work, calibration(), AwqOptions(steps=4, clip=False, format="i4_row_f32"), report, silent)
    return report


def _hadamard(work: Work) -> dict[str, Any]:
    report: dict[str, Any] = {}
    hadamard(work, None, HadamardOptions(untie=True), report)
    return report


@pytest.mark.torch
@pytest.mark.realdata
@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("method", [_smooth, _awq, _hadamard])
def test_the_float_model_is_unchanged(name: str, method: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    with Work.open(str(folders[name]), tmp_path / "run") as work:
        work.begin("1.smooth")
        first = logits(work)
        report = method(work)
        scale = float(first.abs().max())
        torch.testing.assert_close(logits(work), first, rtol=0, atol=1e-4 * max(1.0, scale))
        assert report
        changed = [n for n in work.names() if work.is_changed(n)]
        assert len(changed) >= 10 or "fallbacks" in report


@pytest.mark.torch
@pytest.mark.realdata
def test_rotation_is_refused_with_its_reason(folders: dict[str, Path], tmp_path: Path) -> None:
    with Work.open(str(folders["llama-tied"]), tmp_path / "tied") as work:
        with pytest.raises(UnsupportedError, match="the head is the embedding"):
            hadamard(work, None, HadamardOptions(heads=False), {})
        report: dict[str, Any] = {}
        hadamard(work, None, HadamardOptions(), report)
        assert report["heads"] == 3
        assert "the head is the embedding" in report["fallbacks"][0]["why"]
    with Work.open(str(folders["gemma2"]), tmp_path / "gemma") as work, pytest.raises(UnsupportedError, match="stream"):
        stream_of(work.program)  # its norms after each part write into the stream
    with pytest.raises(UsageError, match="turns nothing"):
        hadamard(work, None, HadamardOptions(stream=False, heads=False), {})


@pytest.mark.parametrize("size", [8, 24, 48, 64, 172, 7])
def test_rotations_are_orthogonal(size: int) -> None:
    turn = rotation(size, 3)
    torch.testing.assert_close(turn.T @ turn, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    if size == 64:
        assert float(turn.abs().max()) == pytest.approx(1 / 8)
    outlier = torch.zeros(size, dtype=torch.float64)
    outlier[0] = 1
    assert float((outlier @ turn).abs().max()) < 0.95 or size == 7


def test_awq_beats_rounding_and_is_never_worse() -> None:
    weight, gram = correlated()
    mean = gram.diagonal().sqrt().float() * 0.8
    found = awq_scales(mean, gram, [weight], AwqOptions(format="i4_g128"))
    assert found.error <= found.plain
    assert 0 < found.alpha <= 1
    grid = Grid("i4_g128", 512)
    value = grid.nearest(weight, grid.fit(weight, search="minmax"), grid.index())
    rtn = relative_error(weight, value, gram)
    ours = found.error / float(losses(weight, gram).sum())
    assert ours < 0.6 * rtn  # the published ratio is .0068 to .0167
    flat = awq_scales(torch.ones(64), torch.eye(64).double(), [torch.randn(8, 64)], AwqOptions(steps=5))
    assert flat.error <= flat.plain


def test_clipping_lowers_the_output_error() -> None:
    weight, gram = correlated(64, 128, 1024, 2)
    weight = weight * torch.exp(torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)))
    diagonal = torch.diag(gram.diagonal())
    clipped = clip_ranges(weight, diagonal, "u3_g32")
    grid = Grid("u3_g32", 128)

    def error(matrix: torch.Tensor) -> float:
        value = grid.nearest(matrix, grid.fit(matrix, search="minmax"), grid.index())
        return float(losses(weight - value, diagonal).sum())

    assert error(clipped) < error(weight)
    assert (clipped.abs() <= weight.abs() + 1e-7).all()


def test_smoothquant_by_hand() -> None:
    weight = torch.tensor([[1.0, 0.25], [-0.5, 0.1]])
    scales = smooth_scales(torch.tensor([1.0, 64.0]), [weight], SmoothQuantOptions(0.5))
    assert float(scales[1] / scales[0]) == pytest.approx((64 / 0.25) ** 0.5)
    assert torch.isfinite(smooth_scales(torch.zeros(2), [weight], SmoothQuantOptions())).all()
    with pytest.raises(UsageError, match="alpha"):
        SmoothQuantOptions(1.5)


def test_smoothquant_makes_int8_of_both_better() -> None:
    """W8A8: int8 weights by row and int8 activations by token, inputs with outlier channels."""
    made = torch.Generator().manual_seed(2)
    x = torch.randn(512, 128, generator=made)
    x[:, :4] *= 60
    weight = torch.randn(64, 128, generator=made) * 0.1
    scales = smooth_scales(x.abs().amax(0), [weight], SmoothQuantOptions(0.5))

    def error(rows: torch.Tensor, matrix: torch.Tensor) -> float:
        step = rows.abs().amax(1, keepdim=True) / 127
        grid = Grid("i8_token", 128)
        value = grid.nearest(matrix, grid.fit(matrix), grid.index())
        return float(((rows / step).round() * step @ value.T - x @ weight.T).norm() / (x @ weight.T).norm())

    assert error(x / scales, weight * scales) < 0.5 * error(x, weight)


@pytest.mark.parametrize("name", ["u2_g32", "u3_g64", "u4_g32_f32"])
def test_hqq_lowers_the_norm_that_it_minimises(name: str) -> None:
    made = torch.Generator().manual_seed(4)
    weight = torch.randn(32, 172, generator=made)
    weight[torch.rand(weight.shape, generator=made) < 0.02] *= 8
    grid = Grid(name, 172)
    plain = grid.fit(weight, search="minmax")
    found = hqq_params(weight, grid, HqqOptions())

    def norm(params: Any) -> float:
        return float(((grid.nearest(weight, params, grid.index()) - weight).abs() ** 0.7).sum())

    assert norm(found) < norm(plain)
    form = hqq(weight, None, HqqOptions(), name)
    np.testing.assert_array_equal(form.value(), grid.nearest(weight, found, grid.index()).numpy())
    with pytest.raises(UnsupportedError, match="zero points"):
        hqq(weight, None, HqqOptions(), "q4_0")


@pytest.mark.torch
@pytest.mark.realdata
def test_mixtures_follow_llama_cpp(stories: Path, tmp_path: Path) -> None:
    folder = make("Llama", stories, tmp_path / "model", hidden_size=256, num_attention_heads=8, num_key_value_heads=4)
    assert [more_bits(i, 16) for i in range(6)] == [True, True, False, False, True, False]
    with Work.open(str(folder), tmp_path / "run") as work:
        role = roles(work.program)
        assert role["layers.1.attn.v.weight"] == "v"
        assert role["layers.1.mlp.down.weight"] == "down"
        assert role["head.weight"] == "head"
        assert role["layers.1.attn.q.weight"] == role["layers.1.mlp.up.weight"] == "other"
        chosen, notes = choose(work, "q4_k_m")
        assert chosen["layers.0.attn.q.weight"] == "q4_k"
        assert chosen["layers.2.attn.v.weight"] == "q6_k"
        assert chosen["head.weight"] == chosen["embed.weight"] == "q6_k"
        assert chosen["layers.0.mlp.down.weight"] == "q5_0"
        assert {one["tensor"]: one["why"] for one in notes}[
            "layers.0.mlp.down.weight"
        ] == "80 inputs are no multiple of 256"
        work.begin("1.quantize")
        report: dict[str, Any] = {}
        ggufmix(work, calibration(), GgufMixOptions(), report, silent)
        forms = {name: work.form(name) for name in work.matrices()}
        for name, form in forms.items():
            assert form is not None
            assert form.main is not None
            assert form.main.format == chosen[name]
            weight = work.float_value(name)
            assert float((torch.from_numpy(form.value()) - weight).norm() / weight.norm()) < 0.1
        assert {("q4_k", "q5_0")} <= {(one["asked"], one["done"]) for one in report["fallbacks"]}
    with Work.open(str(make("Mixtral", stories, tmp_path / "moe")), tmp_path / "b") as work:
        with pytest.raises(UnsupportedError, match="experts"):
            ggufmix(work, None, GgufMixOptions(), {}, silent)
