"""Encoders as numbers, and their one Program `embed`: BERT and what grew out of it. Knows neither families nor files.

Canonical weights: `embed.weight`, `positions.weight`, `types.weight`, `embed_norm`, `embed_proj.weight`,
`layers.{i}.attn.{q,k,v,o}.weight`, `layers.{i}.attn_norm`, `layers.{i}.mlp.{gate,up,down}.weight`,
`layers.{i}.mlp_norm`, `final_norm`, `head.dense.weight`, `head.norm`, `head.out.weight`, `dense.{k}.weight`, each
with its `.bias`; which of them there are, the spec says. `relative.bias` [buckets, heads] is all layers' alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from inhouse.model.pooling import Pooling, pooled, pooling_constants, pooling_weights
from inhouse.model.rotary import inverse_frequencies
from inhouse.model.spec import LIMITS, RopeSpec, check_limits, check_rope, need
from inhouse.runtime.ops import ACTIVATIONS, POOLINGS, Builder
from inhouse.runtime.program import Attr, Axis, Program, ProgramSet, StateGroup, StateKind, Value, WeightSpec

SCRATCH = "scratch"  # the state group of bidirectional attention
GLOBAL_ROPE, LOCAL_ROPE = "const.inv_freq", "const.inv_freq_local"
RELATIVE = "relative.bias"


@dataclass(frozen=True, slots=True)
class ClassifierSpec:
    """A classification head: rows (of `pool`, or each token's) -> dense -> activation -> norm -> one score a label."""

    labels: tuple[str, ...]
    tokens: bool = False  # a score for every token instead of every text
    pool: str = "cls"  # of texts
    dense: bool = False  # hidden -> hidden before the scores
    dense_bias: bool = True
    activation: str = ""  # after `dense`; "": none
    norm: bool = False  # layer norm after that
    out_bias: bool = True
    answer: str = "softmax"  # scores to answers: softmax | sigmoid | none


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """A bidirectional transformer. The last norm of a layer stands behind its addition, or, with `pre_norm`, before
    attention and MLP (then layer 0 has none before its attention, and one follows the last layer)."""

    family: str
    hidden: int
    layers: int
    heads: int
    ffn: int
    vocab_size: int
    context_length: int  # tokens of one text at most
    norm_eps: float
    activation: str = "gelu"
    embedding: int = 0  # width of the token table, projected to hidden; 0: hidden itself, no projection
    project: bool = False  # a projection even where the widths are equal (ALBERT)
    position_rows: int = 0  # learned positions; 0: none
    position_offset: int = 0  # row of position 0
    types: int = 0  # token types; 0: none
    sets: int = 0  # layers with weights of their own, each serving layers / sets in a row (ALBERT); 0: every layer
    attn_bias: bool = True
    mlp_bias: bool = True
    norm_bias: bool = True
    gated: bool = False  # act(gate) * up
    pre_norm: bool = False
    rope: RopeSpec | None = None  # of layers that see all
    local_rope: RopeSpec | None = None  # of layers with a window
    windows: tuple[int, ...] = ()  # [layers] keys at a distance below that are seen, 0: all; (): all in every layer
    relative_buckets: int = 0  # T5's buckets added to every layer's scores (MPNet), up to distance 128
    pooling: Pooling = field(default_factory=Pooling)
    classifier: ClassifierSpec | None = None

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def table_width(self) -> int:
        return self.embedding or self.hidden

    def set_of(self, layer: int) -> int:
        """Which set of layer weights `layer` runs with."""
        return layer * (self.sets or self.layers) // self.layers

    def window(self, layer: int) -> int:
        """Keys at a distance below this are seen; 0: all."""
        return self.windows[layer] if self.windows else 0


def check_encoder(spec: EncoderSpec) -> EncoderSpec:
    """`spec` itself if its numbers fit one another; raises FormatError naming the number that does not."""
    check_limits(spec)
    need(spec.hidden % spec.heads == 0, f"hidden size {spec.hidden} is no multiple of {spec.heads} heads")
    need(0 <= spec.embedding <= LIMITS["hidden"], f"the embedding size is {spec.embedding}")
    need(0 <= spec.sets <= spec.layers, f"{spec.sets} sets of layer weights for {spec.layers} layers")
    need(0 <= spec.types <= 1 << 16, f"{spec.types} token types")
    need(0.0 < spec.norm_eps < 1.0, f"the norm's eps is {spec.norm_eps}, allowed above 0 and below 1")
    need(not spec.windows or len(spec.windows) == spec.layers, f"{len(spec.windows)} windows for {spec.layers} layers")
    need(all(w >= 0 for w in spec.windows), "a window is negative")
    need(spec.activation in ACTIVATIONS, f"unknown activation {spec.activation!r}")
    if spec.position_rows:
        rows, needed = spec.position_rows, spec.context_length + spec.position_offset
        need(needed <= rows <= LIMITS["context_length"], f"{rows} learned positions, {needed} are needed")
    for rope in (spec.rope, spec.local_rope):
        if rope is not None:
            check_rope(rope, spec.head_dim)
    need(spec.pooling.mode in POOLINGS, f"unknown pooling {spec.pooling.mode!r}")
    if spec.classifier is not None:
        count = len(spec.classifier.labels)
        need(1 <= count <= 1 << 20, f"{count} labels")
    return spec


def encoder_weights(spec: EncoderSpec) -> dict[str, WeightSpec]:
    """Every canonical weight of the model, in the order of the forward pass."""
    names = _Names()
    names.add("embed.weight", "embedding", spec.vocab_size, spec.table_width)
    if spec.position_rows:
        names.add("positions.weight", "embedding", spec.position_rows, spec.table_width)
    if spec.types:
        names.add("types.weight", "embedding", spec.types, spec.table_width)
    names.norm("embed_norm", spec.table_width, spec.norm_bias)
    if spec.embedding or spec.project:
        names.linear("embed_proj", spec.hidden, spec.table_width, True)
    if spec.relative_buckets:
        names.add(RELATIVE, "table", spec.relative_buckets, spec.heads)
    for i in range(spec.sets or spec.layers):
        _layer_weights(names, spec, i)
    if spec.pre_norm:
        names.norm("final_norm", spec.hidden, spec.norm_bias)
    if spec.classifier is not None:
        _head_weights(names, spec, spec.classifier)
    else:
        names.out |= pooling_weights(spec.pooling)
    return names.out


class _Names:
    """Weights as they are listed."""

    def __init__(self) -> None:
        self.out: dict[str, WeightSpec] = {}

    def add(self, name: str, kind: str, *shape: int) -> None:
        self.out[name] = WeightSpec(name, shape, kind)

    def norm(self, name: str, width: int, bias: bool) -> None:
        self.add(name, "vector", width)
        if bias:
            self.add(f"{name}.bias", "vector", width)

    def linear(self, name: str, rows: int, columns: int, bias: bool) -> None:
        self.add(f"{name}.weight", "linear", rows, columns)
        if bias:
            self.add(f"{name}.bias", "vector", rows)


def _layer_weights(names: _Names, spec: EncoderSpec, i: int) -> None:
    layer = f"layers.{i}"
    if i or not spec.pre_norm:
        names.norm(f"{layer}.attn_norm", spec.hidden, spec.norm_bias)
    for part in "qkvo":
        names.linear(f"{layer}.attn.{part}", spec.hidden, spec.hidden, spec.attn_bias)
    names.norm(f"{layer}.mlp_norm", spec.hidden, spec.norm_bias)
    if spec.gated:
        names.linear(f"{layer}.mlp.gate", spec.ffn, spec.hidden, spec.mlp_bias)
    names.linear(f"{layer}.mlp.up", spec.ffn, spec.hidden, spec.mlp_bias)
    names.linear(f"{layer}.mlp.down", spec.hidden, spec.ffn, spec.mlp_bias)


def _head_weights(names: _Names, spec: EncoderSpec, head: ClassifierSpec) -> None:
    if head.dense:
        names.linear("head.dense", spec.hidden, spec.hidden, head.dense_bias)
    if head.norm:
        names.norm("head.norm", spec.hidden, spec.norm_bias)
    names.linear("head.out", len(head.labels), spec.hidden, head.out_bias)


def build_encoder(spec: EncoderSpec) -> ProgramSet:
    """The Program `embed`: hidden [T, hidden]; with a classifier, scores [N, labels] (or [T, labels], of tokens); else
    pooled [N, width]. A text runs whole, in one step: its keys and values live in a scratch group."""
    weights = encoder_weights(spec)
    constants = _constants(spec)
    known = dict(weights) | {name: WeightSpec(name, array.shape, "vector") for name, array in constants.items()}
    return ProgramSet(
        programs={"embed": _Writer(spec, known).program()},
        weights=weights,
        groups=(scratch_group(spec.layers, spec.heads, spec.head_dim),),
        vocab_size=spec.vocab_size,
        context_length=spec.context_length,
        constants=constants,
    )


def scratch_group(layers: int, heads: int, head_dim: int) -> StateGroup:
    """K and V of bidirectional attention: needed within one step only."""
    return StateGroup(
        SCRATCH, StateKind.PAGED, tuple(range(layers)), heads, head_dim, head_dim,
        chunkable=False, shareable=False, rollback=False,
    )  # fmt: skip


def _constants(spec: EncoderSpec) -> Mapping[str, npt.NDArray[np.float32]]:
    out: dict[str, npt.NDArray[np.float32]] = {}
    if spec.rope is not None:
        out[GLOBAL_ROPE] = inverse_frequencies(spec.rope, spec.context_length)
    if spec.local_rope is not None:
        out[LOCAL_ROPE] = inverse_frequencies(spec.local_rope, spec.context_length)
    if spec.classifier is None:
        out |= pooling_constants(spec.pooling, spec.hidden)
    return out


class _Writer:
    """Writes the Program of one spec."""

    def __init__(self, spec: EncoderSpec, weights: Mapping[str, WeightSpec]) -> None:
        self._spec = spec
        self._weights = weights
        self._b = Builder("embed", weights)
        self._rotary: dict[str, Value] = {}

    def program(self) -> Program:
        spec = self._spec
        x = self._embedding()
        for name, rope in ((GLOBAL_ROPE, spec.rope), (LOCAL_ROPE, spec.local_rope)):
            if rope is not None:
                self._rotary[name] = self._b.one("rotary", weights=[name], factor=rope.attention_factor)
        for i in range(spec.layers):
            self._b.layer = i
            x = self._layer(i, x)
        self._b.layer = -1
        if spec.pre_norm:
            x = self._norm(x, "final_norm")
        if spec.classifier is None:
            return self._b.finish(hidden=x, pooled=pooled(self._b, spec.pooling, x))
        return self._b.finish(hidden=x, scores=self._scores(spec.classifier, x))

    def _embedding(self) -> Value:
        spec, tokens = self._spec, Axis.TOKENS.value
        x = self._b.one("embed", weights=["embed.weight"], axis=tokens, source="tokens")
        if spec.types:
            types = self._b.one("embed", weights=["types.weight"], axis=tokens, source="types")
            x = self._b.one("add", x, types)
        if spec.position_rows:
            positions = self._b.one(
                "embed", weights=["positions.weight"], axis=tokens, source="positions", offset=spec.position_offset
            )
            x = self._b.one("add", x, positions)
        x = self._norm(x, "embed_norm")
        return self._linear(x, "embed_proj") if spec.embedding or spec.project else x

    def _layer(self, i: int, x: Value) -> Value:
        layer = f"layers.{self._spec.set_of(i)}"
        if self._spec.pre_norm:
            h = self._norm(x, f"{layer}.attn_norm") if i else x
            x = self._b.one("add", x, self._attention(i, layer, h))
            return self._b.one("add", x, self._mlp(layer, self._norm(x, f"{layer}.mlp_norm")))
        x = self._norm(self._b.one("add", self._attention(i, layer, x), x), f"{layer}.attn_norm")
        return self._norm(self._b.one("add", self._mlp(layer, x), x), f"{layer}.mlp_norm")

    def _attention(self, i: int, layer: str, x: Value) -> Value:
        spec, window = self._spec, self._spec.window(i)
        q, k, v = self._linears(x, [f"{layer}.attn.{part}" for part in "qkv"])
        rotary = self._rotary.get(LOCAL_ROPE if window and spec.local_rope is not None else GLOBAL_ROPE)
        if rotary is not None:
            q = self._b.one("rope", q, rotary, head_dim=spec.head_dim)
            k = self._b.one("rope", k, rotary, head_dim=spec.head_dim)
        bias: dict[str, Attr] = {"bias": "relative", "buckets": spec.relative_buckets, "max_distance": 128}
        y = self._b.one(
            "attention", q, k, v, weights=[RELATIVE] if spec.relative_buckets else [], group=SCRATCH,
            heads=spec.heads, kv_heads=spec.heads, head_dim=spec.head_dim, v_dim=spec.head_dim,
            scale=float(spec.head_dim**-0.5), window=window, mask="bidirectional",
            **(bias if spec.relative_buckets else {}),
        )  # fmt: skip
        return self._linear(y, f"{layer}.attn.o")

    def _mlp(self, layer: str, x: Value) -> Value:
        if self._spec.gated:
            gate, up = self._linears(x, [f"{layer}.mlp.gate", f"{layer}.mlp.up"])
            h = self._b.one("glu", gate, up, act=self._spec.activation)
        else:
            h = self._b.one("act", self._linear(x, f"{layer}.mlp.up"), act=self._spec.activation)
        return self._linear(h, f"{layer}.mlp.down")

    def _scores(self, head: ClassifierSpec, x: Value) -> Value:
        if not head.tokens:
            x = self._b.one("pool", x, mode=head.pool)
        if head.dense:
            x = self._linear(x, "head.dense")
        if head.activation:
            x = self._b.one("act", x, act=head.activation)
        if head.norm:
            x = self._norm(x, "head.norm")
        return self._linear(x, "head.out")

    def _norm(self, x: Value, name: str) -> Value:
        bias = f"{name}.bias" if f"{name}.bias" in self._weights else ""
        return self._b.one("layer_norm", x, weights=[name, bias], eps=self._spec.norm_eps)

    def _linear(self, x: Value, name: str) -> Value:
        return self._linears(x, [name])[0]

    def _linears(self, x: Value, names: list[str]) -> tuple[Value, ...]:
        biases = [f"{name}.bias" if f"{name}.bias" in self._weights else "" for name in names]
        return self._b.op("linears", x, weights=[f"{name}.weight" for name in names] + biases)
