"""Families whose checkpoints came with code of their own: slow references written from their papers and model cards
(arXiv 2309.16609 Qwen, 2309.10305 Baichuan 2, 2403.17297 InternLM2, 2404.06395 MiniCPM, 2406.12793 ChatGLM)."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from inhouse.engine.request import SamplingParams, make_request
from tests.engine.driving import make_engine, run_all
from tests.families.parity import OTHER, SlowOracle, check_parity, greedy, open_tiny, random_state
from tests.families.slow import attend, gelu_tanh, halves, layer_norm, pairs, rms, silu

pytestmark = pytest.mark.torch
V, H, HEADS, D, F, LAYERS = 97, 48, 6, 8, 80, 2
State = Mapping[str, Tensor]
SIZES: dict[str, Any] = {
    "hidden_size": H, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "intermediate_size": F,
    "vocab_size": V, "max_position_embeddings": 64, "torch_dtype": "float32",
}  # fmt: skip


def layered(prefix: str, layer: dict[str, tuple[int, ...]], outer: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Random tensors of LAYERS layers under `prefix` (with {i}), and outside of them."""
    shapes = dict(outer)
    for i in range(LAYERS):
        shapes |= {prefix.format(i=i) + name: shape for name, shape in layer.items()}
    return random_state(shapes)


