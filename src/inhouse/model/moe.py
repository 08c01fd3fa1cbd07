"""The mixture of experts as ops: its weights and what takes the place of the MLP. Knows no families and no files.

Canonical weights of layer i, under `layers.{i}.moe`: `router.weight` [experts, hidden] (and `.bias`), `correction`
[experts], `experts.{e}.{gate,up,down}.weight` (and `.bias`), `shared.{gate,up,down}.weight`, `shared_gate.weight`
[1, hidden].
"""

from collections.abc import Iterator

from inhouse.model.spec_parts import MoeSpec
from inhouse.runtime.ops import Builder
from inhouse.runtime.program import Value, WeightSpec

FLOAT_WEIGHTS = ("moe.router.weight", "moe.shared_gate.weight")  # tiny, and what they decide is not smooth


def moe_weights(moe: MoeSpec, layer: int, hidden: int) -> Iterator[WeightSpec]:
    """The canonical weights of one layer's mixture, in the order of the forward pass."""
    name = f"layers.{layer}.moe"
    yield WeightSpec(f"{name}.router.weight", (moe.experts, hidden), "linear")
    if moe.router_bias:
        yield WeightSpec(f"{name}.router.bias", (moe.experts,), "vector")
    if moe.correction:
        yield WeightSpec(f"{name}.correction", (moe.experts,), "vector")
    for expert in range(moe.experts):
        yield from _mlp_weights(f"{name}.experts.{expert}", moe.ffn, hidden, moe.expert_bias)
    if moe.shared_ffn:
        yield from _mlp_weights(f"{name}.shared", moe.shared_ffn, hidden, False)
    if moe.shared_gate:
        yield WeightSpec(f"{name}.shared_gate.weight", (1, hidden), "linear")


def _mlp_weights(name: str, ffn: int, hidden: int, bias: bool) -> Iterator[WeightSpec]:
    for part, rows, columns in (("gate", ffn, hidden), ("up", ffn, hidden), ("down", hidden, ffn)):
        yield WeightSpec(f"{name}.{part}.weight", (rows, columns), "linear")
        if bias:
            yield WeightSpec(f"{name}.{part}.bias", (rows,), "vector")


def moe_block(builder: Builder, moe: MoeSpec, layer: int, h: Value) -> Value:
    """h [T, hidden], normalised -> [T, hidden]: the experts of each token, weighted, and the shared one."""
    name = f"layers.{layer}.moe"
    routing = _route(builder, moe, name, h)
    rows = builder.one("dispatch", h, routing)
    gate, up = _experts(builder, moe, name, rows, routing, ("gate", "up"))
    inner = builder.one("glu", gate, up, act=moe.activation, limit=moe.limit, offset=moe.offset)
    (down,) = _experts(builder, moe, name, inner, routing, ("down",))
    y = builder.one("combine", down, routing)
    return builder.one("add", y, _shared(builder, moe, name, h)) if moe.shared_ffn else y


def _route(builder: Builder, moe: MoeSpec, name: str, h: Value) -> Value:
    bias = f"{name}.router.bias" if moe.router_bias else ""
    logits = builder.one("linears", h, weights=[f"{name}.router.weight", bias])
    return builder.one(
        "route", logits, weights=[f"{name}.correction"] if moe.correction else [], top_k=moe.top_k,
        normalize=moe.normalize, scoring=moe.scoring, scale=moe.scale, groups=moe.groups, top_groups=moe.top_groups,
        group_score=moe.group_score, jitter=moe.jitter,
    )  # fmt: skip


def _experts(
    builder: Builder, moe: MoeSpec, name: str, x: Value, routing: Value, parts: tuple[str, ...]
) -> tuple[Value, ...]:
    every = [f"{name}.experts.{expert}.{part}" for part in parts for expert in range(moe.experts)]
    weights = [f"{one}.weight" for one in every]
    biases = [f"{one}.bias" for one in every] if moe.expert_bias else [""] * len(every)
    return builder.op("expert_linears", x, routing, weights=weights + biases, experts=moe.experts)


def _shared(builder: Builder, moe: MoeSpec, name: str, h: Value) -> Value:
    gate, up = builder.op("linears", h, weights=[f"{name}.shared.gate.weight", f"{name}.shared.up.weight", "", ""])
    inner = builder.one("glu", gate, up, act=moe.activation, limit=moe.limit, offset=moe.offset)
    y = builder.one("linears", inner, weights=[f"{name}.shared.down.weight", ""])
    if not moe.shared_gate:
        return y
    opened = builder.one("linears", h, weights=[f"{name}.shared_gate.weight", ""])
    return builder.one("scale_rows", y, builder.one("act", opened, act="sigmoid"))
