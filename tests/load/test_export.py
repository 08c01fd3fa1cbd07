"""Exports opened by readers that are not ours: the gguf package, transformers, and packers' rules written out here."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from inhouse.cli.main import main
from inhouse.core.errors import ConflictError, UnsupportedError, UsageError
from inhouse.core.tensors import TensorSource
from inhouse.load.describe import describe, read_tokenizer
from inhouse.load.export import export_model
from inhouse.load.export_gguf import gguf_wishes
from inhouse.load.locate import DEMO_FOLDER
from inhouse.model.build import build
from inhouse.runtime.packed_layout import F32
from inhouse.store.source import materialise, open_source
from tests.families.parity import PROMPT, TransformersOracle, open_tiny, run, transformers_oracle, worst

pytestmark = [pytest.mark.native, pytest.mark.torch]

VOCAB = json.loads((DEMO_FOLDER / "config.json").read_text())["vocab_size"]
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TransformersOracle]:
    """A random Llama of 256 inputs, with the demo's tokenizer."""
    return made(tmp_path_factory.mktemp("llama"), "Llama", SHAPE)


def made(folder: Path, family: str, shape: dict[str, object]) -> tuple[Path, TransformersOracle]:
    oracle = transformers_oracle(f"{family}ForCausalLM", f"{family}Config", shape)
    with torch.no_grad():
        for parameter in oracle.model.parameters():
            parameter.mul_(0.2 if parameter.dim() > 1 else 1.0)
    oracle.save(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_FOLDER / name, folder / name)
    return folder, oracle


def gguf_tensors(path: Path) -> dict[str, tuple[str, F32]]:
    """Name -> (type, values) as the gguf package reads them."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        found[tensor.name] = (tensor.tensor_type.name, values)
    return found


def logits(path: Path, executor: str = "native", plain: bool = True) -> F32:
    """Of PROMPT, with float activations (`plain`) or as served."""
    tiny = open_tiny(path)
    if plain:
        tiny = replace(tiny, programs=build(tiny.spec))
    made = tiny.executor(executor)
    out = run(made, [(PROMPT, 0, 0)])
    made.close()
    return out


@pytest.mark.realdata
def test_a_folder_becomes_the_gguf_that_its_publisher_made(stories: Path, tmp_path: Path) -> None:
    export_model(str(stories / "hf"), "gguf", tmp_path / "out.gguf")
    ours, theirs = gguf_tensors(tmp_path / "out.gguf"), gguf_tensors(stories / "stories260K-F32.gguf")
    assert ours.keys() - {"output.weight"} == theirs.keys() - {"output.weight"}
    for name in theirs.keys() & ours.keys():
        assert np.array_equal(ours[name][1], theirs[name][1]), name
    assert np.array_equal(logits(tmp_path / "out.gguf"), logits(stories / "hf"))


@pytest.mark.realdata
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16"])
def test_a_gguf_goes_out_bit_for_bit(stories: Path, tmp_path: Path, kind: str) -> None:
    report = export_model(str(stories / f"stories260K-{kind}.gguf"), "gguf", tmp_path / "out.gguf")
    assert all(tensor.exact for tensor in report.tensors)
    assert not report.fallbacks
    ours, theirs = gguf_tensors(tmp_path / "out.gguf"), gguf_tensors(stories / f"stories260K-{kind}.gguf")
    assert ours.keys() == theirs.keys()
    for name, (dtype, values) in theirs.items():
        assert ours[name][0] == dtype
        assert np.array_equal(ours[name][1], values), name


def set_eval(model: Any) -> Any:
    return model.eval()


PLACES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def as_transformers(path: Path, oracle: TransformersOracle) -> TransformersOracle:
    """The original with the values that the gguf package reads; llama.cpp's order of q and k rows undone."""
    state = {}
    for name, (_, values) in gguf_tensors(path).items():
        assert np.isfinite(values).all(), name
        stem = name.removesuffix(".weight")
        if stem.endswith(("attn_q", "attn_k")):
            values = values.reshape(-1, 32, 2, 256).swapaxes(1, 2).reshape(values.shape)
        _, layer, part = (*stem.split("."), "", "")[:3]
        place = TOP.get(stem) or f"model.layers.{layer}.{PLACES[part]}"
        state[f"{place}.weight"] = torch.from_numpy(np.array(values))
    model = copy.deepcopy(oracle.model)
    model.load_state_dict(state)
    return TransformersOracle(model)


