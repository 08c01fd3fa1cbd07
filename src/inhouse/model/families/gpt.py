"""GPT-2 and its kin with layer norms and plain MLPs: GPT-2, GPT-BigCode (StarCoder 1), GPT-J, GPT-NeoX (Pythia), OPT,
StarCoder 2, Phi-1/2."""

from typing import Any

from inhouse.model.families import decoder
from inhouse.model.families.decoder import Keys
from inhouse.model.families.family import Family, Tensors
from inhouse.model.families.fields import Fields
from inhouse.model.families.names import GGUF_QKV, gguf_names, names, part, qkv
from inhouse.model.spec import LIMITS, ModelSpec

LAYER_NORM: dict[str, Any] = {"norm": "layer", "norm_bias": True, "gated": False}
BIASES: dict[str, Any] = {"qkv_bias": True, "o_bias": True, "mlp_bias": True}
GPT_KEYS = Keys("n_embd", "n_layer", "n_head", "", "n_inner", "vocab_size", "n_positions", "layer_norm_epsilon",
                "activation_function")  # fmt: skip
INERT = ("summary_*", "reorder_and_upcast_attn", "n_ctx", "attention_softmax_in_fp32",
         "scale_attention_softmax_in_fp32", "gradient_checkpointing", "bos_token", "eos_token", "n_special",
         "predict_special_tokens")  # fmt: skip


