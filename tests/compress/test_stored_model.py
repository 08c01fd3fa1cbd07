"""Checkpoints of our own form: written, opened by everything that opens models, run alike by both executors, refused
where damaged, and nothing left of one that could not be written."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from inhouse.core.errors import CapacityError, ConflictError, FormatError, InhouseError, UnsupportedError, UsageError
from inhouse.load.describe import describe
from inhouse.load.importer import import_model
from inhouse.load.model import open_model
from inhouse.load.prove import logits_of, prove
from inhouse.load.stored import stored_config, stored_sides
from inhouse.model.build import build, weight_specs
from inhouse.model.families.table import resolve
from inhouse.runtime.adapters import LowRank
from inhouse.runtime.form import Form
from inhouse.runtime.packed import FORMATS, Packed, pack_float
from inhouse.runtime.torch_dense import forward
from inhouse.store.home import Home
from inhouse.store.source import open_source
from inhouse.store.store import Store
from inhouse.store.stored_model import write_stored
from inhouse.store.stored_source import StoredSource
from tests.compress.forms import random_packed
from tests.compress.stored import F32, mixed, q4, repaired, store, weights_of
from tests.load.checkpoints import greedy

pytestmark = [pytest.mark.torch, pytest.mark.native, pytest.mark.realdata]


@pytest.fixture(scope="module")
def folder(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stored model with every kind of form."""
    target = tmp_path_factory.mktemp("stored") / "mixed"
    store(stories / "hf", target, mixed, {"recipe": {"name": "mixed"}})
    return target


def forms_of(stories: Path) -> dict[str, Form]:
    return {name: mixed(name, value) for name, value in weights_of(stories / "hf").items() if value.ndim == 2}


def dense_logits(weights: dict[str, F32], folder: Path, tokens: np.ndarray) -> F32:
    """The model in memory: folded values through the plain Program."""
    described = describe(folder)
    programs = build(described.spec)
    described.source.close()
    arrays = {name: torch.from_numpy(value) for name, value in (weights | dict(programs.constants)).items()}
    with torch.no_grad():
        return forward(programs.programs["step"], torch.from_numpy(tokens)[None], arrays)["logits"][0].numpy()


ROOT = Path(__file__).resolve().parents[2]
TOKENS = np.array([1, 403, 407, 261, 378, 400, 30, 31, 77, 500, 2, 9], np.int64)


def test_what_was_written_is_proven(stories: Path, folder: Path) -> None:
    values = weights_of(stories / "hf") | {name: form.value() for name, form in forms_of(stories).items()}
    proof = prove(folder, values.__getitem__, lambda tokens: dense_logits(values, folder, tokens), TOKENS)
    assert proof.tensors == len(values)
    assert proof.logits_error is not None
    assert proof.logits_error < 1e-4
    other = values | {"layers.2.mlp.down.weight": values["layers.2.mlp.down.weight"] * np.float32(1.0001)}
    with pytest.raises(FormatError, match=r"layers\.2\.mlp\.down\.weight"):
        prove(folder, other.__getitem__)
    with pytest.raises(FormatError, match="logits"):
        prove(folder, values.__getitem__, lambda tokens: dense_logits(other, folder, tokens) * 1.01, TOKENS)


def test_both_executors_answer_alike(folder: Path) -> None:
    answers = []
    for executor in ("native", "torch"):
        model = open_model(str(folder), executor=executor, threads=1, cache=False)
        assert {"i4_g32", "f16", "bf16", "f32"} == set(model.report.formats)
        answers.append(greedy(model, model.tokenizer.encode("Once upon a time"), 16))
        model.close()
    assert answers[0] == answers[1]


