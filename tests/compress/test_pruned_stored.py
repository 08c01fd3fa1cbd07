"""Pruned models on disk: exact zeros in the smallest form, cut models in our engine and in transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from inhouse.compress import finish
from inhouse.compress.calibrate import Calibration
from inhouse.compress.fallbacks import of_records
from inhouse.compress.grids import Grid
from inhouse.compress.matrix import sparsest
from inhouse.compress.methods.magnitude import MagnitudeOptions, magnitude_mask
from inhouse.compress.methods.structured import StructuredOptions, structured
from inhouse.compress.pack_as import pack_as
from inhouse.compress.recipe import parse_recipe
from inhouse.compress.sparsity import masked
from inhouse.compress.stages import StageRun
from inhouse.compress.work import Work
from inhouse.core.errors import UnsupportedError
from inhouse.load.describe import describe
from inhouse.load.export import export_model
from inhouse.load.locate import DEMO_FOLDER
from inhouse.load.model import open_model
from inhouse.load.prove import logits_of
from inhouse.load.stored import stored_config, stored_sides
from inhouse.model.spec import ModelSpec
from inhouse.runtime.form import Form
from inhouse.runtime.packed_stored import stored_nbytes_of
from inhouse.runtime.torch_dense import forward
from inhouse.store.stored_model import write_stored
from inhouse.store.stored_source import StoredSource
from tests.compress.tiny_models import make

pytestmark = [pytest.mark.torch, pytest.mark.realdata]


def pruned(sparsity: str | float, shape: tuple[int, int] = (96, 256)) -> Tensor:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    return masked(weight, magnitude_mask(weight, MagnitudeOptions(sparsity, by_row=True)))


@pytest.mark.parametrize(("sparsity", "fmt", "coding"), [
    (0.5, "i8_g32", "s8_g32"), (0.5, "i4_g32", "s4_g32"), ("2:4", "i8_g64", "p8_g64"), ("2:4", "i4_g64", "p4_g64"),
    (0.99, "i8_row", "csr_i8"), (0.99, "bf16", "csr_bf16"), (0.05, "i8_g32", "i8_g32"), (0.1, "i4_g32", "i4_g32"),
    (0.5, "bf16", "bf16"), (0.5, "q8_0", "s8_g32"), (0.5, "q4_0", "s4_g32"), ("2:4", "q4_0", "p4_g32"),
    ("2:4", "q8_0", "p8_g32"), (0.05, "q4_0", "q4_0"),
])  # fmt: skip
def test_the_smallest_form_is_chosen_and_zeros_stay(sparsity: str | float, fmt: str, coding: str) -> None:
    """Bitmasks, 2:4 and columns win where the number of zeros says so, and hold what the dense codes hold."""
    weight = pruned(sparsity)
    plain = pack_as(weight, fmt) if fmt == "bf16" else Grid(fmt, weight.shape[1]).quantize(weight)
    found, why = sparsest(plain)
    assert found.format == coding
    assert bool(why) == (found is plain)
    assert stored_nbytes_of(found) <= stored_nbytes_of(plain)
    assert np.array_equal(found.dequantize(), plain.dequantize())
    assert not found.dequantize()[weight.numpy() == 0].any()


def cut(
    family: str, stories: Path, tmp_path: Path, options: dict[str, Any], **more: Any
) -> tuple[Path, Tensor, Tensor]:
    """A model of a family, cut and stored; (its folder, tokens, logits in memory)."""
    folder = make(family, stories, tmp_path / "model", **more)
    rng = torch.Generator().manual_seed(3)
    tokens, asked = torch.randint(3, 512, (8, 32), generator=rng), torch.randint(3, 512, (1, 24), generator=rng)
    with Work.open(str(folder), tmp_path / "run") as work:
        work.begin("structured")
        calibration = Calibration(tokens, torch.full((8,), 32), "", ())
        structured(work, calibration, StructuredOptions(**options), {})
        work.save("structured")
        with torch.no_grad():
            logits = forward(work.program, asked, work.weights())["logits"][0]
        spec = work.spec
        assert isinstance(spec, ModelSpec)
        forms = [(name, Form(pack_as(work.value(name), "f32"))) for name in work.matrices()]
        vectors = [(n, np.array(work.value(n).numpy())) for n in work.names() if n not in work.matrices()]
        config, sides = stored_config(work.described, spec), stored_sides(work.described)
        write_stored(tmp_path / "new", config, forms, vectors, {}, sides)
    return tmp_path / "new", asked, logits


CUTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("Llama", {"ffn": 0.4, "layers": 1, "kv_groups": 1, "hidden": 0.3, "multiple": 16}, {"num_key_value_heads": 3}),
    ("Llama", {"heads_per_group": 1, "layers": 1, "contiguous": True}, {}),
    ("Gemma2", {"ffn": 0.4, "layers": 1, "heads_per_group": 1, "multiple": 16}, {}),
]


@pytest.mark.native
@pytest.mark.parametrize(("family", "options", "more"), CUTS)
def test_our_engine_and_transformers_open_what_was_cut(
    family: str, options: dict[str, Any], more: dict[str, Any], stories: Path, tmp_path: Path
) -> None:
    folder, tokens, wanted = cut(family, stories, tmp_path, options, **more)
    model = open_model(str(folder), activations="float", kv_dtype="f32", cache=False, threads=1)
    try:
        found = torch.from_numpy(logits_of(model, tokens[0].numpy()))
    finally:
        model.close()
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    export_model(str(folder), "safetensors", tmp_path / "hf", wish="f32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    theirs.train(False)
    with torch.no_grad():
        other = theirs(tokens).logits[0]
    assert (other - wanted).abs().max() < 1e-4 * wanted.abs().max()
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    assert sum(p.numel() for p in theirs.parameters()) == sum(
        int(np.prod(weight.shape)) for weight in model.plain_programs.weights.values()
    )


def test_widths_that_a_config_cannot_say_are_refused(stories: Path, tmp_path: Path) -> None:
    """Gemma scales its embedding by its width: a narrower one would mean another model."""
    with pytest.raises(UnsupportedError, match="embed_scale"):
        cut("Gemma2", stories, tmp_path, {"hidden": 0.3, "multiple": 16})


@pytest.mark.native
@pytest.mark.parametrize(("sparsity", "form"), [(0.5, "bf16"), (0.97, "csr_bf16")])
def test_floats_without_zeros_where_that_is_exact(stories: Path, tmp_path: Path, sparsity: float, form: str) -> None:
    """An f32 checkpoint whose kept values bf16 holds is stored narrower and equal; others stay dense and say why."""
    folder = make("Llama", stories, tmp_path / "m")
    stage = {"prune": {"method": "magnitude", "sparsity": sparsity, "include": ["mlp"]}}
    with Work.open(str(folder), tmp_path / "run") as work:
        work.begin("even")
        for name in work.matrices():
            if "layers.0.mlp" in name:
                work.put(name, work.value(name).bfloat16().float())
        work.save("even")
        StageRun(work, parse_recipe({"stages": [stage]}).stages[0], "0.prune", None, 1 << 28).run()
        stored, notes = finish.write(work, tmp_path / "new", {})
        proven = finish.proof(work, tmp_path / "new", None, True, tmp_path / "run")
        assert proven.logits_error is not None
        source = describe(tmp_path / "new").source
        assert isinstance(source, StoredSource)
        up, other = "layers.0.mlp.up.weight", "layers.1.mlp.up.weight"
        assert (source.packed(up).format, source.packed(other).format) == (form, "f32")
        assert np.array_equal(source.form(up).value(), work.value(up).numpy())
        assert stored.sizes[up] < stored.sizes[other]
        assert (stored.layouts[up], stored.layouts[other]) == (form, "f32")
        source.close()
    dense = [note for note in notes if "is stored dense" in note]
    assert dense == [note for note in notes if "columns hold bf16, and f32 values are not all exact in it" in note]
    assert {note.split()[0] for note in dense} >= {other}
    assert up not in {note.split()[0] for note in dense}


@pytest.mark.native
@pytest.mark.parametrize(("sparsity", "form", "share"), [(0.5, "bf16", 0.5), (0.9, "csr_bf16", 0.25)])
def test_pruned_floats_are_rounded_where_the_recipe_says_so(
    stories: Path, tmp_path: Path, sparsity: float, form: str, share: float
) -> None:
    """Of any f32 checkpoint: torch's own bf16 of the kept values, zeros as they were, in the fewest bytes."""
    folder = make("Llama", stories, tmp_path / "m")
    stages: list[dict[str, Any]] = [
        {"prune": {"method": "magnitude", "sparsity": sparsity, "include": ["mlp"]}},
        {"quantize": {"method": "round", "format": "bf16", "include": ["mlp"]}},
    ]
    with Work.open(str(folder), tmp_path / "run") as work:
        floats = {name: work.value(name).clone() for name in work.matrices() if "mlp" in name}
        for number, stage in enumerate(parse_recipe({"stages": stages}).stages):
            StageRun(work, stage, f"{number}", None, 1 << 28).run()
        stored, notes = finish.write(work, tmp_path / "new", {})
        finish.proof(work, tmp_path / "new", None, True, tmp_path / "run")
    source = describe(tmp_path / "new").source
    assert isinstance(source, StoredSource)
    for name, value in floats.items():
        mask = magnitude_mask(value, MagnitudeOptions(sparsity))
        assert source.packed(name).format == form
        assert torch.equal(torch.from_numpy(source.form(name).value()), masked(value, mask).bfloat16().float())
        assert stored.sizes[name] <= share * value.numel() * 4
    source.close()
    assert not [note for note in notes if "not all exact" in note]