def swiglu(h: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The gated MLP."""
    return (silu(h @ gate.T) * (h @ up.T)) @ down.T


def test_qwen(tmp_path: Path) -> None:
    config = SIZES | {
        "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "kv_channels": D, "layer_norm_epsilon": 1e-6,
        "rotary_emb_base": 10000, "rotary_pct": 1.0, "seq_length": 64, "scale_attn_weights": True, "no_bias": True,
        "use_dynamic_ntk": True, "use_logn_attn": True, "use_flash_attn": "auto", "emb_dropout_prob": 0.0,
        "attn_dropout_prob": 0.0, "bf16": False, "fp16": False, "fp32": False, "onnx_safe": None,
        "use_cache_quantization": False, "use_cache_kernel": False, "softmax_in_fp32": False,
        "tie_word_embeddings": False, "intermediate_size": 2 * F,
    }  # fmt: skip
    state = layered(
        "transformer.h.{i}.",
        {"ln_1.weight": (H,), "attn.c_attn.weight": (3 * H, H), "attn.c_attn.bias": (3 * H,),
         "attn.c_proj.weight": (H, H), "ln_2.weight": (H,), "mlp.w1.weight": (F, H), "mlp.w2.weight": (F, H),
         "mlp.c_proj.weight": (H, F)},
        {"transformer.wte.weight": (V, H), "transformer.ln_f.weight": (H,), "lm_head.weight": (V, H)},
    )  # fmt: skip

    def forward(s: State, tokens: Tensor) -> Tensor:
        x = s["transformer.wte.weight"][tokens]
        for i in range(LAYERS):
            at = f"transformer.h.{i}."
            h = rms(x, s[at + "ln_1.weight"], 1e-6) @ s[at + "attn.c_attn.weight"].T + s[at + "attn.c_attn.bias"]
            q, k, v = (part.reshape(-1, HEADS, D) for part in torch.split(h, H, dim=1))
            x = x + attend(q, k, v, turn=halves) @ s[at + "attn.c_proj.weight"].T
            h = rms(x, s[at + "ln_2.weight"], 1e-6)
            x = x + swiglu(h, s[at + "mlp.w2.weight"], s[at + "mlp.w1.weight"], s[at + "mlp.c_proj.weight"])
        return rms(x, s["transformer.ln_f.weight"], 1e-6) @ s["lm_head.weight"].T

    tiny = check_parity(SlowOracle(config, state, forward), tmp_path, "qwen")
    assert tiny.spec.context_length == 64


def slopes_of(heads: int) -> list[float]:
    """ALiBi (arXiv 2108.12409, section 3, and its code for other counts than powers of two)."""
    whole = 2 ** int(math.log2(heads))
    first = [2.0 ** (-8.0 * (i + 1) / whole) for i in range(whole)]
    return first + [2.0 ** (-4.0 * (2 * i + 1) / whole) for i in range(heads - whole)]


@pytest.mark.parametrize("case", ["7b", "13b", "2-7b"])
def test_baichuan(case: str, tmp_path: Path) -> None:
    rotates, second = case != "13b", case == "2-7b"
    vocab = 125696 if second else V
    config = SIZES | {
        "architectures": ["BaichuanForCausalLM"], "model_type": "baichuan", "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "model_max_length": 64, "tie_word_embeddings": False, "vocab_size": vocab, "z_loss_weight": 0,
        "gradient_checkpointing": [False], "_from_model_config": True,
    }  # fmt: skip
    if not rotates:
        del config["max_position_embeddings"]
    state = layered(
        "model.layers.{i}.",
        {"input_layernorm.weight": (H,), "self_attn.W_pack.weight": (3 * H, H), "self_attn.o_proj.weight": (H, H),
         "post_attention_layernorm.weight": (H,), "mlp.gate_proj.weight": (F, H), "mlp.up_proj.weight": (F, H),
         "mlp.down_proj.weight": (H, F)},
        {"model.embed_tokens.weight": (vocab, H), "model.norm.weight": (H,), "lm_head.weight": (vocab, H)},
    )  # fmt: skip

    def forward(s: State, tokens: Tensor) -> Tensor:
        x = s["model.embed_tokens.weight"][tokens]
        for i in range(LAYERS):
            at = f"model.layers.{i}."
            h = rms(x, s[at + "input_layernorm.weight"], 1e-6) @ s[at + "self_attn.W_pack.weight"].T
            q, k, v = (part.reshape(-1, HEADS, D) for part in torch.split(h, H, dim=1))
            a = attend(q, k, v, turn=halves) if rotates else attend(q, k, v, slopes=slopes_of(HEADS))
            x = x + a @ s[at + "self_attn.o_proj.weight"].T
            h = rms(x, s[at + "post_attention_layernorm.weight"], 1e-6)
            x = x + swiglu(h, *(s[f"{at}mlp.{part}_proj.weight"] for part in ("gate", "up", "down")))
        head = s["lm_head.weight"]
        if second:
            head = head / head.norm(dim=1, keepdim=True)
        return rms(x, s["model.norm.weight"], 1e-6) @ head.T

    check_parity(SlowOracle(config, state, forward), tmp_path, "baichuan2" if second else "baichuan", case=case)


def test_internlm2(tmp_path: Path) -> None:
    kv, shared = 2, HEADS // 2
    config = SIZES | {
        "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "num_key_value_heads": kv,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "bias": False, "rope_theta": 1000000, "tie_word_embeddings": False,
        "rope_scaling": {"type": "dynamic", "factor": 2.0}, "attn_implementation": "eager", "pretraining_tp": 1,
    }  # fmt: skip
    state = layered(
        "model.layers.{i}.",
        {"attention_norm.weight": (H,), "attention.wqkv.weight": ((HEADS + 2 * kv) * D, H),
         "attention.wo.weight": (H, H), "ffn_norm.weight": (H,), "feed_forward.w1.weight": (F, H),
         "feed_forward.w3.weight": (F, H), "feed_forward.w2.weight": (H, F)},
        {"model.tok_embeddings.weight": (V, H), "model.norm.weight": (H,), "output.weight": (V, H)},
    )  # fmt: skip

    def forward(s: State, tokens: Tensor) -> Tensor:
        x = s["model.tok_embeddings.weight"][tokens]
        for i in range(LAYERS):
            at = f"model.layers.{i}."
            h = rms(x, s[at + "attention_norm.weight"], 1e-5) @ s[at + "attention.wqkv.weight"].T
            groups = h.reshape(-1, kv, shared + 2, D)  # of each key-value head: its queries, then k, then v
            q, k, v = groups[:, :, :shared].reshape(-1, HEADS, D), groups[:, :, shared], groups[:, :, shared + 1]
            x = x + attend(q, k, v, turn=lambda y, at: halves(y, at, 1e6)) @ s[at + "attention.wo.weight"].T
            h = rms(x, s[at + "ffn_norm.weight"], 1e-5)
            x = x + swiglu(h, *(s[f"{at}feed_forward.{part}.weight"] for part in ("w1", "w3", "w2")))
        return rms(x, s["model.norm.weight"], 1e-5) @ s["output.weight"].T

    check_parity(SlowOracle(config, state, forward), tmp_path, "internlm2")


def test_minicpm(tmp_path: Path) -> None:
    config = SIZES | {
        "architectures": ["MiniCPMForCausalLM"], "model_type": "minicpm", "num_key_value_heads": 6,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "scale_emb": 3, "dim_model_base": 16, "scale_depth": 1.4,
        "attention_bias": False, "rope_scaling": None,
    }  # fmt: skip
    parts = {name: (H, H) for name in ("q", "k", "v", "o")}
    state = layered(
        "model.layers.{i}.",
        {"input_layernorm.weight": (H,), **{f"self_attn.{n}_proj.weight": shape for n, shape in parts.items()},
         "post_attention_layernorm.weight": (H,), "mlp.gate_proj.weight": (F, H), "mlp.up_proj.weight": (F, H),
         "mlp.down_proj.weight": (H, F)},
        {"model.embed_tokens.weight": (V, H), "model.norm.weight": (H,)},
    )  # fmt: skip

    def forward(s: State, tokens: Tensor) -> Tensor:
        depth = 1.4 / math.sqrt(LAYERS)
        x = s["model.embed_tokens.weight"][tokens] * 3
        for i in range(LAYERS):
            at = f"model.layers.{i}."
            h = rms(x, s[at + "input_layernorm.weight"], 1e-5)
            q, k, v = ((h @ s[f"{at}self_attn.{n}_proj.weight"].T).reshape(-1, HEADS, D) for n in "qkv")
            x = x + depth * (attend(q, k, v, turn=halves) @ s[at + "self_attn.o_proj.weight"].T)
            h = rms(x, s[at + "post_attention_layernorm.weight"], 1e-5)
            x = x + depth * swiglu(h, *(s[f"{at}mlp.{part}_proj.weight"] for part in ("gate", "up", "down")))
        x = rms(x, s["model.norm.weight"], 1e-5) / (H / 16)
        return x @ s["model.embed_tokens.weight"].T

    check_parity(SlowOracle(config, state, forward), tmp_path, "minicpm")


def test_chatglm2(tmp_path: Path) -> None:
    """ChatGLM2, ChatGLM3 and GLM-4 have the same code; `rope_ratio` is the latter's."""
    kv, ratio = 2, 50.0
    wide = (HEADS + 2 * kv) * D
    config = {
        "architectures": ["ChatGLMModel"], "model_type": "chatglm", "hidden_size": H, "num_attention_heads": HEADS,
        "num_layers": LAYERS, "ffn_hidden_size": F, "kv_channels": D, "padded_vocab_size": V, "vocab_size": V,
        "seq_length": 64, "layernorm_epsilon": 1e-5, "rmsnorm": True, "add_bias_linear": False, "add_qkv_bias": True,
        "multi_query_attention": True, "multi_query_group_num": kv, "original_rope": True, "post_layer_norm": True,
        "apply_query_key_layer_scaling": True, "apply_residual_connection_post_layernorm": False,
        "attention_softmax_in_fp32": True, "fp32_residual_connection": False, "interleaved_qkv": False,
        "bias_dropout_fusion": True, "hidden_dropout": 0.0, "rope_ratio": ratio, "tie_word_embeddings": False,
        "quantization_bit": 0, "pre_seq_len": None, "prefix_projection": False, "classifier_dropout": None,
    }  # fmt: skip
    state = layered(
        "transformer.encoder.layers.{i}.",
        {"input_layernorm.weight": (H,), "self_attention.query_key_value.weight": (wide, H),
         "self_attention.query_key_value.bias": (wide,), "self_attention.dense.weight": (H, H),
         "post_attention_layernorm.weight": (H,), "mlp.dense_h_to_4h.weight": (2 * F, H),
         "mlp.dense_4h_to_h.weight": (H, F)},
        {"transformer.embedding.word_embeddings.weight": (V, H), "transformer.encoder.final_layernorm.weight": (H,),
         "transformer.output_layer.weight": (V, H), "transformer.rotary_pos_emb.inv_freq": (D // 4,)},
    )  # fmt: skip

    def turn(x: Tensor, position: int) -> Tensor:
        return torch.cat([pairs(x[: D // 2], position, 10000.0 * ratio), x[D // 2 :]])

    def forward(s: State, tokens: Tensor) -> Tensor:
        x = s["transformer.embedding.word_embeddings.weight"][tokens]
        for i in range(LAYERS):
            at = f"transformer.encoder.layers.{i}."
            h = rms(x, s[at + "input_layernorm.weight"], 1e-5)
            h = h @ s[at + "self_attention.query_key_value.weight"].T + s[at + "self_attention.query_key_value.bias"]
            q, k, v = (part.reshape(len(tokens), -1, D) for part in torch.split(h, [H, kv * D, kv * D], dim=1))
            x = x + attend(q, k, v, turn=turn) @ s[at + "self_attention.dense.weight"].T
            h = rms(x, s[at + "post_attention_layernorm.weight"], 1e-5)
            gate, up = torch.split(s[at + "mlp.dense_h_to_4h.weight"], F)
            x = x + swiglu(h, gate, up, s[at + "mlp.dense_4h_to_h.weight"])
        x = rms(x, s["transformer.encoder.final_layernorm.weight"], 1e-5)
        return x @ s["transformer.output_layer.weight"].T

    check_parity(SlowOracle(config, state, forward), tmp_path, "chatglm2")


def chatglm(prefix: int) -> SlowOracle:
    """ChatGLM-6B: `prefix` tokens see one another; the last of them is [gMASK], the next one <sop>."""
    config = {
        "architectures": ["ChatGLMModel"], "model_type": "chatglm", "hidden_size": H, "num_attention_heads": HEADS,
        "num_layers": LAYERS, "inner_hidden_size": F, "vocab_size": V, "max_sequence_length": 64,
        "layernorm_epsilon": 1e-5, "position_encoding_2d": True, "gmask_token_id": 88, "mask_token_id": 87,
        "bos_token_id": 89, "eos_token_id": 90, "pad_token_id": 3, "tie_word_embeddings": False, "quantization_bit": 0,
        "pre_seq_len": None, "prefix_projection": False,
    }  # fmt: skip
    both = {"weight": (H,), "bias": (H,)}
    state = layered(
        "transformer.layers.{i}.",
        {**{f"{norm}.{key}": shape for norm in ("input_layernorm", "post_attention_layernorm")
            for key, shape in both.items()},
         "attention.query_key_value.weight": (3 * H, H), "attention.query_key_value.bias": (3 * H,),
         "attention.dense.weight": (H, H), "attention.dense.bias": (H,), "mlp.dense_h_to_4h.weight": (F, H),
         "mlp.dense_h_to_4h.bias": (F,), "mlp.dense_4h_to_h.weight": (H, F), "mlp.dense_4h_to_h.bias": (H,),
         "attention.rotary_emb.inv_freq": (D // 4,)},
        {"transformer.word_embeddings.weight": (V, H), "transformer.final_layernorm.weight": (H,),
         "transformer.final_layernorm.bias": (H,), "lm_head.weight": (V, H)},
    )  # fmt: skip

    def turn(x: Tensor, position: int) -> Tensor:
        within, beyond = min(position, prefix - 1), max(position - prefix + 1, 0)
        return torch.cat([halves(x[: D // 2], within), halves(x[D // 2 :], beyond)])

    def forward(s: State, tokens: Tensor) -> Tensor:
        def linear(x: Tensor, name: str) -> Tensor:
            return x @ s[name + ".weight"].T + s[name + ".bias"]

        def norm(x: Tensor, name: str) -> Tensor:
            return layer_norm(x, s[name + ".weight"], s[name + ".bias"], 1e-5)

        x, alpha = s["transformer.word_embeddings.weight"][tokens], math.sqrt(2 * LAYERS)
        for i in range(LAYERS):
            at = f"transformer.layers.{i}."
            h = norm(x, at + "input_layernorm")
            fused = linear(h, at + "attention.query_key_value").reshape(-1, HEADS, 3 * D)
            q, k, v = torch.split(fused, D, dim=2)
            x = h * alpha + linear(attend(q, k, v, turn=turn, prefix=prefix), at + "attention.dense")
            h = norm(x, at + "post_attention_layernorm")
            x = h * alpha + linear(gelu_tanh(linear(h, at + "mlp.dense_h_to_4h")), at + "mlp.dense_4h_to_h")
        return norm(x, "transformer.final_layernorm") @ s["lm_head.weight"].T

    return SlowOracle(config, state, forward)


@pytest.mark.parametrize("prefix", [1, 11, 26])
def test_chatglm(prefix: int, tmp_path: Path) -> None:
    check_parity(chatglm(prefix), tmp_path, "chatglm", case=f"prefix {prefix}", prefix=prefix)


def test_the_engine_finds_the_prefix(tmp_path: Path) -> None:
    """Prompts end in [gMASK] <sop>; the engine takes what stands before <sop> as the prefix, and cuts no prompt."""
    prompts = [[*OTHER[:n], 88, 89] for n in (1, 5, 11)]
    oracles = [chatglm(len(prompt) - 1) for prompt in prompts]
    oracles[0].save(tmp_path)
    executor = open_tiny(tmp_path).executor("native")
    engine = make_engine(executor, step_tokens=64)
    params = SamplingParams(temperature=0.0, ignore_eos=True)
    requests = [make_request(str(i), prompt, params, 6) for i, prompt in enumerate(prompts)]
    results = run_all(engine, requests)
    for prompt, oracle, result in zip(prompts, oracles, results, strict=True):
        assert result.tokens[0] == greedy(oracle, prompt)[:6]
    engine.close()
    executor.close()