def test_an_independent_reader_finds_the_same_values(stories: Path, folder: Path) -> None:
    """The safetensors package and a decoder written from the format's description."""
    loaded = load_file(folder / "model.safetensors")
    tensors = {n: (t.view(torch.uint16) if t.dtype == torch.bfloat16 else t).numpy() for n, t in loaded.items()}
    document = json.loads((folder / "inhouse.json").read_text())
    used = set()
    forms = forms_of(stories)
    for name, entry in document["tensors"].items():
        parts = {part: tensors[f"{name}.{part}" if part else name] for part in entry["parts"]}
        used |= {f"{name}.{part}" if part else name for part in entry["parts"]}
        columns = tensors[f"{name}.columns"].astype(np.int64) if entry.get("columns") else None
        used |= {f"{name}.columns"} if columns is not None else set()
        if len(entry["shape"]) == 1:
            continue
        value = decode(entry["format"], entry["shape"], parts)
        owner, which = whose(name)
        form = forms[owner]
        wanted = dict(form.matrices())[which].dequantize()
        assert np.array_equal(value, wanted), name
        if which == "":
            assert (columns is None) == (form.columns is None)
            if columns is not None and form.columns is not None:
                assert np.array_equal(columns, form.columns)
    assert used == set(tensors)
    assert sum(form.nbytes for form in forms.values()) + sum(
        4 * value.size for value in weights_of(stories / "hf").values() if value.ndim == 1
    ) == sum(array.nbytes for array in tensors.values())


def whose(name: str) -> tuple[str, str]:
    for which in ("a", "b"):
        if name.endswith(f".{which}.weight"):
            return name.removesuffix(f".{which}.weight") + ".weight", which
    return name, ""


def decode(kind: str, shape: list[int], parts: dict[str, np.ndarray]) -> np.ndarray:
    if kind != "i4_g32":
        array = parts[""]
        if kind == "bf16":
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array.astype(np.float32)
    out, width = shape
    codes = np.empty((out, parts["codes"].shape[1] * 2), np.float32)
    codes[:, 0::2], codes[:, 1::2] = parts["codes"] & 15, parts["codes"] >> 4
    scales = np.repeat(parts["scale"].astype(np.float32), 32, axis=1)
    return ((codes - 8) * scales)[:, :width]


def test_a_tied_embedding_is_stored_once(folder: Path) -> None:
    document = json.loads((folder / "inhouse.json").read_text())
    assert "embed.weight" in document["tensors"]
    assert "head.weight" not in document["tensors"]
    described = describe(folder)
    assert described.spec.tied  # type: ignore[union-attr]
    described.source.close()


def test_a_tied_embedding_may_have_a_side_branch(stories: Path, tmp_path: Path) -> None:
    def choose(name: str, value: F32) -> Form:
        return repaired(value, q4(value), 8) if name == "embed.weight" else Form(pack_float(value, "f32"))

    store(stories / "hf", tmp_path / "m", choose)
    values = weights_of(stories / "hf")
    values["embed.weight"] = choose("embed.weight", values["embed.weight"]).value()
    for executor in ("native", "torch"):
        proof = prove(
            tmp_path / "m",
            values.__getitem__,
            lambda tokens: dense_logits(values, tmp_path / "m", tokens),
            TOKENS,
            executor=executor,
        )
        assert proof.executor.startswith(executor)
        assert (proof.logits_error or 0.0) < 1e-4


MIXTRAL = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": 512,
    "hidden_act": "silu", "num_local_experts": 3, "num_experts_per_tok": 2,
}  # fmt: skip


def random_model(config: dict[str, Any]) -> dict[str, F32]:
    rng = np.random.default_rng(1)
    spec, _ = resolve(config, {"lm_head.weight"})
    made = {}
    for name, weight in weight_specs(spec).items():
        scale = 1.0 if len(weight.shape) == 1 else weight.shape[1] ** -0.5
        made[name] = (rng.standard_normal(weight.shape) * scale).astype(np.float32)
    return made


