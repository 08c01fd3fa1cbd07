"""Cores as they are stored and run: embeddings as tensor trains, experts as Tucker stacks; native equals torch equals
the matrices multiplied out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inhouse.compress.methods.cores import (
    TrainOptions,
    TuckerOptions,
    train_form,
    train_shape,
    tucker_forms,
    tucker_ranks,
)
from inhouse.compress.pipeline import compress
from inhouse.compress.recipe import parse_recipe
from inhouse.compress.tensors import tensor_train, train_products, tucker_numbers
from inhouse.core.errors import FormatError, InhouseError, UnsupportedError, UsageError
from inhouse.load.export import export_model
from inhouse.load.model import open_model
from inhouse.load.prove import logits_of
from inhouse.runtime.cores import stack_of, train_rows
from inhouse.runtime.form import Form
from inhouse.runtime.packed import pack_float
from inhouse.store.store import Store
from tests.compress.stored import store, weights_of
from tests.compress.tiny_models import make

pytestmark = [pytest.mark.torch, pytest.mark.native, pytest.mark.realdata]

TOKENS = np.array([1, 7, 300, 511, 0, 42, 99, 256], np.int64)


def logits(folder: Path, executor: str) -> np.ndarray:
    model = open_model(str(folder), executor=executor, kv_dtype="f32", activations="float", cache=False)
    try:
        return logits_of(model, TOKENS)
    finally:
        model.close()


def near(one: np.ndarray, other: np.ndarray) -> bool:
    return float(np.abs(one - other).max()) <= 2e-5 * float(np.abs(other).max())


@pytest.mark.parametrize("tables", [2, 3, 4])
@pytest.mark.parametrize("factors", ["f32", "q8_0"])
def test_an_embedding_as_a_train_runs_as_its_rows(stories: Path, tmp_path: Path, tables: int, factors: str) -> None:
    folder = make("Llama", stories, tmp_path / "m")
    options = TrainOptions(ratio=0.4, tables=tables, factors=factors)
    form = train_form(torch.from_numpy(weights_of(folder)["embed.weight"]), options)
    whole = pack_float(form.value(), "f32")
    numbers = sum(packed.shape[0] * packed.shape[1] for packed in form.train)
    assert numbers <= 0.6 * 512 * 48
    assert form.shape == (512, 48)
    sizes = []
    for at, embedding in (("train", form), ("whole", Form(whole))):
        chosen = {"embed.weight": embedding}
        written = store(folder, tmp_path / at, lambda n, v, c=chosen: c.get(n) or Form(pack_float(v, "f32")))  # type: ignore[misc]
        sizes.append(written.nbytes)
    assert sizes[1] - sizes[0] == whole.shape[0] * whole.shape[1] * 4 - form.nbytes
    wanted = logits(tmp_path / "whole", "torch")
    assert near(logits(tmp_path / "train", "torch"), wanted)
    assert near(logits(tmp_path / "train", "native"), wanted)
    export_model(str(tmp_path / "train"), "gguf", tmp_path / "out.gguf", wish="f32")
    assert np.array_equal(weights_of(tmp_path / "out.gguf")["embed.weight"], form.value())


@pytest.mark.parametrize("factors", ["f32", "q8_0"])
def test_experts_as_tucker_cores_run_as_their_matrices(stories: Path, tmp_path: Path, factors: str) -> None:
    folder = make("Mixtral", stories, tmp_path / "m")
    weights = weights_of(folder)
    stacks: dict[str, list[str]] = {}
    for name in weights:
        if stack_of(name) and not name.startswith("layers.1."):  # the second layer stays whole
            stacks.setdefault(stack_of(name), []).append(name)
    forms: dict[str, Form] = {}
    for names in stacks.values():
        made, _ = tucker_forms(
            torch.stack([torch.from_numpy(weights[n]) for n in names]), TuckerOptions(ratio=0.3, factors=factors)
        )
        forms |= dict(zip(names, made, strict=True))
    assert len(stacks) == 6
    plain = {name: Form(pack_float(value, "f32")) for name, value in weights.items() if value.ndim == 2}
    out = {name: Form(pack_float(form.value(), "f32")) for name, form in forms.items()}
    cores = store(folder, tmp_path / "cores", lambda n, v: forms.get(n, plain[n]))
    whole = store(folder, tmp_path / "whole", lambda n, v: out.get(n, plain[n]))
    assert cores.nbytes < whole.nbytes - (0.29 if factors == "f32" else 0.7) * sum(plain[n].nbytes for n in forms)
    wanted = logits(tmp_path / "whole", "torch")
    for executor in ("torch", "native"):
        assert near(logits(tmp_path / "cores", executor), wanted)
    report = export_model(str(tmp_path / "cores"), "safetensors", tmp_path / "out", wish="f32")
    notes = [tensor.note for tensor in report.tensors if tensor.note]
    assert notes == ["a Tucker core was multiplied out into the values"] * len(forms)
    again = weights_of(tmp_path / "out")
    assert all(np.array_equal(again[name], form.value()) for name, form in forms.items())


def test_what_would_not_be_smaller_is_refused() -> None:
    table = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UnsupportedError, match="a train of rank"):
        train_form(table, TrainOptions(rank=32))
    with pytest.raises(UnsupportedError, match="a train of rank"):
        train_form(table[:4, :4], TrainOptions(ratio=0.99))
    with pytest.raises(UnsupportedError, match="have no rank"):
        tucker_ranks((2, 4, 4), 5)
    ranks = tucker_ranks((8, 64, 32), 8 * 64 * 32 // 2)
    assert tucker_numbers((8, 64, 32), ranks) <= 8 * 64 * 32 // 2
    for bad in ({"tables": 5}, {"ratio": 1.0}):
        with pytest.raises(UsageError):
            TrainOptions(**bad)
    with pytest.raises(UsageError):
        TuckerOptions(ratio=0.0)


@pytest.mark.parametrize("tables", [2, 3])
def test_a_head_through_cores_multiplies_more_often_than_the_whole_table(tables: int) -> None:
    """Why a tied embedding is refused: products are counted while both orders of the cores give the logits."""
    table = torch.randn(512, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows, widths, rank = train_shape((512, 48), TrainOptions(ratio=0.5, tables=tables))
    train = tensor_train(table, rows, widths, rank)
    whole = torch.from_numpy(train_rows([c.flatten(1).numpy() for c in train.cores], widths, np.arange(512)))
    x = torch.randn(48, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    counts = []
    for cores, sides in ((train.cores, widths), ([c.transpose(1, 3) for c in train.cores[::-1]], widths[::-1])):
        turned = x if sides is widths else x.reshape(*widths).permute(*reversed(range(tables))).reshape(-1)
        state, products = turned.reshape(1, 1, -1), 0  # [rows so far, rank, widths to come]
        for core, width in zip(cores, sides, strict=True):
            m, before, _, after = core.shape
            apart = state.reshape(state.shape[0], before, width, -1)
            products += apart.shape[0] * m * before * width * after * apart.shape[3]
            state = torch.einsum("ipwt,mpwq->imqt", apart, core).reshape(-1, after, apart.shape[3])
        counts.append(products)
        found = state.reshape(*(rows if sides is widths else rows[::-1]))
        found = found if sides is widths else found.permute(*reversed(range(tables)))
        assert torch.allclose(found.reshape(-1)[:512], whole.double() @ x, rtol=1e-4, atol=1e-4)
    assert min(counts) == train_products(rows, widths, rank)
    assert min(counts) > 2 * 512 * 48, "half the numbers, and more than twice the work"


def test_a_tied_embedding_and_a_model_without_experts_are_refused(stories: Path, tmp_path: Path) -> None:
    for method, words in (
        ("tensor-train", r"tied embeddings.* [\d.]+ times the multiplications"),
        ("tucker", "no experts"),
    ):
        recipe = parse_recipe({"stages": [{"lowrank": {"method": method}}]})
        with pytest.raises(UnsupportedError, match=words):
            compress(str(stories / "hf"), f"never-{method}", recipe)


def test_the_whole_way_by_recipe(stories: Path, tmp_path: Path) -> None:
    folder = make("Mixtral", stories, tmp_path / "m")
    recipe = parse_recipe(
        {
            "stages": [
                {"lowrank": {"method": "tensor-train", "ratio": 0.3}},
                {"lowrank": {"method": "tucker", "ratio": 0.2}},
            ]
        }
    )
    done = compress(str(folder), "cores", recipe)
    assert done.result["proof"]["logits_error"] < 1e-4
    with Store() as opened:
        made = opened.folder(opened.catalog.resolve(done.ref))
    table = json.loads((made / "inhouse.json").read_text())
    assert table["cores"]["embed.weight"]["kind"] == "train"
    assert table["tensors"]["layers.0.moe.experts.up.left.weight"]["format"] in ("q8_0", "bf16")  # the smaller
    assert sum(core["kind"] == "tucker" for core in table["cores"].values()) == 3 * 3 * 4
    changes: list[Callable[[dict[str, Any]], Any]] = [
        lambda d: d["cores"]["embed.weight"].update(widths=[2, 3]),
        lambda d: d["cores"]["embed.weight"].update(rows=1 << 20),
        lambda d: d["cores"]["embed.weight"].update(tables=9),
        lambda d: d["cores"]["embed.weight"].update(kind="other"),
        lambda d: d["cores"].pop("embed.weight"),
        lambda d: d["cores"]["layers.0.moe.experts.0.up.weight"].update(stack="layers.1.moe.experts.up"),
    ]
    for change in changes:
        lie = json.loads(json.dumps(table))
        change(lie)
        other = tmp_path / "lie"
        other.mkdir(exist_ok=True)
        for file in made.iterdir():
            if not (other / file.name).exists():
                (other / file.name).write_bytes(file.read_bytes())
        (other / "inhouse.json").write_text(json.dumps(lie))
        with pytest.raises((FormatError, InhouseError)):
            open_model(str(other), executor="torch", cache=False)