def _gpt2(fields: Fields, tensors: Tensors, family: str = "gpt2", **switches: Any) -> ModelSpec:
    """Radford et al. 2019, Language Models are Unsupervised Multitask Learners."""
    fields.expect_all({"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False})
    rows = fields.integer("n_positions", 1024)
    return decoder.from_hf(
        fields, tensors, family, GPT_KEYS, ffn=4 * fields.integer("n_embd"), context=1024, eps=1e-5,
        activation="gelu_new", tied=True, rope=None, inert=INERT, learned_positions=rows,
        **LAYER_NORM, **BIASES, **switches,
    )  # fmt: skip


# What StarCoder's own server was told.
_BIGCODE_SERVERS = ("inference_runner", "pad_key_length", "pre_allocate_kv_cache", "validate_runner_input")


def _bigcode(fields: Fields, tensors: Tensors) -> ModelSpec:
    """arXiv 2305.06161: one key-value head."""
    one = fields.flag("multi_query", True)
    for unread in (*_BIGCODE_SERVERS, "num_key_value_heads"):
        fields.raw(unread)
    return _gpt2(fields, tensors, "gpt_bigcode", kv_heads=1 if one else fields.integer("n_head"))


def _gptj(fields: Fields, tensors: Tensors) -> ModelSpec:
    """github.com/kingoflolz/mesh-transformer-jax: attention and MLP side by side, rotary pairs interleaved."""
    fields.expect_all({"rotary": True, "scale_attn_weights": True})
    heads, hidden = fields.integer("n_head"), fields.integer("n_embd")
    head_dim = hidden // max(heads, 1)
    rotated = fields.integer("rotary_dim", 64)
    return decoder.from_hf(
        fields, tensors, "gptj", GPT_KEYS, ffn=4 * hidden, eps=1e-5, activation="gelu_new", inert=INERT,
        rope={"partial": rotated / max(head_dim, 1), "interleaved": True}, parallel_norms=1, mlp_bias=True,
        head_bias=True, **LAYER_NORM,
    )  # fmt: skip


def _neox(fields: Fields, tensors: Tensors) -> ModelSpec:
    """arXiv 2204.06745, 2304.01373."""
    bias = fields.flag("attention_bias", True)
    parallel = 2 if fields.flag("use_parallel_residual", True) else 0
    rope: dict[str, Any] = {"partial": 0.25, "partial_key": "rotary_pct", "theta_key": "rotary_emb_base"}
    if fields.has("rope_parameters"):
        rope = {"partial": 0.25}
    return decoder.from_hf(
        fields, tensors, "gpt_neox", Keys(kv_heads="", eps="layer_norm_eps"), eps=1e-5, activation="gelu",
        head="embed_out.weight", rope=rope, parallel_norms=parallel, qkv_bias=bias, o_bias=bias, mlp_bias=True,
        inert=("num_key_value_heads", "rotary_pct", "rotary_emb_base", *INERT), **LAYER_NORM,
    )  # fmt: skip


def _neox_gguf(fields: Fields, tensors: Tensors) -> ModelSpec:
    parallel = 2 if fields.flag("use_parallel_residual", True) else 0
    return decoder.from_gguf(fields, tensors, "gpt_neox", activation="gelu", parallel_norms=parallel, **LAYER_NORM)


def _opt(fields: Fields, tensors: Tensors) -> ModelSpec:
    """arXiv 2205.01068; the 350M model, which normalises after its parts, is refused."""
    fields.expect_all({
        "do_layer_norm_before": True, "_remove_final_layer_norm": False, "layer_norm_elementwise_affine": True,
        "word_embed_proj_dim": fields.integer("hidden_size"),
    })  # fmt: skip
    bias, rows = fields.flag("enable_bias", True), fields.integer("max_position_embeddings", 2048)
    return decoder.from_hf(
        fields, tensors, "opt", Keys(kv_heads="", ffn="ffn_dim", eps="layer_norm_eps",
                                     activation="activation_function"),
        eps=1e-5, activation="relu", tied=True, rope=None, learned_positions=rows + 2, position_offset=2,
        qkv_bias=bias, o_bias=bias, mlp_bias=bias, inert=("init_std", "layerdrop", "dropout"), **LAYER_NORM,
    )  # fmt: skip


def _starcoder2(fields: Fields, tensors: Tensors) -> ModelSpec:
    """arXiv 2402.19173."""
    bias, window = fields.flag("use_bias", True), fields.integer("sliding_window", 0)
    layers = fields.integer("num_hidden_layers")
    windows = decoder.hf_windows(fields, window, (True,) * min(layers, LIMITS["layers"]))
    fields.expect_all({"mlp_type": "default", "norm_type": "layer_norm", "scale_attn_weights": True})
    return decoder.from_hf(
        fields, tensors, "starcoder2", Keys(eps="norm_epsilon"), eps=1e-5, activation="gelu_pytorch_tanh", tied=True,
        context=4096, windows=windows, qkv_bias=bias, o_bias=bias, mlp_bias=bias,
        inert=(*INERT, "activation_function", "layer_norm_epsilon"), **LAYER_NORM,
    )  # fmt: skip


def _phi(fields: Fields, tensors: Tensors) -> ModelSpec:
    """arXiv 2309.05463."""
    fields.expect("qk_layernorm", (False,))
    return decoder.from_hf(
        fields, tensors, "phi", Keys(eps="layer_norm_eps"), eps=1e-5, activation="gelu_new", rope={"partial": 0.5},
        parallel_norms=1, head_bias=True, **LAYER_NORM, **BIASES,
    )  # fmt: skip


def _gguf(family: str, activation: str, **switches: Any) -> Any:
    """A reader of GGUF metadata for a family of layer norms and plain MLPs."""

    def read(fields: Fields, tensors: Tensors) -> ModelSpec:
        return decoder.from_gguf(fields, tensors, family, activation=activation, **LAYER_NORM, **switches)

    return read


def _gguf_gpt2(family: str) -> Any:
    def read(fields: Fields, tensors: Tensors) -> ModelSpec:
        rows = fields.integer("context_length")
        return decoder.from_gguf(
            fields, tensors, family, activation="gelu_tanh", rope=None, learned_positions=rows, **LAYER_NORM
        )

    return read


_GPT_OUTER = {"embed": "transformer.wte", "positions": "transformer.wpe", "final_norm": "transformer.ln_f",
              "head": "lm_head"}  # fmt: skip
_MODEL_OUTER = {"embed": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
_GPT2_PARTS = {"attn_norm": "ln_1", "mlp_norm": "ln_2"}
_GGUF_NAMES = gguf_names(**GGUF_QKV)

ROWS = (
    Family(
        name="gpt2", architectures=("GPT2LMHeadModel", "GPT2Model"), gguf=("gpt2",), from_hf=_gpt2,
        from_gguf=_gguf_gpt2("gpt2"),
        hf_names=names("transformer.h.{i}.", {
            **_GPT2_PARTS, **qkv("attn.c_attn", transpose=True), "attn.o": part("attn.c_proj"),
            "mlp.up": part("mlp.c_fc"), "mlp.down": part("mlp.c_proj"),
        }, _GPT_OUTER),
        gguf_names=_GGUF_NAMES, prefix="transformer.",
        ignored=("*h.*.attn.bias", "*h.*.attn.masked_bias", "lm_head.weight"),
    ),
    Family(
        name="gpt_bigcode", architectures=("GPTBigCodeForCausalLM",), gguf=("starcoder",), from_hf=_bigcode,
        from_gguf=_gguf_gpt2("gpt_bigcode"),
        hf_names=names("transformer.h.{i}.", {
            **_GPT2_PARTS, **qkv("attn.c_attn", groups="kv_heads"), "attn.o": "attn.c_proj", "mlp.up": "mlp.c_fc",
            "mlp.down": "mlp.c_proj",
        }, _GPT_OUTER),
        gguf_names=_GGUF_NAMES, prefix="transformer.",
        ignored=("*h.*.attn.bias", "*h.*.attn.masked_bias", "lm_head.weight"),
    ),
    Family(
        name="gptj", architectures=("GPTJForCausalLM",), gguf=("gptj",), from_hf=_gptj,
        from_gguf=_gguf("gptj", "gelu_tanh", parallel_norms=1, rope={"interleaved": True}),
        hf_names=names("transformer.h.{i}.", {
            "attn_norm": "ln_1", "attn.q": "attn.q_proj", "attn.k": "attn.k_proj", "attn.v": "attn.v_proj",
            "attn.o": "attn.out_proj", "mlp.up": "mlp.fc_in", "mlp.down": "mlp.fc_out",
        }, _GPT_OUTER),
        gguf_names=gguf_names(), ignored=("*.attn.bias", "*.attn.masked_bias"),
    ),
    Family(
        name="gpt_neox", architectures=("GPTNeoXForCausalLM",), gguf=("gptneox",), from_hf=_neox, from_gguf=_neox_gguf,
        hf_names=names("gpt_neox.layers.{i}.", {
            "attn_norm": "input_layernorm", **qkv("attention.query_key_value", groups="kv_heads"),
            "attn.o": "attention.dense", "mlp_norm": "post_attention_layernorm", "mlp.up": "mlp.dense_h_to_4h",
            "mlp.down": "mlp.dense_4h_to_h",
        }, {"embed": "gpt_neox.embed_in", "final_norm": "gpt_neox.final_layer_norm", "head": "embed_out"}),
        gguf_names=_GGUF_NAMES, ignored=("*.attention.bias", "*.attention.masked_bias", "*.rotary_emb.inv_freq"),
    ),
    Family(
        name="opt", architectures=("OPTForCausalLM",), gguf=(), from_hf=_opt, from_gguf=_gguf("opt", "relu"),
        hf_names=names("model.decoder.layers.{i}.", {
            "attn_norm": "self_attn_layer_norm", "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj",
            "attn.v": "self_attn.v_proj", "attn.o": "self_attn.out_proj", "mlp_norm": "final_layer_norm",
            "mlp.up": "fc1", "mlp.down": "fc2",
        }, {"embed": "model.decoder.embed_tokens", "positions": "model.decoder.embed_positions",
            "final_norm": "model.decoder.final_layer_norm", "head": "lm_head"}),
        gguf_names=gguf_names(), prefix="model.", ignored=("lm_head.weight",),
    ),
    Family(
        name="starcoder2", architectures=("Starcoder2ForCausalLM",), gguf=("starcoder2",), from_hf=_starcoder2,
        from_gguf=_gguf("starcoder2", "gelu_tanh"),
        hf_names=names("model.layers.{i}.", {
            "attn_norm": "input_layernorm", "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj",
            "attn.v": "self_attn.v_proj", "attn.o": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm",
            "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj",
        }, _MODEL_OUTER),
        gguf_names=gguf_names(),
    ),
    Family(
        name="phi", architectures=("PhiForCausalLM",), gguf=("phi2",), from_hf=_phi,
        from_gguf=_gguf("phi", "gelu_tanh", parallel_norms=1),
        hf_names=names("model.layers.{i}.", {
            "attn_norm": "input_layernorm", "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj",
            "attn.v": "self_attn.v_proj", "attn.o": "self_attn.dense", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2",
        }, {**_MODEL_OUTER, "final_norm": "model.final_layernorm"}),
        gguf_names=_GGUF_NAMES,
    ),
)  # fmt: skip