def write(config: dict[str, Any], made: dict[str, F32], forms: dict[str, Form], stories: Path, target: Path) -> None:
    sides = {file.name: file for file in (stories / "hf").iterdir() if "token" in file.name}
    vectors = [(name, value) for name, value in made.items() if value.ndim == 1]
    write_stored(target, config, forms.items(), vectors, {}, sides)


def test_experts_have_forms_and_side_branches(stories: Path, tmp_path: Path) -> None:
    made = random_model(MIXTRAL)
    forms = {}
    for name, value in made.items():
        if value.ndim == 2:
            expert = ".experts." in name
            forms[name] = repaired(value, q4(value), 6) if expert and "down" not in name else Form(q4(value))
        if name.startswith("layers.1.") and name.endswith("up.weight") and value.ndim == 2:
            forms[name] = repaired(value, None, 20)
        if "router" in name:
            forms[name] = Form(pack_float(value, "f32"))
    write(MIXTRAL, made, forms, stories, tmp_path / "moe")
    values = made | {name: form.value() for name, form in forms.items()}
    for executor in ("native", "torch"):
        proof = prove(
            tmp_path / "moe", values.__getitem__, lambda tokens: dense_logits(values, tmp_path / "moe", tokens),
            TOKENS, executor=executor,
        )  # fmt: skip
        assert (proof.logits_error or 0.0) < 1e-4
    forms["layers.0.moe.experts.1.up.weight"] = repaired(made["layers.0.moe.experts.1.up.weight"], None, 3)
    write(MIXTRAL, made, forms, stories, tmp_path / "uneven")
    with pytest.raises(UnsupportedError, match="different rank"):
        open_model(str(tmp_path / "uneven"))


def test_import_cache_wishes_and_removal(stories: Path, folder: Path) -> None:
    with Store() as opened:
        imported = import_model(folder, "mixed", store=opened)
        assert imported.left_out == ()
        assert imported.version.format == "inhouse"
    texts = []
    for cache in ("made", "mapped"):
        model = open_model("mixed", threads=1)
        assert model.report.cache == cache
        texts.append(greedy(model, model.tokenizer.encode("One day"), 8))
        model.close()
    assert texts[0] == texts[1]
    wished = open_model("mixed", threads=1, quantize="q8")
    assert set(wished.report.formats) == {"i4_g32", "q8_0"}
    assert any("quantised in the file already (I4_G32)" in note for note in wished.report.notes)
    wished.close()
    with Store() as opened:
        opened.remove("mixed:1")
    assert Home.find().packs.is_dir()


def test_resident_weights_are_close_to_what_is_stored(stories: Path, tmp_path: Path) -> None:
    made = store(stories / "hf", tmp_path / "m", lambda name, value: Form(q4(value)))
    model = open_model(str(tmp_path / "m"), cache=False)
    vectors = sum(4 * w.size for w in model.weights.values() if not isinstance(w, Packed))
    assert vectors == sum(size for name, size in made.sizes.items() if "norm" in name)
    assert model.report.nbytes <= 1.1 * made.nbytes  # tiles of 16 rows, sections of 64 bytes
    model.close()


