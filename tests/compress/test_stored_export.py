"""Compressed checkpoints as files of other programs: what a form can hold arrives bit by bit, the rest is listed with
its reason, and readers that are not ours find the values."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnxruntime  # type: ignore[import-untyped]
import pytest
import torch
import transformers

from inhouse.cli.main import main
from inhouse.load.describe import describe
from inhouse.load.export import FORMS, export_model
from inhouse.load.export_report import ExportReport
from inhouse.load.export_stages import every_fate, stages
from inhouse.runtime.form import Form
from inhouse.runtime.packed import FORMATS, pack_float
from tests.compress.forms import random_packed
from tests.compress.stored import F32, mixed, q4, store, weights_of

pytestmark = [pytest.mark.torch, pytest.mark.native, pytest.mark.realdata]
ROOT = Path(__file__).resolve().parents[2]
TOKENS = [1, 403, 407, 261, 378, 400, 30, 31, 77]


@pytest.fixture(scope="module")
def folder(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("stored") / "mixed"
    store(stories / "hf", target, mixed)
    return target


@pytest.fixture(scope="module")
def values(stories: Path) -> dict[str, F32]:
    """What the stored model stands for."""
    plain = weights_of(stories / "hf")
    return {name: mixed(name, value).value() if value.ndim == 2 else value for name, value in plain.items()}


def notes(report: ExportReport) -> dict[str, str]:
    return {tensor.name: tensor.note for tensor in report.tensors}


def test_safetensors_is_read_by_transformers(folder: Path, values: dict[str, F32], tmp_path: Path) -> None:
    report = export_model(str(folder), "safetensors", tmp_path / "out", wish="f32")
    assert all(tensor.exact for tensor in report.tensors)
    found = notes(report)
    assert found["model.layers.0.self_attn.q_proj.weight"] == (
        "a side branch of rank 4 was multiplied out into the values"
    )
    assert "product of factors of rank 40" in found["model.layers.0.mlp.up_proj.weight"]
    assert "act-order" in found["model.layers.0.self_attn.v_proj.weight"]
    assert found["model.layers.0.mlp.gate_proj.weight"] == ""
    assert not (tmp_path / "out" / "inhouse.json").exists()
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    again = weights_of(tmp_path / "out")
    assert again.keys() == values.keys()
    for name, value in values.items():
        assert np.array_equal(again[name], value), name
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(
        model.model.layers[0].self_attn.v_proj.weight, torch.from_numpy(values["layers.0.attn.v.weight"])
    )


def test_gguf_keeps_codes_and_lists_the_rest(folder: Path, values: dict[str, F32], tmp_path: Path) -> None:
    report = export_model(str(folder), "gguf", tmp_path / "out.gguf")
    rows = {tensor.name: tensor for tensor in report.tensors}
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    embedding = tensors["token_embd.weight"]
    assert embedding.tensor_type.name == "Q4_0"
    read = gguf.quants.dequantize(embedding.data, embedding.tensor_type)
    assert np.array_equal(read, values["embed.weight"])
    assert rows["token_embd.weight"].exact
    assert (rows["blk.0.ffn_down.weight"].became, rows["blk.0.ffn_down.weight"].exact) == ("F16", False)
    assert "172 inputs are no whole blocks" in rows["blk.0.ffn_down.weight"].note
    assert "rank 4 was multiplied out" in rows["blk.0.attn_q.weight"].note
    for tensor in report.tensors:
        assert tensor.exact or tensor.note, tensor
    again = weights_of(tmp_path / "out.gguf")
    for name, value in values.items():
        worst = np.abs(again[name] - value).max() / np.abs(value).max()
        assert worst < 0.01, name  # Q8_0 at the coarsest


@pytest.mark.parametrize("form", ["gptq", "awq", "compressed-tensors"])
def test_integer_forms_keep_or_list(folder: Path, values: dict[str, F32], tmp_path: Path, form: str) -> None:
    report = export_model(str(folder), form, tmp_path / "out")
    assert {tensor.became.split(" g")[0] for tensor in report.tensors} >= {f"{form} int4", "F16", "F32"}
    again = weights_of(tmp_path / "out")
    for name, value in values.items():
        error = np.linalg.norm(again[name] - value) / np.linalg.norm(value)
        assert error < 0.15, name  # 4 bits in groups of 64
    listed = notes(report)
    assert "172" in listed["model.layers.0.mlp.down_proj.weight"]
    assert "rounded anew from i4_g32" in listed["model.layers.0.self_attn.q_proj.weight"]


@pytest.mark.parametrize("form", ["gptq", "awq", "compressed-tensors"])
def test_integer_forms_keep_codes_where_all_fit(stories: Path, tmp_path: Path, form: str) -> None:
    def choose(name: str, value: F32) -> Form:
        return Form(q4(value)) if ".attn." in name else Form(pack_float(value, "f16"))

    store(stories / "hf", tmp_path / "m", choose)
    report = export_model(str(tmp_path / "m"), form, tmp_path / "out")
    kept = [tensor for tensor in report.tensors if "self_attn" in tensor.name]
    assert len(kept) == 20
    if form != "awq":
        assert all(tensor.exact for tensor in kept), kept[0]
    again, plain = weights_of(tmp_path / "out"), weights_of(stories / "hf")
    for name in (f"layers.{i}.attn.{part}.weight" for i in range(5) for part in "qkvo"):
        assert np.array_equal(again[name], choose(name, plain[name]).value()), name


def test_onnx_gives_the_folded_logits(folder: Path, values: dict[str, F32], tmp_path: Path) -> None:
    report = export_model(str(folder), "onnx", tmp_path / "out.onnx")
    assert any("multiplied out" in tensor.note for tensor in report.tensors)
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"input_ids": np.array([TOKENS], np.int64)})
    from tests.compress.test_stored_model import dense_logits

    wanted = dense_logits(values, folder, np.array(TOKENS, np.int64))
    assert np.abs(found[0] - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_a_gguf_parent_becomes_a_folder_of_ours(stories: Path, tmp_path: Path) -> None:
    """config.json and tokenizer are made from the key table."""
    store(stories / "stories260K-Q8_0.gguf", tmp_path / "m", lambda name, value: Form(q4(value)))
    described = describe(tmp_path / "m")
    assert (described.family.name, described.source.format) == ("llama", "inhouse")
    described.source.close()
    assert {"tokenizer.json", "config.json", "inhouse.json"} <= {file.name for file in (tmp_path / "m").iterdir()}


def test_every_stage_has_a_fate_in_every_form() -> None:
    for _, name, extra in stages():
        for form, fate in every_fate(name, extra).items():
            assert form in FORMS
            assert fate.became
            float_source = name in FORMATS and FORMATS[name].low == 0 and not extra
            assert fate.kept or fate.note or float_source, (form, name)


def test_fates_are_what_exports_do(stories: Path, tmp_path: Path) -> None:
    """A model of one format, for a few formats, against the generated table."""
    for name in ("q4_k", "i4_g128_bf16", "nf4_g64", "s8_g32", "p4_g64", "vq1_g128", "csr_bf16"):
        rng = np.random.default_rng(0)

        def choose(weight: str, value: F32, name: str = name, rng: np.random.Generator = rng) -> Form:
            return Form(random_packed(name, value.shape, int(rng.integers(99)))) if ".mlp." in weight else Form(
                pack_float(value, "f16")
            )  # fmt: skip

        wide = tmp_path / name
        _wide_model(stories, wide, choose)
        for form in ("gguf", "gptq", "compressed-tensors", "safetensors"):
            report = export_model(str(wide), form, tmp_path / f"{name}-{form}")
            (row,) = [
                t for t in report.tensors if t.name in ("model.layers.0.mlp.up_proj.weight", "blk.0.ffn_up.weight")
            ]
            fate = every_fate(name, "")[form]
            assert (row.exact, row.became.removeprefix(f"{form} ")) == (fate.kept, fate.became), (name, form)


def _wide_model(stories: Path, target: Path, choose: Any) -> None:
    from inhouse.model.build import weight_specs
    from inhouse.model.families.table import resolve
    from inhouse.store.stored_model import write_stored

    config = json.loads((stories / "hf" / "config.json").read_text()) | {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "head_dim": 32,
    }  # fmt: skip
    rng = np.random.default_rng(0)
    spec, _ = resolve(config)
    made = {n: rng.standard_normal(w.shape).astype(np.float32) * 0.1 for n, w in weight_specs(spec).items()}
    sides = {file.name: file for file in (stories / "hf").iterdir() if "token" in file.name}
    forms = [(name, choose(name, value)) for name, value in made.items() if value.ndim == 2]
    write_stored(target, config, forms, [(n, v) for n, v in made.items() if v.ndim == 1], {}, sides)


def test_the_page_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, "tools/export_matrix.py", "--check"], cwd=ROOT, check=False)
    assert done.returncode == 0, "run python tools/export_matrix.py"


def test_show_lists_what_is_stored(folder: Path, stories: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["show", str(folder), "--tensors", "--json"])
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    document = json.loads((folder / "inhouse.json").read_text())
    assert rows.keys() == document["tensors"].keys()
    weights = folder / "model.safetensors"
    header = int.from_bytes(weights.read_bytes()[:8], "little")
    assert sum(row["bytes"] for row in rows.values()) == weights.stat().st_size - 8 - header
    plain = weights_of(stories / "hf")
    name = "layers.2.mlp.down.weight"
    form = mixed(name, plain[name])
    assert rows[name] | {"kind": 0, "source": 0} == {
        "name": name, "shape": [64, 172], "layout": "i4_g32", "bytes": form.nbytes,
        "zeros": int((form.value() == 0).sum()), "kind": 0, "source": 0, "packed_bytes": form.main.nbytes,  # type: ignore[union-attr]
        "stored": "I4_G32", "stored_bytes": form.nbytes,
    }  # fmt: skip
    assert rows["layers.0.attn.q.a.weight"]["shape"] == [4, 64]


def test_groups_that_do_not_divide_fall_back_and_are_listed(stories: Path, tmp_path: Path) -> None:
    """64 and 172 inputs in groups of 128: stored and run with a short last group, exported tensor by tensor."""
    store(
        stories / "hf", tmp_path / "m", lambda name, value: Form(random_packed("u4_g128", value.shape, value.shape[1]))
    )
    described = describe(tmp_path / "m")
    stored = described.source.info("layers.0.mlp.down.weight")
    described.source.close()
    assert (stored.dtype, stored.nbytes) == ("U4_G128", 64 * (192 // 2 + 2 * 2 + 1))
    values = weights_of(tmp_path / "m")
    for form in ("gptq", "awq", "compressed-tensors", "gguf"):
        report = export_model(str(tmp_path / "m"), form, tmp_path / form)
        down = next(t for t in report.tensors if "down" in t.name)
        assert not down.exact
        assert "172" in down.note or "u4_g128" in down.note, down
        again = weights_of(tmp_path / form)
        for name, value in values.items():
            error = np.linalg.norm(again[name] - value) / np.linalg.norm(value)
            assert error < 0.2, (form, name)