def test_factors_of_a_pruned_matrix_say_once_that_zeros_are_lost(stories: Path, tmp_path: Path) -> None:
    """A product of factors keeps no zeros: it is said where it happens, and no later stage holds a mask over it."""
    stages: list[dict[str, Any]] = [
        {"prune": {"method": "magnitude", "include": ["mlp"]}},
        {"lowrank": {"method": "svd", "ratio": 0.2, "include": ["mlp.down"]}},
        {"quantize": {"method": "round", "format": "i8_row"}},
    ]
    with Work.open(str(make("Llama", stories, tmp_path / "m")), tmp_path / "run") as work:
        for number, stage in enumerate(parse_recipe({"stages": stages}).stages):
            StageRun(work, stage, f"{number}", None, 1 << 28).run()
        assert work.mask("layers.0.mlp.up.weight") is not None
        assert work.mask("layers.0.mlp.down.weight") is None
        said = of_records({unit: line.get("record", {}) for unit, line in work.units().items()})
    downs = [one for one in said if "pruned weights are not 0" in one["done"]]
    assert downs
    assert {one["tensor"].split(".")[-2] for one in downs} == {"down"}
    assert all(one["asked"].startswith("svd") and "product of factors" in one["why"] for one in downs)


@pytest.mark.native
def test_what_a_stage_learned_of_a_bf16_model_is_proven_as_it_is_stored(tmp_path: Path) -> None:
    """The proof compares logits of what is written: floats that changed are rounded to the model's bf16 before it."""
    with Work.open(str(DEMO_FOLDER), tmp_path / "run") as work:
        names = [name for name in work.matrices() if name == "embed.weight" or "mlp.up" in name]
        rng = torch.Generator().manual_seed(0)
        for name in names:
            value = work.value(name)
            work.put(name, value * (1 + 0.004 * torch.randn(value.shape, generator=rng)))
        work.save("learned")
        finish.write(work, tmp_path / "new", {})
        proven = finish.proof(work, tmp_path / "new", None, True, tmp_path / "run")
        source = describe(tmp_path / "new").source
        assert {source.info(name).dtype for name in names} == {"BF16"}
        source.close()
    assert proven.logits_error is not None
    assert proven.logits_error < 1e-5
