"""The same tiny models as GGUF files: tensor names from the gguf package's own map, rows arranged as llama.cpp's
converter arranges them, and the result held to transformers."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.families.parity import TransformersOracle, compare, open_tiny, transformers_oracle
from tests.families.shapes import GPT, SHAPE

pytestmark = pytest.mark.torch
Array = NDArray[np.float32]
Arrange = Callable[[str, Array], Array]
Q8 = gguf.GGMLQuantizationType.Q8_0
HEADS, KV, LAYERS, HEAD_DIM = 6, 2, 3, 8
SLIDES = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}


def as_is(name: str, array: Array) -> Array:
    return array


def pairs(name: str, array: Array) -> Array:
    """q and k of Llama: rotary pairs side by side."""
    for part, heads in (("q_proj.", HEADS), ("k_proj.", KV)):
        if part in name:
            halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
            return halves.swapaxes(1, 2).reshape(array.shape)
    return array


def plus_one(name: str, array: Array) -> Array:
    """Gemma's norms."""
    return array + 1 if name.endswith("norm.weight") else array


def transposed(name: str, array: Array) -> Array:
    """GPT-2's linears."""
    return array.T if array.ndim == 2 and (".attn." in name or ".mlp." in name) else array


def by_part(name: str, array: Array) -> Array:
    """BLOOM and GPT-NeoX: [heads, 3, dim] to [3, heads, dim]."""
    if "query_key_value" not in name:
        return array
    return array.reshape(HEADS, 3, HEAD_DIM, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)


def by_part_of_16(name: str, array: Array) -> Array:
    """`by_part` for heads of 16."""
    if "query_key_value" not in name:
        return array
    return array.reshape(HEADS, 3, 16, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)


# Case -> architecture in GGUF, family, transformers' prefix, settings, arrangement, metadata.
CASES: dict[str, tuple[str, str, str, dict[str, Any], Arrange, dict[str, Any]]] = {
    "llama": ("llama", "llama", "Llama", {}, pairs, {}),
    "qwen2": ("qwen2", "qwen2", "Qwen2", {}, as_is, {}),
    "qwen3": ("qwen3", "qwen3", "Qwen3", {"head_dim": 8}, as_is, {}),
    "smollm3": ("smollm3", "smollm3", "SmolLM3", {"no_rope_layer_interval": 4}, pairs, {"rope.freq_base": 2e6}),
    "granite": ("granite", "granite", "Granite",
                {"attention_multiplier": 0.3, "embedding_multiplier": 1.7, "residual_multiplier": 0.4,
                 "logits_scaling": 3.0}, pairs,
                {"attention.scale": 0.3, "embedding_scale": 1.7, "residual_scale": 0.4, "logit_scale": 3.0}),
    "olmo2": ("olmo2", "olmo2", "Olmo2", {}, as_is, {}),
    "stablelm": ("stablelm", "stablelm", "StableLm", {"partial_rotary_factor": 0.5}, as_is,
                 {"rope.dimension_count": 4, "use_parallel_residual": False}),
    "command-r": ("command-r", "cohere", "Cohere", {}, as_is, {"logit_scale": 0.0625, "rope.freq_base": 5e5}),
    "phi3": ("phi3", "phi3", "Phi3", {}, as_is, {}),
    "gemma": ("gemma", "gemma", "Gemma", {"head_dim": 8}, plus_one, {}),
    "gemma2": ("gemma2", "gemma2", "Gemma2", SLIDES | {"head_dim": 8, "query_pre_attn_scalar": 8}, plus_one,
               {"attention.sliding_window": 7, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}),
    "gemma3": ("gemma3", "gemma3", "Gemma3",
               {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 7}, plus_one,
               {"attention.sliding_window": 7, "rope.freq_base": 1e6}),
    "glm4": ("glm4", "glm4", "Glm4", {"head_dim": 8, "attention_bias": True}, as_is, {"rope.dimension_count": 4}),
    "starcoder2": ("starcoder2", "starcoder2", "Starcoder2", {}, as_is, {}),
    "phi2": ("phi2", "phi", "Phi", {"num_key_value_heads": 6}, as_is, {"rope.dimension_count": 4}),
    "gptneox": ("gptneox", "gpt_neox", "GPTNeoX", {}, by_part,
                {"rope.dimension_count": 2, "use_parallel_residual": True}),
    "gptj": ("gptj", "gptj", "GPTJ", {"rotary_dim": 4}, as_is, {"rope.dimension_count": 4}),
    "gpt2": ("gpt2", "gpt2", "GPT2", {}, transposed, {}),
    "bloom": ("bloom", "bloom", "Bloom", {"n_layer": 3, "n_head": 6}, by_part, {}),
    "falcon": ("falcon", "falcon", "Falcon", {"num_hidden_layers": 3, "num_attention_heads": 6}, as_is, {}),
}  # fmt: skip
LAYER_NORMS = ("stablelm", "command-r", "starcoder2", "phi2", "gptneox", "gptj", "gpt2", "bloom", "falcon")