@pytest.mark.parametrize("wish", ["bf16", "q8_0", "q4_k_m", "iq4_nl"])
def test_transformers_opens_the_gguf_itself(llama: tuple[Path, TransformersOracle], tmp_path: Path, wish: str) -> None:
    folder, oracle = llama
    export_model(str(folder), "gguf", tmp_path / "out.gguf", wish=wish)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="out.gguf", dtype=torch.float32, attn_implementation="eager"
    )
    expected = as_transformers(tmp_path / "out.gguf", oracle).logits(PROMPT)
    assert worst(TransformersOracle(set_eval(theirs)).logits(PROMPT), expected) < 1e-5


@pytest.mark.parametrize("wish", gguf_wishes())
def test_every_gguf_type_means_the_same_to_transformers_and_to_both_executors(
    llama: tuple[Path, TransformersOracle], tmp_path: Path, wish: str
) -> None:
    folder, oracle = llama
    report = export_model(str(folder), "gguf", tmp_path / "out.gguf", wish=wish)
    kinds = {tensor.became for tensor in report.tensors}
    assert wish.upper().removesuffix("_M") in kinds
    wanted = as_transformers(tmp_path / "out.gguf", oracle).logits(PROMPT)
    assert worst(logits(tmp_path / "out.gguf", "native"), wanted) < 1e-4
    assert worst(logits(tmp_path / "out.gguf", "torch"), wanted) < 1e-4
    served = logits(tmp_path / "out.gguf", "native", plain=False)
    assert worst(served, wanted) < 0.05  # int8 activations


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Mistral"])
def test_families_go_to_gguf_and_back(tmp_path: Path, family: str) -> None:
    more = {"sliding_window": None} if family == "Mistral" else {}
    folder, oracle = made(tmp_path / "in", family, SHAPE | {"head_dim": 64, "num_hidden_layers": 1} | more)
    export_model(str(folder), "gguf", tmp_path / "out.gguf")
    export_model(str(tmp_path / "out.gguf"), "safetensors", tmp_path / "back")
    assert worst(logits(tmp_path / "out.gguf"), oracle.logits(PROMPT)) < 1e-4
    again = set_eval(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager"))
    assert worst(TransformersOracle(again).logits(PROMPT), oracle.logits(PROMPT)) < 1e-5
    first, second = open_source(folder), open_source(tmp_path / "back")
    assert set(first) == set(second)
    for name in first:
        assert np.array_equal(materialise(first, name), materialise(second, name)), name


def test_llama3_rope_survives_both_ways(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500000.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    settings = SHAPE | {"rope_parameters": scaling, "max_position_embeddings": 16384, "num_hidden_layers": 1}
    folder, oracle = made(tmp_path / "in", "Llama", settings)
    export_model(str(folder), "gguf", tmp_path / "out.gguf")
    assert "rope_freqs.weight" in gguf_tensors(tmp_path / "out.gguf")
    assert worst(logits(tmp_path / "out.gguf"), oracle.logits(PROMPT)) < 1e-4
    export_model(str(tmp_path / "out.gguf"), "safetensors", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["rope_scaling"]["factor"] == 8.0


def test_the_tokenizer_goes_along(tmp_path: Path) -> None:
    export_model("demo", "gguf", tmp_path / "out.gguf")
    export_model(str(tmp_path / "out.gguf"), "safetensors", tmp_path / "back")
    original = read_tokenizer(describe(DEMO_FOLDER))
    inside, back = read_tokenizer(describe(tmp_path / "out.gguf")), read_tokenizer(describe(tmp_path / "back"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    for text in ("Where is the lighthouse?", "  Größe 12345 你好 🙂\n", "<|im_start|>user"):
        assert inside.encode(text) == back.encode(text) == original.encode(text)
        assert theirs.encode(text) == original.encode(text)
    assert inside.eos_ids == original.eos_ids == back.eos_ids
    assert inside.chat_template == original.chat_template == back.chat_template


@pytest.mark.parametrize("wish", ["", "f16", "bf16"])
def test_safetensors_open_in_transformers(llama: tuple[Path, TransformersOracle], tmp_path: Path, wish: str) -> None:
    folder, oracle = llama
    export_model(str(folder), "safetensors", tmp_path / "out", wish=wish)
    dtype = {"": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[wish]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert again.dtype == dtype
    for name, tensor in oracle.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.to(dtype)), name


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """Words [n, m] -> fields [n, m * 32 / bits], lowest first."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return ((words.view(np.uint32)[..., None] >> shifts) & np.uint32((1 << bits) - 1)).reshape(len(words), -1)


def decoded(folder: Path, form: str, stem: str) -> F32:
    """The value of a linear [out, in] by the form's published rules."""
    source = open_source(folder)
    get = {s: materialise_any(source, f"{stem}.{s}") for s in names_of(form)}
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    if form == "compressed-tensors":
        weights = config["config_groups"]["group_0"]["weights"]
        bits, group = weights["num_bits"], weights["group_size"]
        codes = unpack(get["weight_packed"], bits).astype(np.float32)
        zeros: np.ndarray = np.full(get["weight_scale"].shape, 1 << (bits - 1), np.float32)
        if not weights["symmetric"]:
            packed = materialise_any(source, f"{stem}.weight_zero_point")
            zeros = unpack(np.ascontiguousarray(packed.T), bits).T.astype(np.float32)
        assert get["weight_shape"].tolist() == list(codes.shape)
        scales = get["weight_scale"]
    elif form == "gptq":
        bits, group = config["bits"], config["group_size"]
        codes = unpack(np.ascontiguousarray(get["qweight"].T), bits).astype(np.float32)
        zeros = (unpack(get["qzeros"], bits).T + 1).astype(np.float32)
        assert np.array_equal(get["g_idx"], np.arange(codes.shape[1]) // group)
        scales = get["scales"].T
    else:
        group = config["group_size"]
        back = [0, 4, 1, 5, 2, 6, 3, 7]
        codes, zeros = (
            unpack(get[name], 4)
            .reshape(len(get[name]), -1, 8)[:, :, back]
            .reshape(len(get[name]), -1)
            .T.astype(np.float32)
            for name in ("qweight", "qzeros")
        )
        scales = get["scales"].T
    spread = [np.repeat(a.astype(np.float32), group, axis=1) for a in (scales, zeros)]
    return spread[0] * (codes - spread[1])


def names_of(form: str) -> tuple[str, ...]:
    if form == "compressed-tensors":
        return ("weight_packed", "weight_scale", "weight_shape")
    return ("qweight", "qzeros", "scales", "g_idx")[: 4 if form == "gptq" else 3]


def materialise_any(source: TensorSource, name: str) -> np.ndarray:
    info = source.info(name)
    kind = {"I32": np.int32, "I64": np.int64, "F16": np.float16}[info.dtype]
    values: np.ndarray = source.raw(name).view(kind).reshape(info.shape)
    return values


STEM = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(("form", "wish", "bound"), [
    ("gptq", "int4", 0.013), ("gptq", "int8", 6e-5), ("awq", "int4", 0.013), ("compressed-tensors", "int4", 0.013),
    ("compressed-tensors", "int8", 6e-5),
])  # fmt: skip
def test_integer_forms_by_their_own_rules(
    llama: tuple[Path, TransformersOracle], tmp_path: Path, form: str, wish: str, bound: float
) -> None:
    folder, oracle = llama
    report = export_model(str(folder), form, tmp_path / "out", wish=wish)
    original = oracle.model.state_dict()[f"{STEM}.weight"].numpy()
    values = decoded(tmp_path / "out", form, STEM)
    assert ((values - original) ** 2).sum() / (original**2).sum() < bound
    assert sum(form in tensor.became for tensor in report.tensors) == 14
    assert "lm_head.weight" in open_source(tmp_path / "out")


@pytest.mark.parametrize(("form", "kind"), [
    ("gptq", "q4_0"), ("awq", "q4_0"), ("compressed-tensors", "q4_0"), ("gptq", "q8_0"), ("compressed-tensors", "q8_0"),
])  # fmt: skip
def test_codes_go_over_without_a_change(
    llama: tuple[Path, TransformersOracle], tmp_path: Path, form: str, kind: str
) -> None:
    export_model(str(llama[0]), "gguf", tmp_path / "in.gguf", wish=kind)
    report = export_model(str(tmp_path / "in.gguf"), form, tmp_path / "out")
    assert all(tensor.exact for tensor in report.tensors if form in tensor.became)
    expected = gguf_tensors(tmp_path / "in.gguf")["blk.1.ffn_down.weight"][1]
    assert np.array_equal(decoded(tmp_path / "out", form, STEM), expected)


def test_what_does_not_fit_is_listed_and_named_in_the_config(tmp_path: Path) -> None:
    shape = SHAPE | {"intermediate_size": 344, "num_hidden_layers": 1}
    folder, _ = made(tmp_path / "in", "Llama", shape)
    report = export_model(str(folder), "awq", tmp_path / "out")
    assert [t.name for t in report.fallbacks] == ["model.layers.0.mlp.down_proj.weight"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["modules_to_not_convert"] == ["model.layers.0.mlp.down_proj", "lm_head"]
    to_gguf = export_model(str(folder), "gguf", tmp_path / "out.gguf", wish="q4_k")
    notes = {t.name: (t.became, t.note) for t in to_gguf.fallbacks}
    assert notes["blk.0.ffn_down.weight"] == ("F16", "344 inputs are no multiple of 32")
    assert notes["output.weight"] == ("Q6_K", "the head keeps 6 bits")


def test_nothing_is_overwritten_and_nothing_half_done_stays(
    llama: tuple[Path, TransformersOracle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ConflictError, match="there exists"):
        export_model(str(llama[0]), "safetensors", tmp_path / "there")
    with pytest.raises(UsageError, match="no type 'q9'"):
        export_model(str(llama[0]), "gguf", tmp_path / "x.gguf", wish="q9")
    with pytest.raises(UsageError, match="unknown form"):
        export_model(str(llama[0]), "tflite", tmp_path / "x")

    def broken(*_: object) -> None:
        raise UnsupportedError("no")

    monkeypatch.setattr("inhouse.load.export_hf._side_files", broken)
    with pytest.raises(UnsupportedError):
        export_model(str(llama[0]), "safetensors", tmp_path / "x")
    assert [file.name for file in tmp_path.iterdir()] == ["there"]


def test_the_command_reports_every_tensor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["export", "demo", "--to", "gguf", "--type", "q8_0", "--json", str(tmp_path / "d.gguf")])
    assert done.value.code == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["format"] == "gguf"
    assert shown["bytes"] == (tmp_path / "d.gguf").stat().st_size
    assert {row["became"] for row in shown["tensors"]} == {"F32", "Q8_0"}
    with pytest.raises(SystemExit) as again:
        main(["export", "demo", "--to", "gguf", str(tmp_path / "d.gguf")])
    assert again.value.code == ConflictError.exit_code


SMALL = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
FUSED: dict[str, tuple[str, str, dict[str, object]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2", {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 64}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoX", {}),
    "falcon": ("FalconForCausalLM", "Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "phi3": ("Phi3ForCausalLM", "Phi3", {}),
    "gemma": ("GemmaForCausalLM", "Gemma", {"head_dim": 16}),
    "cohere": ("CohereForCausalLM", "Cohere", {}),
}


@pytest.mark.parametrize("case", FUSED)
def test_fused_transposed_and_shifted_weights_find_their_places(tmp_path: Path, case: str) -> None:
    name, prefix, more = FUSED[case]
    shape = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    if case in ("gpt2", "falcon"):
        shape = {key: value for key, value in shape.items() if case == "falcon" and key.startswith(("hidden", "num"))}
        shape.pop("num_key_value_heads", None)
    if case == "gpt_neox":
        shape.pop("num_key_value_heads")
    oracle = transformers_oracle(name, f"{prefix}Config", SMALL | shape | more)
    folder = tmp_path / "in"
    oracle.save(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_FOLDER / file, folder / file)
    export_model(str(folder), "gguf", tmp_path / "out.gguf")
    export_model(str(folder), "safetensors", tmp_path / "out")
    wanted = oracle.logits(PROMPT)
    assert worst(logits(tmp_path / "out.gguf"), wanted) < 1e-4
    assert worst(logits(tmp_path / "out"), wanted) < 1e-4
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert worst(TransformersOracle(set_eval(again)).logits(PROMPT), wanted) < 1e-5


def test_what_gguf_has_no_words_for_is_refused_by_name(tmp_path: Path) -> None:
    folder, _ = made(tmp_path / "in", "Helium", SHAPE | {"head_dim": 64, "num_hidden_layers": 1})
    with pytest.raises(UnsupportedError, match="no architecture for helium"):
        export_model(str(folder), "gguf", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_codes_that_are_made_anew_are_listed(llama: tuple[Path, TransformersOracle], tmp_path: Path) -> None:
    export_model(str(llama[0]), "gguf", tmp_path / "in.gguf", wish="q8_0")
    coarser = export_model(str(tmp_path / "in.gguf"), "gguf", tmp_path / "out.gguf", wish="q4_0")
    notes = {tensor.name: tensor.note for tensor in coarser.fallbacks}
    assert notes["blk.0.ffn_up.weight"] == "encoded anew from q8_0"
    rounded = export_model(str(tmp_path / "in.gguf"), "awq", tmp_path / "out")
    assert {t.note for t in rounded.tensors if t.became.startswith("awq")} == {"rounded anew from q8_0"}
