"""Multi-head latent attention as ops (DeepSeek-V2, arXiv 2405.04434): the cache keeps, for each position, one
compressed vector and one rotated key that all heads share. Knows no families and no files.

One form for prefill and decode, the absorbed one: each head's q is taken into the compressed space, where it meets
the cached vector itself, and the weighted sum of cached vectors is taken out again by each head's matrix for v. So K
and V of the heads are never made, and the bits of a token do not depend on how its prompt was cut.

Canonical weights of layer i, under `layers.{i}.attn`: `q_a.weight` [q_rank, hidden], `q_a_norm` [q_rank] (both only
with q_rank), `q_nope.weight` [heads * nope_dim, q_rank or hidden], `q_rope.weight` [heads * rope_dim, same],
`kv_a.weight` [kv_rank, hidden], `k_rope.weight` [rope_dim, hidden], `kv_a_norm` [kv_rank], `k_b.weight`
[heads * kv_rank, nope_dim] (each head's matrix for k, transposed), `v_b.weight` [heads * v_dim, kv_rank], `o.weight`
[hidden, heads * v_dim].
"""

from collections.abc import Iterator

from inhouse.model.spec_parts import MlaSpec
from inhouse.runtime.ops import Builder
from inhouse.runtime.program import StateGroup, StateKind, Value, WeightSpec

GROUP = "latent"


def mla_weights(mla: MlaSpec, layer: int, hidden: int, heads: int) -> Iterator[WeightSpec]:
    """The canonical weights of one layer's attention, its input norm apart, in the order of the forward pass."""
    name = f"layers.{layer}.attn"
    source = mla.q_rank or hidden
    if mla.q_rank:
        yield from _linear(f"{name}.q_a", mla.q_rank, hidden, mla.bias)
        yield WeightSpec(f"{name}.q_a_norm", (mla.q_rank,), "vector")
    yield from _linear(f"{name}.q_nope", heads * mla.nope_dim, source, False)
    yield from _linear(f"{name}.q_rope", heads * mla.rope_dim, source, False)
    yield from _linear(f"{name}.kv_a", mla.kv_rank, hidden, mla.bias)
    yield from _linear(f"{name}.k_rope", mla.rope_dim, hidden, mla.bias)
    yield WeightSpec(f"{name}.kv_a_norm", (mla.kv_rank,), "vector")
    yield from _linear(f"{name}.k_b", heads * mla.kv_rank, mla.nope_dim, False)
    yield from _linear(f"{name}.v_b", heads * mla.v_dim, mla.kv_rank, False)
    yield from _linear(f"{name}.o", hidden, heads * mla.v_dim, mla.bias)


def _linear(name: str, rows: int, columns: int, bias: bool) -> Iterator[WeightSpec]:
    yield WeightSpec(f"{name}.weight", (rows, columns), "linear")
    if bias:
        yield WeightSpec(f"{name}.bias", (rows,), "vector")


def mla_group(mla: MlaSpec, layers: int) -> StateGroup:
    """The state group of all layers: one row of kv_rank + rope_dim elements a position, whose first kv_rank are V."""
    width = mla.kv_rank + mla.rope_dim
    return StateGroup(GROUP, StateKind.LATENT, tuple(range(layers)), 1, width, mla.kv_rank)


def mla_scale(mla: MlaSpec) -> float:
    """What attention scores are multiplied by."""
    return float((mla.nope_dim + mla.rope_dim) ** -0.5) * mla.mscale


def mla_block(
    builder: Builder, mla: MlaSpec, layer: int, heads: int, h: Value, rotary: Value, interleaved: bool
) -> Value:
    """h [T, hidden], normalised, rotary [T, rope_dim] -> [T, hidden]: attention, its output projection included."""
    name = f"layers.{layer}.attn"
    kv, k_rope, x = _compressed(builder, mla, name, h)
    q_nope, q_rope = builder.op("linears", x, weights=[f"{name}.q_nope.weight", f"{name}.q_rope.weight", "", ""])

    def turned(x: Value) -> Value:
        return builder.one("rope", x, rotary, head_dim=mla.rope_dim, interleaved=interleaved)

    k = builder.one("concat", kv, turned(k_rope), heads=1)
    inward = builder.one("head_linears", q_nope, weights=[f"{name}.k_b.weight"], heads=heads)
    q = builder.one("concat", inward, turned(q_rope), heads=heads)
    a = builder.one(
        "attention", q, k, group=GROUP, heads=heads, kv_heads=1, head_dim=mla.kv_rank + mla.rope_dim,
        v_dim=mla.kv_rank, scale=mla_scale(mla), v_from_k=True,
    )  # fmt: skip
    y = builder.one("head_linears", a, weights=[f"{name}.v_b.weight"], heads=heads)
    return builder.one("linears", y, weights=[f"{name}.o.weight", f"{name}.o.bias" if mla.bias else ""])


def _compressed(builder: Builder, mla: MlaSpec, name: str, h: Value) -> tuple[Value, Value, Value]:
    """(what the cache keeps of kv [T, kv_rank], k before its rotation [T, rope_dim], the input of q's projection)."""
    parts = ["kv_a", "k_rope", *(["q_a"] if mla.q_rank else [])]
    biases = [f"{name}.{part}.bias" if mla.bias else "" for part in parts]
    made = builder.op("linears", h, weights=[f"{name}.{part}.weight" for part in parts] + biases)
    kv = builder.one("rms_norm", made[0], weights=[f"{name}.kv_a_norm"], eps=mla.norm_eps)
    if not mla.q_rank:
        return kv, made[1], h
    return kv, made[1], builder.one("rms_norm", made[2], weights=[f"{name}.q_a_norm"], eps=mla.norm_eps)
