"""Spec to Programs: the one place that writes a forward pass. Knows neither families nor files nor devices.

Canonical weights are unfused, [out, in]: `embed.weight`, `layers.{i}.attn_norm`, `layers.{i}.attn.{q,k,v,o}.weight`
(and `.bias`), `layers.{i}.attn.{q,k}_norm`, `layers.{i}.mlp_norm`, `layers.{i}.mlp.{gate,up,down}.weight` (and
`.bias`), `final_norm`, `head.weight` (absent when tied: the head then names `embed.weight`).
"""

from collections.abc import Mapping

from inhouse.model.rotary import inverse_frequencies
from inhouse.model.spec import ModelSpec
from inhouse.runtime.ops import Builder
from inhouse.runtime.program import Axis, Program, ProgramSet, StateGroup, StateKind, Value, WeightSpec

INV_FREQ = "const.inv_freq"


def weight_specs(spec: ModelSpec) -> dict[str, WeightSpec]:
    """Every canonical weight of the model, in the order of the forward pass."""
    out: dict[str, WeightSpec] = {}

    def add(name: str, kind: str, *shape: int) -> None:
        out[name] = WeightSpec(name, shape, kind)

    def linear(name: str, rows: int, columns: int, bias: bool) -> None:
        add(f"{name}.weight", "linear", rows, columns)
        if bias:
            add(f"{name}.bias", "vector", rows)

    add("embed.weight", "embedding", spec.vocab_size, spec.hidden)
    for i in range(spec.layers):
        layer = f"layers.{i}"
        add(f"{layer}.attn_norm", "vector", spec.hidden)
        linear(f"{layer}.attn.q", spec.q_width, spec.hidden, spec.qkv_bias)
        linear(f"{layer}.attn.k", spec.kv_width, spec.hidden, spec.qkv_bias)
        linear(f"{layer}.attn.v", spec.kv_width, spec.hidden, spec.qkv_bias)
        if spec.qk_norm:
            add(f"{layer}.attn.q_norm", "vector", spec.head_dim)
            add(f"{layer}.attn.k_norm", "vector", spec.head_dim)
        linear(f"{layer}.attn.o", spec.hidden, spec.q_width, spec.o_bias)
        add(f"{layer}.mlp_norm", "vector", spec.hidden)
        linear(f"{layer}.mlp.gate", spec.ffn, spec.hidden, spec.mlp_bias)
        linear(f"{layer}.mlp.up", spec.ffn, spec.hidden, spec.mlp_bias)
        linear(f"{layer}.mlp.down", spec.hidden, spec.ffn, spec.mlp_bias)
    add("final_norm", "vector", spec.hidden)
    if not spec.tied:
        add("head.weight", "linear", spec.vocab_size, spec.hidden)
    return out


def group_name(window: int) -> str:
    """The state group that keeps layers of this window: `full`, `window4096`."""
    return f"window{window}" if window else "full"


def state_groups(spec: ModelSpec) -> tuple[StateGroup, ...]:
    """One group for each window that occurs, in order of first use."""
    layers: dict[int, list[int]] = {}
    for i in range(spec.layers):
        layers.setdefault(spec.window(i), []).append(i)
    return tuple(
        StateGroup(
            group_name(window), StateKind.WINDOW if window else StateKind.PAGED, tuple(which),
            spec.kv_heads, spec.head_dim, spec.head_dim, window,
        )
        for window, which in layers.items()
    )  # fmt: skip


def build(spec: ModelSpec) -> ProgramSet:
    """The Programs of a decoder: `step` (logits [S, vocab]) and `embed` (hidden [T, width] and, of each
    sequence's last token, pooled [N, width] of L2 norm 1)."""
    weights = weight_specs(spec)
    constants = {INV_FREQ: inverse_frequencies(spec.rope, spec.context_length)}
    known = dict(weights)
    known |= {name: WeightSpec(name, array.shape, "vector") for name, array in constants.items()}
    return ProgramSet(
        programs={"step": _step(spec, known), "embed": _embed(spec, known)},
        weights=weights,
        groups=state_groups(spec),
        vocab_size=spec.vocab_size,
        context_length=spec.context_length,
        constants=constants,
    )


