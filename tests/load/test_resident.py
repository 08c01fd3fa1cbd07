"""A float model, its GGUF Q4_0, Q8_0 and Q4_K, its GPTQ and its AWQ form, open at once in one process: what each adds
to the resident memory is its file's size and the KV cache, and at most 15 % more."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

pytestmark = [pytest.mark.torch, pytest.mark.native, pytest.mark.realdata]

HIDDEN, FFN, LAYERS, VOCAB, HEADS, KV_HEADS = 512, 1536, 9, 512, 8, 4
ROOT = Path(__file__).resolve().parents[2]
SPARE = 0.15
Shapes = dict[str, tuple[int, int]]


def linears() -> Shapes:
    """Hugging Face name -> [out, in] of one layer's linears."""
    kv = HIDDEN // HEADS * KV_HEADS
    attention = {"q_proj": (HIDDEN, HIDDEN), "k_proj": (kv, HIDDEN), "v_proj": (kv, HIDDEN), "o_proj": (HIDDEN, HIDDEN)}
    mlp = {"gate_proj": (FFN, HIDDEN), "up_proj": (FFN, HIDDEN), "down_proj": (HIDDEN, FFN)}
    return {f"self_attn.{name}": shape for name, shape in attention.items()} | {
        f"mlp.{name}": shape for name, shape in mlp.items()
    }


def folder(stories: Path, target: Path, quantization: dict[str, Any] | None) -> Path:
    target.mkdir()
    for file in (stories / "hf").iterdir():
        if file.suffix != ".safetensors":
            shutil.copyfile(file, target / file.name)
    config = json.loads((target / "config.json").read_text()) | {
        "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HIDDEN // HEADS, "vocab_size": VOCAB,
    }  # fmt: skip
    if quantization:
        config["quantization_config"] = quantization
    (target / "config.json").write_text(json.dumps(config))
    return target


def write_hf(stories: Path, target: Path, kind: str) -> Path:
    """Random numbers in the shapes of each format: memory does not depend on them."""
    quantization = {
        "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": False},
        "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    }.get(kind)
    path = folder(stories, target, quantization)
    rng, state = np.random.default_rng(0), {}

    def words(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.integers(-(1 << 31), 1 << 31, shape, dtype=np.int64).astype(np.int32))

    def floats(*shape: int) -> torch.Tensor:
        return torch.from_numpy((rng.standard_normal(shape) * 0.02).astype(np.float16))

    for layer in range(LAYERS):
        for name, (out, width) in linears().items():
            prefix = f"model.layers.{layer}.{name}"
            if kind == "float":
                state[f"{prefix}.weight"] = floats(out, width)
                continue
            state[f"{prefix}.scales"] = floats(width // 128, out) * 0.1
            rows = (width // 8, out) if kind == "gptq" else (width, out // 8)
            state[f"{prefix}.qweight"] = words(*rows)
            state[f"{prefix}.qzeros"] = words(width // 128, out // 8)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[f"model.layers.{layer}.{norm}.weight"] = torch.ones(HIDDEN, dtype=torch.float16)
    state["model.embed_tokens.weight"] = floats(VOCAB, HIDDEN)
    state["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.float16)
    save_file(state, path / "model.safetensors")
    return path


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_gguf(stories: Path, path: Path, kind: str) -> Path:
    """Random blocks with small scales; tokenizer and metadata from the real stories file."""
    base = gguf.GGUFReader(stories / "stories260K-Q8_0.gguf")
    writer = gguf.GGUFWriter(path, "llama")
    for name, field in base.fields.items():
        if name.startswith("tokenizer.") and field.types:
            value = field.contents()
            if field.types[0] == gguf.GGUFValueType.ARRAY:
                writer.add_array(name, value)
            else:
                writer.add_key_value(name, value, field.types[0])
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    number = gguf.GGMLQuantizationType[kind]
    elements, nbytes = gguf.GGML_QUANT_SIZES[number]
    rng = np.random.default_rng(0)

    def matrix(name: str, shape: tuple[int, int]) -> None:
        blocks = rng.integers(0, 256, (shape[0], shape[1] // elements, nbytes), dtype=np.uint8)
        for at in (0, 2) if kind == "Q4_K" else (0,):
            blocks[..., at : at + 2] = np.full(blocks.shape[:2], 1e-4, np.float16)[..., None].view(np.uint8)
        writer.add_tensor(name, blocks.reshape(shape[0], -1), raw_dtype=number)

    matrix("token_embd.weight", (VOCAB, HIDDEN))
    for layer in range(LAYERS):
        for name, shape in linears().items():
            matrix(f"blk.{layer}.{GGUF_NAMES[name]}.weight", shape)
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(HIDDEN, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_all_forms_at_once_stay_near_their_files(stories: Path, tmp_path: Path) -> None:
    paths = [write_hf(stories, tmp_path / kind, kind) for kind in ("float", "gptq", "awq")]
    paths += [write_gguf(stories, tmp_path / f"model-{kind}.gguf", kind) for kind in ("Q4_0", "Q8_0", "Q4_K")]
    command = [sys.executable, "-m", "tests.load.resident", str(stories / "hf"), *map(str, paths)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    for run in range(2):  # the first run makes the packs, the second maps them, as every later start does
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        if run == 0:
            continue
        for found, path in zip(json.loads(done.stdout), paths, strict=True):
            file = (path / "model.safetensors" if path.is_dir() else path).stat().st_size
            assert found["weights"] <= file * (1 + SPARE), found
            # The values of a step are in the formula, too: a few MiB that do not grow with the model's depth.
            assert found["added"] <= file * (1 + SPARE) + found["kv"] + found["step"], (file, found)
