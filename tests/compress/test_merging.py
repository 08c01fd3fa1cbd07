"""Merging: numbers that mergekit 0.1.4 (LGPL-3.0) gave once on fixed inputs; the laws; models of the store."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from inhouse.compress import finish
from inhouse.compress.merge import Ingredient, merge_models, parse_ingredient
from inhouse.compress.methods.merging import MERGES, MergeOptions, merge, slerp
from inhouse.compress.recipe import parse_recipe
from inhouse.compress.stages import StageRun
from inhouse.compress.work import Work
from inhouse.core.errors import UnsupportedError, UsageError
from inhouse.load.importer import import_model
from inhouse.store.store import Store
from tests.load.checkpoints import Arrays, change, copy_hf, read_arrays

GOLDEN = json.loads((Path(__file__).parent / "merge_golden.json").read_text())
WEIGHTS = (0.5, 0.3, 0.4)


def drawn() -> tuple[Tensor, list[Tensor]]:
    """The inputs of the golden numbers."""
    random = np.random.default_rng(5)
    base = torch.from_numpy(random.standard_normal((6, 10)).astype(np.float32))
    steps = [torch.from_numpy((random.standard_normal((6, 10)) * 0.1).astype(np.float32)) for _ in range(3)]
    return base, [base + step for step in steps]


@pytest.mark.parametrize("key", [key for key in GOLDEN if not key.startswith("slerp")])
def test_published_numbers(key: str) -> None:
    method, normalize = key.split("/")
    base, models = drawn()
    density = {"task_arithmetic": 1.0}.get(method, 0.6)
    options = MergeOptions(method, density, 0.1, 0.8, normalize={"None": None, "True": True, "False": False}[normalize])
    found = merge("w", base, models, WEIGHTS, options)
    np.testing.assert_allclose(found.flatten().numpy(), GOLDEN[key], rtol=0, atol=3e-7)


@pytest.mark.parametrize("key", [key for key in GOLDEN if key.startswith("slerp")])
def test_published_numbers_of_the_arc(key: str) -> None:
    base, models = drawn()
    found = slerp(base, models[0] * 3 - base, float(key.split("/")[1]))
    np.testing.assert_allclose(found.flatten().numpy(), GOLDEN[key], rtol=0, atol=5e-7)


def test_linear_is_the_weighted_mean() -> None:
    _, models = drawn()
    found = merge("w", None, models, WEIGHTS, MergeOptions("linear"))
    wanted = sum(w * m.double() for w, m in zip(WEIGHTS, models, strict=True)) / sum(WEIGHTS)
    assert isinstance(wanted, Tensor)
    assert torch.allclose(found.double(), wanted, atol=1e-6)
    turned = merge("w", None, models[::-1], WEIGHTS[::-1], MergeOptions("linear"))
    assert torch.allclose(found, turned, atol=1e-6)


def test_slerp_keeps_the_norm_of_equal_vectors_and_ends_where_it_should() -> None:
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0])
    for t in (0.0, 0.25, 0.5, 1.0):
        assert float(slerp(a, b, t).norm()) == pytest.approx(3.0, rel=1e-6)
    assert torch.equal(slerp(a, b, 0), a)
    assert torch.allclose(slerp(a, b, 1), b, atol=1e-6)
    assert torch.allclose(slerp(a, a * 1.1, 0.5), a * 1.05)


@pytest.mark.parametrize("method", [m for m, row in MERGES.items() if row.base and m != "slerp"])
def test_nothing_tuned_is_the_base(method: str) -> None:
    base, _ = drawn()
    found = merge("w", base, [base, base], (0.7, 0.3), MergeOptions(method, density=0.5))
    assert torch.equal(found, base)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_keeps_the_share_and_the_mean(method: str) -> None:
    base, tuned = torch.zeros(400, 500), torch.full((400, 500), 0.25)
    found = merge("w", base, [tuned], (1.0,), MergeOptions(method, density=0.3))
    kept = found != 0
    assert float(kept.float().mean()) == pytest.approx(0.3, abs=0.005)
    assert torch.allclose(found[kept], torch.tensor(0.25 / 0.3))
    assert torch.equal(found, merge("w", base, [tuned], (1.0,), MergeOptions(method, density=0.3)))
    assert not torch.equal(found, merge("v", base, [tuned], (1.0,), MergeOptions(method, density=0.3)))
    l1 = merge("w", base, [tuned], (1.0,), MergeOptions(method, density=0.3, rescale="l1"))
    assert float(l1.sum()) == pytest.approx(float(tuned.sum()), rel=1e-5)


def test_the_elected_sign_wins() -> None:
    base = torch.zeros(3)
    models = [torch.tensor([1.0, -1.0, 0.5]), torch.tensor([0.5, 2.0, -0.5]), torch.tensor([-4.0, 2.0, 0.0])]
    found = merge("w", base, models, (1.0, 1.0, 1.0), MergeOptions("ties"))
    assert found.tolist() == [-4.0, 2.0, 0.5]  # sums -2.5, 3, 0 (counts as +)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "tise"}, "method is 'tise'"),
        ({"method": "ties", "density": 0.0}, "density"),
        ({"method": "slerp", "t": 1.5}, "t is"),
    ],
)
def test_wrong_options(options: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        MergeOptions(**options)  # type: ignore[arg-type]


def test_weights_that_cancel_and_arcs_of_three() -> None:
    base, models = drawn()
    with pytest.raises(UsageError, match="sum to 0"):
        merge("w", None, models[:2], (1.0, -1.0), MergeOptions("linear"))
    with pytest.raises(UsageError, match="slerp"):
        merge("w", base, models, WEIGHTS, MergeOptions("slerp"))
    with pytest.raises(UsageError, match="differ"):
        merge("w", base, [models[0][:2]], (1.0,), MergeOptions("ties"))


def test_ingredients() -> None:
    assert parse_ingredient("qwen:2:0.5") == Ingredient("qwen:2", 0.5)
    assert parse_ingredient("./folder") == Ingredient("./folder", 1.0)
    with pytest.raises(UsageError, match="no weight"):
        parse_ingredient("qwen@prod:x")


@pytest.fixture
def store() -> Iterator[Store]:
    with Store() as opened:
        yield opened


def tuned(stories: Path, folder: Path, seed: int) -> Path:
    """stories260K with every weight moved a little."""
    random = np.random.default_rng(seed)

    def edit(arrays: Arrays) -> None:
        for name in arrays:
            arrays[name] = arrays[name] + random.standard_normal(arrays[name].shape).astype(np.float32) * 1e-3

    return change(copy_hf(stories, folder), edit)


@pytest.mark.realdata
def test_models_of_the_store(stories: Path, tmp_path: Path, store: Store) -> None:
    import_model(stories / "hf", "base", store=store)
    import_model(tuned(stories, tmp_path / "a", 1), "a", store=store)
    b = tuned(stories, tmp_path / "b", 2)
    models = [Ingredient("a", 0.6), Ingredient(str(b), 0.4)]
    made = merge_models("base", models, "merged", MergeOptions("ties", density=0.5), store=store).version
    assert made.parent == "base:1"
    assert made.how == f"merged: ties of 0.6 a + 0.4 {b}"
    found, zero = read_arrays(store.folder(made)), read_arrays(stories / "hf")
    parts = [read_arrays(tmp_path / "a"), read_arrays(b)]
    for name in found:
        tensors = [torch.from_numpy(part[name]) for part in parts]
        wanted = merge(name, torch.from_numpy(zero[name]), tensors, (0.6, 0.4), MergeOptions("ties", density=0.5))
        assert np.array_equal(found[name], wanted.numpy())


@pytest.mark.realdata
def test_what_was_tuned_here_is_merged_and_codes_are_not(stories: Path, tmp_path: Path, store: Store) -> None:
    """A stored model of floats alone merges with the Hugging Face folder that it came from."""
    base = str(stories / "hf")

    def stored(name: str, stage: dict[str, Any]) -> Path:
        with Work.open(base, tmp_path / f"run-{name}") as work:
            if stage:
                StageRun(work, parse_recipe({"stages": [stage]}).stages[0], "0", None, 1 << 28).run()
            else:
                work.put("final_norm", 2 * work.value("final_norm"))
            finish.write(work, tmp_path / name, {})
        return tmp_path / name

    tuned = stored("tuned", {})
    made = merge_models(base, [Ingredient(str(tuned), 1.0)], "m", MergeOptions("linear"), store=store).version
    found, zero = read_arrays(store.folder(made)), read_arrays(stories / "hf")
    assert found.keys() == zero.keys()
    assert {name for name in found if not np.array_equal(found[name], zero[name])} == {"model.norm.weight"}
    assert np.array_equal(found["model.norm.weight"], 2 * zero["model.norm.weight"])
    coded = stored("coded", {"quantize": {"method": "round", "format": "q8_0"}})
    factored = stored("factored", {"lowrank": {"method": "svd", "rank": 8, "include": ["mlp.up"]}})
    for folder, kind in ((coded, "q8_0"), (factored, "of factors")):
        with pytest.raises(UnsupportedError, match=f"of .*{folder.name} is {kind}"):
            merge_models(base, [Ingredient(str(folder), 1.0)], "x", MergeOptions("linear"), store=store)
    assert not list(store.home.tmp.glob("merge-*"))


@pytest.mark.realdata
def test_models_that_are_equal_are_said_to_be(stories: Path, tmp_path: Path, store: Store) -> None:
    same, other = [copy_hf(stories, tmp_path / name) for name in ("same", "twin")], tuned(stories, tmp_path / "a", 1)
    models = [Ingredient(str(one), 0.5) for one in same]
    made = merge_models(None, models, "x", MergeOptions("linear"), store=store)
    assert any(f"{same[0]} and {same[1]} hold the same values: there was nothing" in note for note in made.notes)
    models.append(Ingredient(str(other), 0.5))
    made = merge_models(str(other), models, "y", MergeOptions("ties"), store=store)
    said = [note for note in made.notes if "the same values" in note]
    assert said == [f"{other} and {other} hold the same values", f"{same[0]} and {same[1]} hold the same values"]
    made = merge_models(None, [models[0], models[2]], "z", MergeOptions("linear"), store=store)
    assert not any("the same values" in note for note in made.notes)


@pytest.mark.realdata
def test_other_vocabularies_and_formats_are_refused(stories: Path, tmp_path: Path, store: Store) -> None:
    odd = copy_hf(stories, tmp_path / "odd")
    document = json.loads((odd / "tokenizer.json").read_text())
    vocab = document["model"]["vocab"]
    if isinstance(vocab, dict):
        names = {number: token for token, number in vocab.items()}
        vocab[names[300]], vocab[names[301]] = 301, 300
    else:
        vocab[300], vocab[301] = vocab[301], vocab[300]
    (odd / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(UnsupportedError, match="vocabularies .*id 300 differs first"):
        merge_models(str(stories / "hf"), [Ingredient(str(odd), 1.0)], "x", MergeOptions("ties"), store=store)
    gguf = str(stories / "stories260K-F32.gguf")
    with pytest.raises(UnsupportedError, match="safetensors folders"):
        merge_models(str(stories / "hf"), [Ingredient(gguf, 1.0)], "x", MergeOptions("ties"), store=store)
    with pytest.raises(UsageError, match="needs the base"):
        merge_models(None, [Ingredient(str(odd), 1.0)], "x", MergeOptions("ties"), store=store)
    assert list(store.catalog.versions()) == []
    assert not list(store.home.tmp.glob("merge-*"))