def _step(spec: ModelSpec, weights: Mapping[str, WeightSpec]) -> Program:
    builder = Builder("step", weights)
    rows = builder.one("select_rows", _trunk(builder, spec))
    hidden = builder.one("rms_norm", rows, weights=["final_norm"], eps=spec.norm_eps)
    return builder.finish(logits=_linear(builder, weights, hidden, "embed" if spec.tied else "head"))


def _embed(spec: ModelSpec, weights: Mapping[str, WeightSpec]) -> Program:
    builder = Builder("embed", weights)
    hidden = builder.one("rms_norm", _trunk(builder, spec), weights=["final_norm"], eps=spec.norm_eps)
    return builder.finish(hidden=hidden, pooled=builder.one("pool", hidden, mode="last", normalize=True))


def _trunk(builder: Builder, spec: ModelSpec) -> Value:
    """Embedding and all layers: the residual stream [T, hidden], not yet normalised."""
    x = builder.one("embed", weights=["embed.weight"], axis=Axis.TOKENS.value, source="tokens")
    rotary = builder.one("rotary", weights=[INV_FREQ], factor=spec.rope.attention_factor)
    for i in range(spec.layers):
        builder.layer = i
        x = builder.one("add", x, _attention(builder, spec, i, x, rotary))
        x = builder.one("add", x, _mlp(builder, spec, i, x))
    builder.layer = -1
    return x


def _attention(builder: Builder, spec: ModelSpec, i: int, x: Value, rotary: Value) -> Value:
    layer = f"layers.{i}"
    h = builder.one("rms_norm", x, weights=[f"{layer}.attn_norm"], eps=spec.norm_eps)
    q, k, v = _linears(builder, h, [f"{layer}.attn.{part}" for part in "qkv"], spec.qkv_bias)
    if spec.qk_norm:
        q = builder.one("rms_norm", q, weights=[f"{layer}.attn.q_norm"], eps=spec.norm_eps, heads=spec.heads)
        k = builder.one("rms_norm", k, weights=[f"{layer}.attn.k_norm"], eps=spec.norm_eps, heads=spec.kv_heads)
    q = builder.one("rope", q, rotary, head_dim=spec.head_dim, interleaved=spec.rope.interleaved)
    k = builder.one("rope", k, rotary, head_dim=spec.head_dim, interleaved=spec.rope.interleaved)
    window = spec.window(i)
    a = builder.one(
        "attention", q, k, v, group=group_name(window), heads=spec.heads, kv_heads=spec.kv_heads,
        head_dim=spec.head_dim, v_dim=spec.head_dim, scale=spec.scale, window=window,
    )  # fmt: skip
    (o,) = _linears(builder, a, [f"{layer}.attn.o"], spec.o_bias)
    return o


def _mlp(builder: Builder, spec: ModelSpec, i: int, x: Value) -> Value:
    layer = f"layers.{i}"
    h = builder.one("rms_norm", x, weights=[f"{layer}.mlp_norm"], eps=spec.norm_eps)
    gate, up = _linears(builder, h, [f"{layer}.mlp.gate", f"{layer}.mlp.up"], spec.mlp_bias)
    (down,) = _linears(builder, builder.one("glu", gate, up, act=spec.activation), [f"{layer}.mlp.down"], spec.mlp_bias)
    return down


def _linears(builder: Builder, x: Value, names: list[str], bias: bool) -> tuple[Value, ...]:
    biases = [f"{name}.bias" if bias else "" for name in names]
    return builder.op("linears", x, weights=[f"{name}.weight" for name in names] + biases)


def _linear(builder: Builder, weights: Mapping[str, WeightSpec], x: Value, name: str) -> Value:
    return builder.one("linears", x, weights=[f"{name}.weight", ""])
