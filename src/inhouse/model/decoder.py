"""A decoder's spec to its weights and Programs: the one place that writes its forward pass. Knows neither families nor
files nor devices.

Canonical weights are unfused, [out, in], in the order that `weight_specs` gives; a switch of the spec adds or takes:
`embed.weight`, `positions.weight`, `embed_norm`, of each layer `attn_norm`, `attn.{q,k,v,o}.weight`, `attn.{q,k}_norm`,
`attn.sinks`, `attn_post_norm`, `mlp_norm`, `mlp.{gate,up,down}.weight`, `mlp_post_norm`, then `final_norm` and
`head.weight` (absent when tied: the head then names `embed.weight`). Biases are called `.bias`, those of norms
`{norm}_bias`.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from inhouse.model.mla import mla_block, mla_group, mla_weights
from inhouse.model.moe import moe_block, moe_weights
from inhouse.model.pooling import pooled
from inhouse.model.rotary import alibi_slopes, inverse_frequencies
from inhouse.model.spec import ModelSpec, RopeSpec
from inhouse.runtime.ops import Builder
from inhouse.runtime.program import Axis, Program, ProgramSet, StateGroup, StateKind, Value, WeightSpec

INV_FREQ = "const.inv_freq"
ALIBI = "const.alibi"


def weight_specs(spec: ModelSpec) -> dict[str, WeightSpec]:
    """Every canonical weight of the model, in the order of the forward pass."""
    return {weight.name: weight for weight in _weights(spec)}


def _weights(spec: ModelSpec) -> Iterator[WeightSpec]:
    yield WeightSpec("embed.weight", (spec.vocab_size, spec.hidden), "embedding")
    if spec.learned_positions:
        yield WeightSpec("positions.weight", (spec.learned_positions, spec.hidden), "embedding")
    if spec.embed_norm:
        yield from _norm_weights(spec, "embed_norm")
    for i in range(spec.layers):
        yield from _layer_weights(spec, i)
    yield from _norm_weights(spec, "final_norm")
    if not spec.tied:
        yield WeightSpec("head.weight", (spec.vocab_size, spec.hidden), "linear")
    if spec.head_bias:
        yield WeightSpec("head.bias", (spec.vocab_size,), "vector")


def _layer_weights(spec: ModelSpec, i: int) -> Iterator[WeightSpec]:
    layer = f"layers.{i}"
    if spec.pre_norm:
        yield from _norm_weights(spec, f"{layer}.attn_norm")
    if spec.mla:
        yield from mla_weights(spec.mla, i, spec.hidden, spec.heads)
    else:
        yield from _attention_weights(spec, f"{layer}.attn")
    if spec.post_norm:
        yield from _norm_weights(spec, f"{layer}.attn_post_norm")
    if spec.pre_norm and spec.parallel_norms != 1:
        yield from _norm_weights(spec, f"{layer}.mlp_norm")
    if spec.moe and i in spec.moe.layers:
        yield from moe_weights(spec.moe, i, spec.hidden)
    else:
        if spec.gated:
            yield from _linear_weights(f"{layer}.mlp.gate", spec.ffn, spec.hidden, spec.mlp_bias)
        yield from _linear_weights(f"{layer}.mlp.up", spec.ffn, spec.hidden, spec.mlp_bias)
        yield from _linear_weights(f"{layer}.mlp.down", spec.hidden, spec.ffn, spec.mlp_bias)
    if spec.post_norm:
        yield from _norm_weights(spec, f"{layer}.mlp_post_norm")


def _attention_weights(spec: ModelSpec, attn: str) -> Iterator[WeightSpec]:
    yield from _linear_weights(f"{attn}.q", spec.q_width, spec.hidden, spec.qkv_bias)
    yield from _linear_weights(f"{attn}.k", spec.kv_width, spec.hidden, spec.qkv_bias)
    yield from _linear_weights(f"{attn}.v", spec.kv_width, spec.hidden, spec.qkv_bias)
    if spec.qk_norm:
        yield from _norm_weights(spec, f"{attn}.q_norm", spec.head_dim)
        yield from _norm_weights(spec, f"{attn}.k_norm", spec.head_dim)
    if spec.qk_norm_width:
        yield from _norm_weights(spec, f"{attn}.q_norm", spec.q_width)
        yield from _norm_weights(spec, f"{attn}.k_norm", spec.kv_width)
    if spec.sinks:
        yield WeightSpec(f"{attn}.sinks", (spec.heads,), "vector")
    yield from _linear_weights(f"{attn}.o", spec.hidden, spec.q_width, spec.o_bias)


def _norm_weights(spec: ModelSpec, name: str, width: int = 0) -> Iterator[WeightSpec]:
    yield WeightSpec(name, (width or spec.hidden,), "vector")
    if spec.norm_bias:
        yield WeightSpec(f"{name}_bias", (width or spec.hidden,), "vector")


def _linear_weights(name: str, rows: int, columns: int, bias: bool) -> Iterator[WeightSpec]:
    yield WeightSpec(f"{name}.weight", (rows, columns), "linear")
    if bias:
        yield WeightSpec(f"{name}.bias", (rows,), "vector")


def group_name(window: int) -> str:
    """The state group that keeps layers of this window: `full`, `window4096`."""
    return f"window{window}" if window else "full"


def state_groups(spec: ModelSpec) -> tuple[StateGroup, ...]:
    """One group for each window that occurs, in order of first use. With a prefix that sees itself, what is kept of a
    token depends on tokens after it: the prompt then runs in one step, and no part of it is shared."""
    if spec.mla:
        return (mla_group(spec.mla, spec.layers),)
    layers: dict[int, list[int]] = {}
    for i in range(spec.layers):
        layers.setdefault(spec.window(i), []).append(i)
    return tuple(
        StateGroup(
            group_name(window), StateKind.WINDOW if window else StateKind.PAGED, tuple(which),
            spec.kv_heads, spec.head_dim, spec.head_dim, window,
            sink=spec.window_sink if window else 0, stride=spec.window_stride if window else 0,
            chunkable=spec.prefix_token < 0, shareable=spec.prefix_token < 0,
        )
        for window, which in layers.items()
    )  # fmt: skip


def build(spec: ModelSpec) -> ProgramSet:
    """The Programs of a decoder: `step` (logits [S, vocab]) and `embed` (hidden [T, width] and, of each
    sequence's last token, pooled [N, width] as `spec.pooling` says); the latter alone where there is no head."""
    weights = weight_specs(spec)
    constants = _constants(spec)
    known = weights | {name: WeightSpec(name, array.shape, "vector") for name, array in constants.items()}
    embed = {"embed": _embed(spec, known)}
    return ProgramSet(
        programs=embed if spec.headless else {"step": _step(spec, known), **embed},
        weights=weights,
        groups=state_groups(spec),
        vocab_size=spec.vocab_size,
        context_length=spec.context_length,
        constants=constants,
        prefix_token=spec.prefix_token,
    )


def _constants(spec: ModelSpec) -> dict[str, npt.NDArray[np.float32]]:
    constants = {
        name: inverse_frequencies(rope, spec.context_length) for rope, name in _tables(spec).items()
    }  # in order of first use
    if spec.alibi:
        constants[ALIBI] = alibi_slopes(spec.heads) * np.float32(spec.alibi)
    return constants


def _tables(spec: ModelSpec) -> dict[RopeSpec, str]:
    """Each rotary table that a layer uses -> the name of its constant."""
    used = dict.fromkeys(rope for i in range(spec.layers) if (rope := spec.rope_of(i)) is not None)
    return {rope: f"{INV_FREQ}{j or ''}" for j, rope in enumerate(used)}


def _step(spec: ModelSpec, weights: Mapping[str, WeightSpec]) -> Program:
    builder = Builder("step", weights)
    rows = builder.one("select_rows", _trunk(builder, spec))
    hidden = _scaled(builder, _norm(builder, spec, rows, "final_norm"), spec.logit_scale)
    head = "embed.weight" if spec.tied else "head.weight"
    logits = builder.one("linears", hidden, weights=[head, "head.bias" if spec.head_bias else ""])
    if spec.logit_softcap:
        logits = builder.one("soft_cap", logits, cap=spec.logit_softcap)
    return builder.finish(logits=logits)


def _embed(spec: ModelSpec, weights: Mapping[str, WeightSpec]) -> Program:
    builder = Builder("embed", weights)
    hidden = _norm(builder, spec, _trunk(builder, spec), "final_norm")
    return builder.finish(hidden=hidden, pooled=pooled(builder, spec.pooling, hidden))


def _trunk(builder: Builder, spec: ModelSpec) -> Value:
    """Embedding and all layers: the residual stream [T, hidden], not yet normalised."""
    tokens = Axis.TOKENS.value
    x = builder.one("embed", weights=["embed.weight"], axis=tokens, source="tokens", scale=spec.embed_scale)
    if spec.learned_positions:
        at = spec.position_offset
        x = builder.one(
            "add", x, builder.one("embed", weights=["positions.weight"], axis=tokens, source="positions", offset=at)
        )
    if spec.embed_norm:
        x = _norm(builder, spec, x, "embed_norm")
    rotary = {rope: _rotary(builder, rope, name) for rope, name in _tables(spec).items()}
    for i in range(spec.layers):
        builder.layer = i
        rope = spec.rope_of(i)
        x = _layer(builder, spec, i, x, rotary[rope] if rope is not None else None)
    builder.layer = -1
    return x


def _rotary(builder: Builder, rope: RopeSpec, name: str) -> Value:
    return builder.one("rotary", weights=[name], factor=rope.attention_factor, source=rope.source)


def _layer(builder: Builder, spec: ModelSpec, i: int, x: Value, rotary: Value | None) -> Value:
    """One layer: x [T, hidden] -> [T, hidden]."""
    layer = f"layers.{i}"
    h = _norm(builder, spec, x, f"{layer}.attn_norm") if spec.pre_norm else x
    a = _attention(builder, spec, i, h, rotary)
    if spec.parallel_norms:
        g = h if spec.parallel_norms == 1 else _norm(builder, spec, x, f"{layer}.mlp_norm")
        x = _residual(builder, spec, x, a, f"{layer}.attn_post_norm")
        return _residual(builder, spec, x, _mlp(builder, spec, i, g), f"{layer}.mlp_post_norm")
    if spec.carry:
        x = _scaled(builder, h, spec.carry)
    x = _residual(builder, spec, x, a, f"{layer}.attn_post_norm")
    h = _norm(builder, spec, x, f"{layer}.mlp_norm") if spec.pre_norm else x
    m = _mlp(builder, spec, i, h)
    if spec.carry:
        x = _scaled(builder, h, spec.carry)
    return _residual(builder, spec, x, m, f"{layer}.mlp_post_norm")


def _residual(builder: Builder, spec: ModelSpec, x: Value, part: Value, post_norm: str) -> Value:
    """x plus what a part of the layer made, normalised and scaled as the spec says."""
    if spec.post_norm:
        part = _norm(builder, spec, part, post_norm)
    return builder.one("add", x, _scaled(builder, part, spec.residual_scale))


def _attention(builder: Builder, spec: ModelSpec, i: int, h: Value, rotary: Value | None) -> Value:
    attn, rope = f"layers.{i}.attn", spec.rope_of(i)
    if spec.mla and rope is not None and rotary is not None:
        return mla_block(builder, spec.mla, i, spec.heads, h, rotary, rope.interleaved)
    q, k, v = _linears(builder, h, [f"{attn}.{part}" for part in "qkv"], spec.qkv_bias)
    if spec.qk_norm:
        q = _norm(builder, spec, q, f"{attn}.q_norm", spec.heads)
        k = _norm(builder, spec, k, f"{attn}.k_norm", spec.kv_heads)
    if spec.qk_norm_width:
        q, k = _norm(builder, spec, q, f"{attn}.q_norm"), _norm(builder, spec, k, f"{attn}.k_norm")
    if rope is not None and rotary is not None:
        q = builder.one("rope", q, rotary, head_dim=spec.head_dim, interleaved=rope.interleaved)
        k = builder.one("rope", k, rotary, head_dim=spec.head_dim, interleaved=rope.interleaved)
    window = spec.window(i)
    a = builder.one(
        "attention", q, k, v, weights=_attention_extras(spec, attn), group=group_name(window), heads=spec.heads,
        kv_heads=spec.kv_heads, head_dim=spec.head_dim, v_dim=spec.head_dim, scale=spec.scale, window=window,
        softcap=spec.attention_softcap, bias="alibi" if spec.alibi else "none",
        mask="prefix" if spec.prefix_token >= 0 else "causal", **spec.static(window),
    )  # fmt: skip
    (o,) = _linears(builder, a, [f"{attn}.o"], spec.o_bias)
    return o


def _attention_extras(spec: ModelSpec, attn: str) -> list[str]:
    """The optional weights of an attention op: ALiBi's slopes, sinks; trailing absent ones are left out."""
    slopes = ALIBI if spec.alibi else ""
    return [slopes, f"{attn}.sinks"] if spec.sinks else [slopes] if slopes else []


def _mlp(builder: Builder, spec: ModelSpec, i: int, h: Value) -> Value:
    if spec.moe and i in spec.moe.layers:
        return moe_block(builder, spec.moe, i, h)
    mlp = f"layers.{i}.mlp"
    if spec.gated:
        gate, up = _linears(builder, h, [f"{mlp}.gate", f"{mlp}.up"], spec.mlp_bias)
        inner = builder.one("glu", gate, up, act=spec.activation)
    else:
        (up,) = _linears(builder, h, [f"{mlp}.up"], spec.mlp_bias)
        inner = builder.one("act", up, act=spec.activation)
    (down,) = _linears(builder, inner, [f"{mlp}.down"], spec.mlp_bias)
    return down


def _norm(builder: Builder, spec: ModelSpec, x: Value, name: str, heads: int = 1) -> Value:
    """The spec's norm with the weight `name`, of each of `heads` runs of a row apart."""
    if spec.norm == "layer":
        weights = [name, f"{name}_bias"] if spec.norm_bias else [name]
        return builder.one("layer_norm", x, weights=weights, eps=spec.norm_eps)
    return builder.one("rms_norm", x, weights=[name], eps=spec.norm_eps, heads=heads, offset=spec.norm_offset)


def _scaled(builder: Builder, x: Value, by: float) -> Value:
    return x if by == 1.0 else builder.one("scale", x, by=by)


def _linears(builder: Builder, x: Value, names: list[str], bias: bool) -> tuple[Value, ...]:
    biases = [f"{name}.bias" if bias else "" for name in names]
    return builder.op("linears", x, weights=[f"{name}.weight" for name in names] + biases)
