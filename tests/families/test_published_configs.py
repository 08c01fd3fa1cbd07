"""Checkpoints as their publishers left them: keys that no forward pass reads, old names, and bodies without a head."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from inhouse.core.errors import UnsupportedError
from inhouse.model.families.table import resolve
from tests.families.parity import EXECUTORS, TOLERANCE, TransformersOracle, check_parity, open_tiny, record, worst
from tests.families.parity import transformers_oracle as oracle_of
from tests.families.seq2seq import BART, Pair, logits_of, save_tiny
from tests.families.shapes import GPT, SHAPE
from tests.families.test_seq2seq_families import SOURCES, TARGETS, decode, encode

pytestmark = pytest.mark.torch
BERT = {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"}

# Case -> (config, keys that are published with it and change nothing, the same keys with a value that would).
KEYS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "LlamaForCausalLM": (  # SmolLM2
        SHAPE,
        {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"kv_cache_dtype": {}}},
        {"rope_interleaved": True},
    ),
    "LLaMAForCausalLM": (SHAPE, {"max_sequence_length": 2048}, {}),
    "GPTJForCausalLM": (
        GPT | {"rotary_dim": 4},
        {"rotary": True, "scale_attn_weights": True, "n_inner": None, "summary_type": "cls_index"},
        {"rotary": False},
    ),
    "Starcoder2ForCausalLM": (
        SHAPE,
        {"activation_function": "gelu", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
         "attention_softmax_in_fp32": True, "scale_attention_softmax_in_fp32": True},
        {"scale_attn_weights": False},
    ),
    "GPT2LMHeadModel": (GPT, {"n_special": 0, "predict_special_tokens": True}, {}),
    "GPTBigCodeForCausalLM": (GPT, {"inference_runner": 0, "pad_key_length": True, "validate_runner_input": True}, {}),
    "GPTNeoXForCausalLM": (BERT, {"attention_probs_dropout_prob": 0, "hidden_dropout_prob": 0}, {}),
    "CohereForCausalLM": (SHAPE, {"use_parallel_embedding": False}, {"use_parallel_embedding": True}),
    "StableLMEpochForCausalLM": (SHAPE, {"num_heads": 6, "rotary_scaling_factor": 1.0}, {"rotary_scaling_factor": 2.0}),
    "BertForTokenClassification": (BERT | {"id2label": {"0": "O", "1": "B"}}, {"_num_labels": 2}, {}),
    "ModernBertForMaskedLM": (BERT | {"norm_eps": 1e-5}, {"layer_norm_eps": 1e-5}, {}),
    "MBartForConditionalGeneration": (
        BART, {"normalize_before": True, "add_final_layer_norm": True, "normalize_embedding": True}, {},
    ),
    "BartForConditionalGeneration": (
        BART, {"normalize_before": False, "do_blenderbot_90_layernorm": False, "replacing_rate": 0},
        {"normalize_before": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KEYS)
def test_published_keys_change_nothing(name: str) -> None:
    config, inert, harmful = KEYS[name]
    config = config | {"architectures": [name]}
    if "rms_norm_eps" not in config and name.startswith(("Llama", "LLaMA")):
        config["rms_norm_eps"] = 1e-6
    assert resolve(config | inert)[0] == resolve(config)[0]
    for key in harmful:
        with pytest.raises(UnsupportedError, match=key):
            resolve(config | {key: harmful[key]})


def test_stablelm_by_the_keys_of_its_own_code() -> None:
    config = SHAPE | {"architectures": ["StableLMEpochForCausalLM"]}
    ours = resolve(config | {"norm_eps": 1e-3, "rope_pct": 0.5})[0]
    assert ours == resolve(config | {"layer_norm_eps": 1e-3, "partial_rotary_factor": 0.5})[0] != resolve(config)[0]


def test_yi_by_its_first_names(tmp_path: Path) -> None:
    """Yi's own code called its norms ln1 and ln2."""
    made = oracle_of("LlamaForCausalLM", "LlamaConfig", SHAPE)

    class Yi:
        logits = made.logits

        def save(self, folder: Path) -> None:
            TransformersOracle(made.model, "YiForCausalLM").save(folder)
            file = folder / "model.safetensors"
            named = {
                name.replace("input_layernorm", "ln1").replace("post_attention_layernorm", "ln2"): tensor
                for name, tensor in load_file(file).items()
            }
            save_file(named, file)

    check_parity(Yi(), tmp_path, "llama", case="yi")


def test_gpt2_saved_without_its_head(tmp_path: Path) -> None:
    made = oracle_of("GPT2LMHeadModel", "GPT2Config", GPT)

    class Body:
        logits = made.logits

        def save(self, folder: Path) -> None:
            made.model.transformer.save_pretrained(folder)

    check_parity(Body(), tmp_path, "gpt2", case="body")


@pytest.mark.parametrize("name", ["bart", "mbart", "m2m100"])
def test_encoder_decoders_saved_without_their_head(name: str, tmp_path: Path) -> None:
    """BART's base models are published so: the head is the embedding, its bias nothing."""
    pair = save_tiny(name, tmp_path / "whole")
    with torch.no_grad():
        if hasattr(pair.original, "final_logits_bias"):
            pair.original.final_logits_bias.zero_()
    pair.original.model.save_pretrained(tmp_path / "body")
    kind = getattr(transformers, type(pair.original).__name__)
    again = Pair(kind.from_pretrained(tmp_path / "body", attn_implementation="eager").eval(), tmp_path)
    tiny = open_tiny(tmp_path / "body")
    target = [2, *TARGETS[0]]
    wanted = logits_of(again, SOURCES[0], target)
    for executor_name in EXECUTORS:
        executor = tiny.executor(executor_name)
        encode(executor, SOURCES[:1] * 2)
        error = worst(decode(executor, [(target, 0)], [len(SOURCES[0])]), wanted)
        executor.close()
        assert error < TOLERANCE
        record(tiny.family, "body", tiny.format, executor_name, error)