def oracle_of(prefix: str, changes: Mapping[str, Any]) -> TransformersOracle:
    """The original, its KV heads and sizes those of SHAPE."""
    settings = SHAPE | dict(changes)
    if prefix in ("GPT2", "GPTJ"):
        settings = GPT | dict(changes)
    if prefix in ("Falcon", "Bloom"):
        settings = {"vocab_size": 97, "hidden_size": 48, "pad_token_id": 0} | dict(changes)
    model = "GPT2LMHeadModel" if prefix == "GPT2" else f"{prefix}ForCausalLM"
    config = "Gemma3TextConfig" if prefix == "Gemma3" else f"{prefix}Config"
    return transformers_oracle(model, config, settings)


def write(
    path: Path,
    arch: str,
    oracle: TransformersOracle,
    arrange: Arrange,
    more: Mapping[str, Any],
    quantized: bool = False,
) -> None:
    """The model as a GGUF file, in f32 or with its matrices in Q8_0."""
    config = oracle.model.config
    wide = arch in ("gpt2", "gptj", "bloom", "falcon")
    full = arch in ("gpt2", "gptj", "bloom", "gptneox", "phi2")
    meta: dict[str, Any] = {
        "block_count": LAYERS, "context_length": 64, "embedding_length": 48,
        "feed_forward_length": 192 if wide else 80, "attention.head_count": HEADS,
        "attention.head_count_kv": 1 if arch == "falcon" else HEADS if full else KV, "vocab_size": 97,
    } | dict(more)  # fmt: skip
    eps = "attention.layer_norm_epsilon" if arch in LAYER_NORMS else "attention.layer_norm_rms_epsilon"
    names = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
    meta[eps] = float(next(getattr(config, name) for name in names if hasattr(config, name)))
    if "head_dim" in config.to_dict():
        meta = {"attention.key_length": HEAD_DIM, "attention.value_length": HEAD_DIM} | meta
    writer = gguf.GGUFWriter(path, arch)
    for key, value in meta.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(f"{arch}.{key}", value)
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    table = gguf.get_tensor_name_map(number, LAYERS)
    state = {name: tensor.detach().numpy() for name, tensor in oracle.model.state_dict().items()}
    for name, array in state.items():
        if name in ("lm_head.weight", "embed_out.weight") and config.tie_word_embeddings:
            continue
        keys = (name, name.removeprefix("transformer."))  # BLOOM's converter takes the prefix off
        found = [table.get_name(key, try_suffixes=(".weight", ".bias")) for key in keys]
        theirs = next((one for one in found if one is not None), None)
        assert theirs is not None, f"gguf has no name for {name}"
        _add(writer, theirs, np.ascontiguousarray(arrange(name, array), np.float32), quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, name: str, array: Array, quantized: bool) -> None:
    if quantized and array.ndim == 2:
        writer.add_tensor(name, gguf.quants.quantize(array, Q8), raw_dtype=Q8)
    else:
        writer.add_tensor(name, array)


@pytest.mark.parametrize("case", ["llama", "phi3", "bloom", "glm4"])
def test_quantised_rows_are_taken_and_put_in_order(case: str, tmp_path: Path) -> None:
    """Fused and permuted matrices in Q8_0: the original computes with the very numbers of the file."""
    arch, family, prefix, changes, arrange, more = CASES[case]
    wider = {"hidden_size": 96} if prefix == "Bloom" else {"hidden_size": 96, "head_dim": 16, "intermediate_size": 160}
    oracle, path = oracle_of(prefix, changes | wider), tmp_path / "tiny.gguf"
    with torch.no_grad():
        for parameter in oracle.model.parameters():
            if parameter.dim() == 2:
                codes = gguf.quants.quantize(parameter.numpy(), Q8)
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(codes, Q8)))
    sizes: dict[str, Any] = {"embedding_length": 96, "feed_forward_length": 384 if prefix == "Bloom" else 160}
    if prefix != "Bloom":
        sizes |= {"attention.key_length": 16, "attention.value_length": 16}
        sizes |= {"rope.dimension_count": 8 if case == "glm4" else 16}
    write(path, arch, oracle, by_part_of_16 if arrange is by_part else arrange, more | sizes, quantized=True)
    tiny = open_tiny(path, fmt="gguf q8_0", activations="float")
    assert tiny.family == family
    compare(tiny, oracle, case=f"{case} q8_0")


@pytest.mark.parametrize("case", CASES)
def test_gguf_agrees_with_the_original(case: str, tmp_path: Path) -> None:
    arch, family, prefix, changes, arrange, more = CASES[case]
    oracle, path = oracle_of(prefix, changes), tmp_path / "tiny.gguf"
    write(path, arch, oracle, arrange, more)
    tiny = open_tiny(path, fmt="gguf f32")
    assert tiny.family == family
    compare(tiny, oracle, case=case)
