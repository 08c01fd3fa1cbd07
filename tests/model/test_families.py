"""Configs read into specs: both dialects agree, and what cannot be honoured is named."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from inhouse.core.errors import FormatError, InhouseError, UnsupportedError
from inhouse.model.build import build, kv_bytes_per_token, parameters, weight_specs
from inhouse.model.families import decoder
from inhouse.model.families.family import HeadOrder
from inhouse.model.families.table import FAMILIES
from inhouse.model.rotary import inverse_frequencies
from tests.model.configs import LLAMA, MISTRAL, QWEN2, QWEN3, gguf, resolve, rope_of

pytestmark = pytest.mark.null


def names_of(config: dict[str, Any], table: dict[str, str]) -> list[str]:
    """Every tensor name that a checkpoint of this config has."""
    out = []
    for name in weight_specs(resolve(config)[0]):
        layer = name.split(".")[1] if name.startswith("layers.") else ""
        out.append(table[name.replace(f".{layer}.", ".{i}.", 1) if layer else name].format(i=layer))
    return out


HF = {key: str(name) for key, name in decoder.HF_NAMES.items()}
GGUF = {key: str(name) for key, name in decoder.GGUF_NAMES.items()}


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_both_dialects_give_one_spec(arch: str) -> None:
    config = {"llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3}[arch]
    extra = {"attention__key_length": 16, "rope__dimension_count": 16} if arch == "qwen3" else {}
    ours, family = resolve(config)
    theirs, same = resolve(gguf(arch, **extra), names_of(config, GGUF))
    assert theirs == ours
    assert same is family


def test_defaults_are_those_of_the_family() -> None:
    bare = {key: LLAMA[key] for key in ("architectures", "hidden_size", "intermediate_size", "num_hidden_layers",
                                        "num_attention_heads", "vocab_size")}  # fmt: skip
    llama = resolve(bare)[0]
    assert (llama.kv_heads, llama.head_dim, llama.context_length, llama.norm_eps) == (8, 8, 2048, 1e-6)
    assert (llama.tied, llama.qkv_bias, rope_of(llama).theta) == (False, False, 10000.0)
    mistral = resolve(bare | {"architectures": ["MistralForCausalLM"]})[0]
    assert set(mistral.windows) == {4096}
    qwen3 = resolve(bare | {"architectures": ["Qwen3ForCausalLM"]})[0]
    assert (qwen3.head_dim, qwen3.qk_norm, qwen3.qkv_bias) == (128, True, False)
    assert resolve(bare | {"architectures": ["Qwen2ForCausalLM"]})[0].qkv_bias


@pytest.mark.parametrize(
    ("config", "changes", "windows"),
    [
        (MISTRAL, {"sliding_window": None}, ()),
        (MISTRAL, {}, (32,) * 5),
        (QWEN2, {"use_sliding_window": True, "max_window_layers": 3, "sliding_window": 9}, (0, 0, 0, 9, 9)),
        (QWEN2, {"use_sliding_window": True, "max_window_layers": 5}, ()),
        (QWEN3, {"use_sliding_window": True, "sliding_window": 9,
                 "layer_types": ["full_attention", "sliding_attention"] * 2 + ["full_attention"]}, (0, 9, 0, 9, 0)),
        (LLAMA, {"layer_types": ["full_attention"] * 5}, ()),
    ],
)  # fmt: skip
def test_sliding_windows(config: dict[str, Any], changes: dict[str, Any], windows: tuple[int, ...]) -> None:
    assert resolve(config | changes)[0].windows == windows


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "long_factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0, "alpha": 1000}}, "alpha"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"hidden_act": "xielu"}, "xielu"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"layer_types": ["linear_attention"] * 5}, "linear_attention"),
        ({"layer_types": ["sliding_attention"] * 5}, "sliding_attention"),
        ({"sliding_window": 128}, "sliding_window"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"_attn_scale": 0.5}, "_attn_scale"),
        ({"unsloth_scale": 2.0}, "unsloth_scale"),
        ({"rope_scaling": {"rope_type": "default", "type": "linear", "factor": 2.0}}, "type"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"architectures": ["NobodysLMHeadModel"]}, "NobodysLMHeadModel"),
    ],
)
def test_what_is_not_honoured_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedError, match=named):
        resolve(LLAMA | changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"expert_count": 8, "expert_used_count": 2, "expert_gating_func": 9}, "expert_gating_func"),
        ({"rope__scaling__type": "longrope"}, "longrope"),
        ({"attention__head_count_kv": np.array([4, 4, 2, 4, 4], np.int32)}, "head_count_kv"),
        ({"attention__value_length": 4}, "value_length"),
        ({"rope__dimension_count": 4}, "dimension_count"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"something__new": 1}, "something.new"),
    ],
)
def test_what_gguf_says_and_is_not_honoured_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedError, match=named):
        resolve(gguf("llama", **changes), names_of(LLAMA, GGUF))


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "64"}, {"hidden_size": 64.5}, {"hidden_size": 10**30}, {"num_hidden_layers": -1},
        {"num_hidden_layers": 10**9}, {"num_key_value_heads": 3}, {"rms_norm_eps": float("nan")}, {"rms_norm_eps": 0},
        {"rope_theta": 1e300}, {"vocab_size": None}, {"head_dim": 7}, {"tie_word_embeddings": 1},
        {"rope_scaling": "yarn"}, {"rope_scaling": {"rope_type": "yarn", "factor": -1.0}}, {"architectures": []},
        {"rope_scaling": {"rope_type": "linear", "factor": 0.0}}, {"rms_norm_eps": 9e18},
    ],
)  # fmt: skip
def test_numbers_that_do_not_hold_together(changes: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        resolve(LLAMA | changes)


@pytest.mark.parametrize("inputs", [2000, pytest.param(100_000, marks=pytest.mark.soak)])
def test_no_config_crashes(inputs: int) -> None:
    """Random values under every known key: an InhouseError or a spec that builds, nothing else."""
    rng = random.Random(inputs)
    values: list[Any] = [None, True, False, 0, -1, 1, 2, 7, 1 << 40, 10**400, 0.5, -2.5, 1e300, float("inf"),
                         float("nan"), "", "yarn", "llama3", [], [1], {}, {"rope_type": "yarn"},
                         {"rope_type": "dynamic", "factor": 9e18}, ["full_attention"] * 5]  # fmt: skip
    configs, read = [LLAMA, QWEN2, QWEN3, MISTRAL, gguf("llama"), gguf("qwen3")], 0
    for i in range(inputs):
        config = dict(rng.choice(configs))
        keys = [*sorted(config), "rope_scaling", "head_dim", "layer_types", "attention_bias", "sliding_window"]
        for key in rng.sample(keys, rng.randint(1, 2)):
            config[key] = rng.choice(values)
        try:
            spec = resolve(config)[0]
            assert np.isfinite(inverse_frequencies(rope_of(spec), spec.context_length)).all()
            read += 1
            if i % 50 == 0:
                build(spec)
        except InhouseError:
            pass
    assert read > inputs // 10


YARN = {"rope_type": "yarn", "factor": 4.0}
LINEAR = {"type": "linear", "factor": 2}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": YARN},
            "rope_parameters and rope_scaling.*factor",
        ),
        ({"rope_parameters": YARN, "rope_scaling": YARN | {"factor": 2.0}}, "rope_parameters and rope_scaling.*factor"),
        ({"rope_parameters": LINEAR, "rope_scaling": LINEAR | {"rope_theta": 5e5}}, "differ in rope_theta"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta = 10000, and rope_theta = 5000"),
        ({"rope_theta": 0}, "rope_theta = 0"),
        ({"rope_theta": -1.0}, "rope_theta = -1"),
        ({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 0.0}}, "rope_theta = 0"),
        ({"layer_types": ["full_attention"] * 4}, "4 layer_types for 5"),
        ({"layer_types": []}, "0 layer_types for 5"),
    ],
)
def test_contradictions_are_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(FormatError, match=named):
        resolve(LLAMA | changes)


@pytest.mark.parametrize("config", [MISTRAL, QWEN2, QWEN3])
def test_a_negative_window_is_refused_also_where_nothing_slides(config: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match="sliding_window = -3"):
        resolve(config | {"sliding_window": -3})


def test_rope_keys_that_agree_are_fine() -> None:
    newer = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    both = resolve(LLAMA | {"rope_parameters": newer, "rope_scaling": LINEAR | {"rope_type": None}})[0]
    assert both == resolve(LLAMA | {"rope_scaling": LINEAR})[0]
    assert (rope_of(both).scaling, rope_of(both).factor) == ("linear", 2.0)
    five = {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert rope_of(resolve(LLAMA | five)[0]).theta == 5e5


def test_gguf_type_none_does_not_scale() -> None:
    names = names_of(LLAMA, GGUF)
    plain = resolve(gguf("llama"), names)[0]
    assert resolve(gguf("llama", rope__scaling__type="none", rope__scaling__factor=4.0), names)[0] == plain
    absent = resolve(gguf("llama", rope__scaling__factor=4.0), names)[0]
    assert (rope_of(absent).scaling, rope_of(absent).factor) == ("linear", 4.0)
    assert absent == resolve(gguf("llama", rope__scaling__type="linear", rope__scaling__factor=4.0), names)[0]


def test_tied_by_config_but_with_a_head_of_its_own() -> None:
    assert resolve(LLAMA)[0].tied
    assert not resolve(LLAMA, ["lm_head.weight"])[0].tied


def test_llama3_factors_come_from_the_tensor() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64}  # fmt: skip
    ours = build(resolve(LLAMA | {"rope_scaling": scaling})[0]).constants["const.inv_freq"]
    plain = build(resolve(LLAMA)[0]).constants["const.inv_freq"]
    names = [*names_of(LLAMA, GGUF), "rope_freqs.weight"]
    spec, family = resolve(gguf("llama"), names, (plain / ours).tolist())
    assert rope_of(spec).scaling == "factors"
    np.testing.assert_allclose(build(spec).constants["const.inv_freq"], ours, rtol=1e-6)
    assert "rope_freqs.weight" not in {d.source for d in family.derive(spec, names).values()}
    with pytest.raises(FormatError, match="0 rope factors for 4"):  # the tensor is there and was not read
        resolve(gguf("llama"), names)


@pytest.mark.parametrize(("table", "config"), [(HF, QWEN3), (GGUF, gguf("qwen3")), (HF, LLAMA), (GGUF, gguf("llama"))])
def test_derive_finds_every_weight_once(table: dict[str, str], config: dict[str, Any]) -> None:
    names = names_of(config, table)
    spec, family = resolve(config, names)
    found = family.derive(spec, names)
    assert list(found) == list(weight_specs(spec))
    assert sorted(d.source for d in found.values()) == sorted(names)
    assert all(found[name].shape == weight.shape for name, weight in weight_specs(spec).items())
    with pytest.raises(FormatError, match=r"lacks 1 tensor: .*3"):
        family.derive(spec, [n for n in names if n != found["layers.3.attn.k.weight"].source])
    with pytest.raises(FormatError, match=r"beyond what .* uses, 1 tensor: stray\.weight"):
        family.derive(spec, [*names, "stray.weight"])
    with pytest.raises(FormatError, match="2 tensors: a, b"):
        family.derive(spec, [*names, "b", "a"])


def test_old_llama_checkpoints_may_bring_their_frequencies() -> None:
    names = names_of(LLAMA, HF)
    spec, family = resolve(LLAMA, names)
    assert family.derive(spec, [*names, "model.layers.0.self_attn.rotary_emb.inv_freq"])
    with pytest.raises(FormatError):
        family.derive(spec, [*names, "model.layers.0.self_attn.rotary_emb.other"])


def test_gguf_llama_rows_are_put_in_half_order() -> None:
    names = names_of(LLAMA, GGUF)
    spec, family = resolve(gguf("llama"), names)
    found = family.derive(spec, names)
    assert found["layers.0.attn.q.weight"].order == HeadOrder(8, 8)
    assert found["layers.0.attn.k.weight"].order == HeadOrder(4, 8)
    assert found["layers.0.attn.v.weight"].order is None
    assert HeadOrder(2, 6).index().tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    qwen, row = resolve(gguf("qwen2"), names_of(QWEN2, GGUF))
    assert row.derive(qwen, names_of(QWEN2, GGUF))["layers.0.attn.q.weight"].order is None


def test_every_architecture_name_belongs_to_one_family() -> None:
    shared = {"BaichuanForCausalLM", "ChatGLMModel", "ChatGLMForConditionalGeneration"}  # told apart by their configs
    every = [name for family in FAMILIES for name in family.architectures if name not in shared]
    assert len(every) == len(set(every))
    gguf = [(name, family.mixture) for family in FAMILIES for name in family.gguf]  # llama: Mixtral with experts
    assert len(gguf) == len(set(gguf))


def test_context_length_follows_the_stretch() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    assert resolve(LLAMA | {"rope_scaling": yarn})[0].context_length == 1024
    linear = {"type": "linear", "factor": 8.0}
    assert resolve(LLAMA | {"rope_scaling": linear})[0].context_length == 4096
    assert resolve(LLAMA | {"rope_scaling": linear | {"factor": 1.0}})[0].context_length == 512


def test_parameters_are_the_sum_of_the_shapes() -> None:
    for config in (
        LLAMA,
        LLAMA | {"attention_bias": True, "mlp_bias": True},
        QWEN2,
        QWEN3 | {"tie_word_embeddings": False},
    ):
        spec = resolve(config)[0]
        assert parameters(spec) == sum(int(np.prod(w.shape)) for w in weight_specs(spec).values())
        programs = build(replace(spec, windows=(0, 4, 4, 0, 8)))
        assert kv_bytes_per_token(programs, 2) == 2 * 2 * spec.layers * spec.kv_width