def test_a_process_grows_by_what_is_stored(stories: Path, tmp_path: Path) -> None:
    """Resident memory of a model of 27 million weights in 4 bits with side branches, opened from its pack."""
    config = json.loads((stories / "hf" / "config.json").read_text()) | {
        "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 9, "num_key_value_heads": 4, "head_dim": 64,
    }  # fmt: skip
    spec, _ = resolve(config)
    made, forms = {}, {}
    for number, (name, weight) in enumerate(weight_specs(spec).items()):
        if len(weight.shape) == 1:
            made[name] = np.ones(weight.shape, np.float32)
            continue
        out, width = weight.shape
        factors = (
            pack_float(np.zeros((4, width), np.float32), "f16"),
            pack_float(np.zeros((out, 4), np.float32), "f16"),
        )
        forms[name] = Form(random_packed("i4_g32", (out, width), number), factors if ".q." in name else None)
    write(config, made, forms, stories, tmp_path / "m")
    stored = (tmp_path / "m" / "model.safetensors").stat().st_size
    command = [sys.executable, "-m", "tests.load.resident", str(stories / "hf"), str(tmp_path / "m")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    for _ in range(2):  # the first run makes the pack
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    (found,) = json.loads(done.stdout)
    assert found["weights"] <= stored * 1.05
    assert found["added"] <= stored * 1.15 + found["kv"] + found["step"]


@pytest.mark.parametrize("executor", ["native", "torch"])
def test_adapters_go_where_a_linear_is_still_one(stories: Path, folder: Path, executor: str) -> None:
    rng = np.random.default_rng(0)

    def low(out: int, width: int) -> LowRank:
        return LowRank(*((rng.standard_normal(s) * 0.2).astype(np.float32) for s in ((2, width), (out, 2))))

    adapter = {"layers.0.attn.q.weight": low(64, 64), "layers.1.attn.v.weight": low(32, 64)}
    values = weights_of(stories / "hf") | {name: form.value() for name, form in forms_of(stories).items()}
    values |= {name: values[name] + pair.b @ pair.a for name, pair in adapter.items()}
    model = open_model(str(folder), executor=executor, activations="float", kv_dtype="f32", cache=False)
    model.executor.set_adapter(1, adapter)
    found = logits_of(model, TOKENS, adapter=1)
    wanted = dense_logits(values, folder, TOKENS)
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
    with pytest.raises(UnsupportedError, match=r"layers\.0\.mlp\.up\.weight"):
        model.executor.set_adapter(2, {"layers.0.mlp.up.weight": low(172, 64)})
    model.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 3}, {"intermediate_size": 96}, {"num_attention_heads": 4, "num_key_value_heads": 2},
        {"hidden_size": 48, "head_dim": 8},
    ],
)  # fmt: skip
def test_pruned_shapes_come_back(stories: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    described = describe(stories / "hf")
    fields = {"num_hidden_layers": "layers", "intermediate_size": "ffn", "num_attention_heads": "heads",
              "num_key_value_heads": "kv_heads", "hidden_size": "hidden", "head_dim": "head_dim"}  # fmt: skip
    spec = replace(described.spec, **{fields[key]: value for key, value in changes.items()})
    config = stored_config(described, spec)
    sides = stored_sides(described)
    described.source.close()
    rng = np.random.default_rng(0)
    made = {n: rng.standard_normal(w.shape).astype(np.float32) * 0.1 for n, w in weight_specs(spec).items()}
    forms = [(name, Form(q4(value))) for name, value in made.items() if value.ndim == 2]
    write_stored(tmp_path / "m", config, forms, [(n, v) for n, v in made.items() if v.ndim == 1], {}, sides)
    again = describe(tmp_path / "m")
    assert again.spec == spec
    again.source.close()
    model = open_model(str(tmp_path / "m"), cache=False)
    greedy(model, [1, 2, 3], 2)
    model.close()


def damaged(folder: Path, target: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(folder, target)
    document = json.loads((target / "inhouse.json").read_text())
    edit(document)
    (target / "inhouse.json").write_text(json.dumps(document))
    return target


def test_tables_that_lie_are_refused(folder: Path, tmp_path: Path) -> None:
    q, up = "layers.0.attn.q.weight", "layers.0.mlp.up.weight"
    edits: list[Callable[[dict[str, Any]], Any]] = [
        lambda d: d["tensors"].pop("final_norm"),
        lambda d: d["tensors"].pop("layers.0.attn.q.a.weight"),
        lambda d: d["tensors"][q].update(shape=[64, 1 << 40]),
        lambda d: d["tensors"][q].update(shape=[64, 96]),
        lambda d: d["tensors"][q].update(format="i4_g64"),
        lambda d: d["tensors"][q].update(format="made_up"),
        lambda d: d["tensors"][q].update(parts=["codes"]),
        lambda d: d["tensors"][q].update(parts=["codes", "scale", "scale"]),
        lambda d: d["tensors"]["layers.0.attn.v.weight"].pop("columns"),
        lambda d: d["low_rank"].pop(q),
        lambda d: d["low_rank"][q].update(rank=5),
        lambda d: d["low_rank"][q].update(alone=True),
        lambda d: d["low_rank"].pop(up),
        lambda d: d["low_rank"].update({"nothing.weight": {"rank": 2, "alone": True}}),
        lambda d: d.update(version=99),
        lambda d: d.update(format="other"),
        lambda d: d.update(tensors=[]),
    ]
    for number, edit in enumerate(edits):
        with pytest.raises((FormatError, UnsupportedError)):
            open_model(str(damaged(folder, tmp_path / str(number), edit)), executor="torch", cache=False)
    shutil.copytree(folder, tmp_path / "bare")
    (tmp_path / "bare" / "inhouse.json").unlink()
    with pytest.raises(InhouseError, match=r"inhouse\.json"):
        describe(tmp_path / "bare")
    shutil.copytree(folder, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="gptq"):
        describe(tmp_path / "other")


def test_orders_and_scales_that_lie_are_refused(folder: Path, tmp_path: Path) -> None:
    for name, kind, value, message in (
        ("layers.0.attn.v.weight.columns", "<u2", 7, "no order"),
        ("layers.0.attn.v.weight.scale", "<f2", np.inf, "NaN or infinite"),
    ):
        target = tmp_path / name
        shutil.copytree(folder, target)
        path = target / "model.safetensors"
        raw = bytearray(path.read_bytes())
        length = int.from_bytes(raw[:8], "little")
        begin = json.loads(raw[8 : 8 + length])[name]["data_offsets"][0] + 8 + length
        raw[begin : begin + 4] = np.array([value, value], kind).tobytes()
        path.write_bytes(raw)
        with Store() as opened, pytest.raises(FormatError, match=message):
            import_model(target, store=opened)


def test_a_full_disk_leaves_nothing(stories: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CapacityError, match="full"):
            store(stories / "hf", tmp_path / "m", mixed)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    form = Form(pack_float(np.ones((4, 32), np.float32), "f32"))
    norm = [("norm", np.ones(4, np.float32))]
    with pytest.raises(ConflictError):
        write_stored(tmp_path, {}, [], [], {}, {})
    cases: list[tuple[list[Any], list[Any], dict[str, Any], dict[str, Any]]] = [
        ([("x.weight", form), ("x.weight", form)], norm, {}, {}),
        ([("x", form)], norm, {}, {}),
        ([], [("n", np.ones(4, np.int64))], {}, {}),
        ([], [("n", np.array([1, np.nan], np.float32))], {}, {}),
        ([], norm, {"a": float("nan")}, {}),
        ([], norm, {}, {"../x": b""}),
        ([], norm, {}, {"config.json": b""}),
    ]
    for forms, vectors, manifest, sides in cases:
        with pytest.raises((UsageError, FormatError)):
            write_stored(tmp_path / "m", {}, forms, vectors, manifest, sides)
        assert list(tmp_path.iterdir()) == []


def test_every_format_of_the_table_is_read_back(tmp_path: Path) -> None:
    packed = {name: random_packed(name, (20, 512), 3) for name in FORMATS}
    write_stored(tmp_path / "m", {}, [(f"{name}.weight", Form(p)) for name, p in packed.items()], [], {}, {})
    source = open_source(tmp_path / "m")
    assert isinstance(source, StoredSource)
    for name, wanted in packed.items():
        assert np.array_equal(source.packed(f"{name}.weight").data, wanted.data)
        assert source.info(f"{name}.weight").nbytes == Form(wanted).nbytes
    source.close()
