"""Binding against the reference packages: every weight of every file is exactly what the file means."""

from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from inhouse.core.errors import FormatError, UnsupportedError, UsageError
from inhouse.load.bind import Plan, bind, plan_binding
from inhouse.load.describe import Described, describe
from inhouse.model.build import build
from inhouse.runtime.executor import Weight
from inhouse.runtime.packed import Packed
from tests.load.checkpoints import Arrays, change, copy_hf, read_arrays

pytestmark = [pytest.mark.null, pytest.mark.realdata]
TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


def planned(path: Path, wish: str | None = None) -> tuple[Described, Plan]:
    described = describe(path)
    return described, plan_binding(described.source, described.spec, described.family, build(described.spec), wish)


def bound(path: Path, wish: str | None = None) -> tuple[Plan, dict[str, Weight]]:
    described, plan = planned(path, wish)
    weights = {part.spec.name: weight for part, weight in bind(described.source, plan, threads=2)}
    described.source.close()
    return plan, weights


def values(weight: Weight) -> npt.NDArray[np.float32]:
    return weight.dequantize() if isinstance(weight, Packed) else weight


def half_rotation(array: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows (2i, 2i + 1) of each head -> (i, i + head_dim / 2), written independently of the code under test."""
    width = array.shape[0] // heads
    rows = [head * width + 2 * i + odd for head in range(heads) for odd in (0, 1) for i in range(width // 2)]
    return array[rows]


@pytest.mark.parametrize("kind", TYPES)
def test_every_weight_of_a_gguf_equals_the_reference_decoder(stories: Path, kind: str) -> None:
    path = stories / f"stories260K-{kind}.gguf"
    plan, weights = bound(path)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert len(weights) == len(plan.parts) == len(tensors)
    for part in plan.parts:
        tensor = tensors[part.info.name]
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(part.info.shape)
        if ".attn.q." in part.spec.name:
            expected = half_rotation(expected, 8)
        if ".attn.k." in part.spec.name:
            expected = half_rotation(expected, 4)
        assert np.array_equal(values(weights[part.spec.name]), expected.astype(np.float32)), part.spec.name


def test_hf_folder_and_f32_gguf_hold_the_same_weights(stories: Path) -> None:
    _, from_hf = bound(stories / "hf")
    _, from_gguf = bound(stories / "stories260K-F32.gguf")
    for name, weight in from_hf.items():
        assert np.array_equal(values(weight), values(from_gguf[name])), name


def test_block_types_stay_block_types(stories: Path) -> None:
    plan, _ = planned(stories / "stories260K-Q5_1.gguf")[1], None
    assert plan.formats["layers.0.attn.q.weight"] == "q5_1"
    assert plan.formats["layers.0.mlp.down.weight"] == "f16"
    assert plan.notes == ()


@pytest.mark.parametrize(("wish", "worst"), [("q8", 0.005), ("q4", 1 / 6.5)])
def test_quantizing_float_matrices_keeps_them_near(stories: Path, wish: str, worst: float) -> None:
    plan, weights = bound(stories / "hf", wish)
    _, exact = bound(stories / "hf")
    for name, kind in plan.formats.items():
        assert kind == ("q8_0" if wish == "q8" else "q6_0" if name == "embed.weight" else "q4_0")
        error = np.abs(values(weights[name]) - values(exact[name])).max()
        assert 0 < error <= worst * np.abs(values(exact[name])).max()
    assert isinstance(weights["final_norm"], np.ndarray)
    assert any("embedding and head" in note for note in plan.notes) is (wish == "q4")


def test_quantized_tensors_are_never_quantized_again(stories: Path) -> None:
    plan, weights = bound(stories / "stories260K-Q4_0.gguf", "q8")
    _, kept = bound(stories / "stories260K-Q4_0.gguf")
    assert plan.formats["layers.0.attn.q.weight"] == "q4_0"
    assert np.array_equal(values(weights["layers.0.attn.q.weight"]), values(kept["layers.0.attn.q.weight"]))
    assert plan.formats["layers.0.mlp.down.weight"] == "q8_0"
    assert "32 of 37 matrices were quantised in the file already (Q4_0)" in plan.notes[0]


def test_an_unknown_wish_is_refused(stories: Path) -> None:
    with pytest.raises(UsageError, match="q5"):
        planned(stories / "hf", "q5")


@pytest.fixture
def folder(stories: Path, tmp_path: Path) -> Path:
    return copy_hf(stories, tmp_path / "hf")


def test_missing_left_over_and_misshapen_tensors_are_named(folder: Path) -> None:
    arrays = read_arrays(folder)
    name = "model.layers.3.mlp.up_proj.weight"

    def restore(edit: Arrays) -> None:
        edit.clear()
        edit.update(arrays)

    change(folder, lambda edit: edit.__delitem__(name))
    with pytest.raises(FormatError, match=f"lacks 1 tensor: {name}"):
        planned(folder)
    change(folder, restore)
    change(folder, lambda edit: edit.update({"model.layers.3.extra": arrays[name]}))
    with pytest.raises(FormatError, match=r"model\.layers\.3\.extra"):
        planned(folder)
    change(folder, restore)
    change(folder, lambda edit: edit.update({name: arrays[name][:-1].copy()}))
    with pytest.raises(FormatError, match=r"shape \[171, 64\], \[172, 64\] was expected"):
        planned(folder)


def test_integer_weights_have_no_packed_form(folder: Path) -> None:
    change(folder, lambda edit: edit.update({"model.norm.weight": np.ones(64, np.int32)}))
    with pytest.raises(UnsupportedError, match="a vector must be a float"):
        planned(folder)


def test_threads_do_not_change_a_byte(stories: Path) -> None:
    described, plan = planned(stories / "hf", "q4")
    runs = [
        {part.spec.name: values(weight) for part, weight in bind(described.source, plan, threads=threads)}
        for threads in (1, 4)
    ]
    assert list(runs[0]) == list(runs[1])
    assert all(np.array_equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_a_consumer_that_stops_early_leaves_no_thread_behind(stories: Path) -> None:
    described, plan = planned(stories / "hf")
    weights = bind(described.source, plan)
    next(weights)
    weights.close()  # type: ignore[attr-defined]
