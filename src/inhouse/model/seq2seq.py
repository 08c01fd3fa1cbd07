"""Encoder-decoders (T5, BART and their kin): spec, canonical weights, and the Programs `encode` and `step`.

`encode` runs the whole input of a sequence in one step, over the scratch group `encoder`, and leaves K and V of every
decoder layer's cross attention in the group `cross`. `step` is a decoder whose layers also read that group.

Canonical weights: `embed.weight`; `encoder.` and `decoder.` in front of `embed.weight` (where the two sides differ),
`positions.weight`, `embed_norm`, `bias.weight` (relative bias shared by all layers), `final_norm`, and of
`layers.{i}.`: `attn_norm`, `attn.{q,k,v,o}`, `attn.bias.weight` (relative bias of one layer), `cross_norm`,
`cross.{q,k,v,o}` (decoder), `mlp_norm`, `mlp.{gate,up,down}`; `head.weight`, `head.bias`. A bias ends in `.bias`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import FormatError
from inhouse.runtime.ops import Builder
from inhouse.runtime.program import Attr, Program, ProgramSet, StateGroup, StateKind, Value, WeightSpec

POSITIONS = ("relative", "learned", "sinusoidal")
SINUSOIDS = "const.positions"
ENCODER, CROSS, FULL = "encoder", "cross", "full"
MOST_LAYERS, MOST_WIDTH, MOST_VOCAB, MOST_CONTEXT = 2048, 1 << 21, 1 << 23, 1 << 28


@dataclass(frozen=True, slots=True)
class Side:
    """What encoder and decoder have of their own."""

    name: str  # `encoder` | `decoder`
    layers: int
    heads: int
    head_dim: int
    ffn: int


@dataclass(frozen=True, slots=True)
class Seq2SeqSpec:
    """An encoder-decoder transformer (arXiv 1706.03762) with the switches of T5 (1910.10683) and BART (1910.13461)."""

    family: str
    hidden: int
    encoder: Side
    decoder: Side
    vocab_size: int
    context_length: int  # positions of either side
    norm_eps: float
    start_token: int  # what the decoder begins with
    norm: str = "layer"  # layer (with bias) | rms
    pre_norm: bool = True  # norms before attention and MLP; else after adding what they give
    activation: str = "relu"
    gated: bool = False  # MLP of three matrices
    bias: bool = True  # of all linears
    scaled_attention: bool = True  # scores times head_dim ** -0.5
    positions: str = "learned"  # one of POSITIONS
    position_offset: int = 0  # rows of the table before that of position 0
    sinusoid_step: float = 0.0  # log of the ratio of neighbouring wave lengths
    buckets: int = 0  # relative: rows of the table
    max_distance: int = 0  # relative: from here on all distances share a bucket
    bias_each_layer: bool = False  # relative: a table a layer (umT5), else one a side
    embed_scale: float = 1.0
    embed_norm: bool = False
    final_norm: bool = True  # of both sides
    shared_embedding: bool = True  # encoder and decoder read one table
    tied: bool = True  # the head is the decoder's embedding
    head_scale: float = 1.0  # what the decoder's output is multiplied by before the head
    head_bias: bool = False

    @property
    def layers(self) -> int:
        """Layers in all."""
        return self.encoder.layers + self.decoder.layers


def check_seq2seq(spec: Seq2SeqSpec) -> Seq2SeqSpec:
    """`spec` itself if its numbers fit one another; raises FormatError naming the number that does not."""
    for side in (spec.encoder, spec.decoder):
        _within(f"{side.name} layers", side.layers, MOST_LAYERS)
        for name, value in (("heads", side.heads), ("head_dim", side.head_dim), ("ffn", side.ffn)):
            _within(f"{side.name} {name}", value, MOST_WIDTH)
    _within("hidden", spec.hidden, MOST_WIDTH)
    _within("vocab_size", spec.vocab_size, MOST_VOCAB)
    _within("context_length", spec.context_length, MOST_CONTEXT)
    _need(0.0 < spec.norm_eps < 1.0, f"norm_eps is {spec.norm_eps}, allowed above 0 and below 1")
    _need(0 <= spec.start_token < spec.vocab_size, f"the decoder's start token is {spec.start_token}")
    if spec.positions == "relative":
        _need(spec.buckets >= 4 and spec.buckets % 4 == 0, f"{spec.buckets} buckets of relative distance")
        _need(spec.max_distance > spec.buckets // 2, f"relative distances up to {spec.max_distance}")
    return spec


def _within(name: str, value: int, most: int) -> None:
    _need(1 <= value <= most, f"{name} is {value}, allowed 1..{most}")


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise FormatError(f"the model's config does not hold together: {message}", remedy="Check config.json")


# ---- weights ------------------------------------------------------------------------------------------------------


class _Weights:
    """Collects the weights of a model, in the order of the forward pass."""

    def __init__(self, spec: Seq2SeqSpec) -> None:
        self.spec = spec
        self.found: dict[str, WeightSpec] = {}

    def add(self, name: str, kind: str, *shape: int) -> None:
        self.found[name] = WeightSpec(name, shape, kind)

    def linear(self, name: str, rows: int, columns: int) -> None:
        self.add(f"{name}.weight", "linear", rows, columns)
        if self.spec.bias:
            self.add(f"{name}.bias", "vector", rows)

    def norm(self, name: str) -> None:
        self.add(name, "vector", self.spec.hidden)
        if self.spec.norm == "layer":
            self.add(f"{name}.bias", "vector", self.spec.hidden)

    def attention(self, name: str, side: Side) -> None:
        inner, hidden = side.heads * side.head_dim, self.spec.hidden
        for part in "qkv":
            self.linear(f"{name}.{part}", inner, hidden)
        self.linear(f"{name}.o", hidden, inner)

    def side(self, side: Side) -> None:
        spec, name = self.spec, side.name
        if not spec.shared_embedding:
            self.add(f"{name}.embed.weight", "embedding", spec.vocab_size, spec.hidden)
        if spec.positions == "learned":
            self.add(f"{name}.positions.weight", "table", spec.context_length + spec.position_offset, spec.hidden)
        if spec.embed_norm:
            self.norm(f"{name}.embed_norm")
        if spec.positions == "relative" and not spec.bias_each_layer:
            self.add(f"{name}.bias.weight", "table", spec.buckets, side.heads)
        for i in range(side.layers):
            self.layer(side, f"{name}.layers.{i}")
        if spec.final_norm:
            self.norm(f"{name}.final_norm")

    def layer(self, side: Side, layer: str) -> None:
        spec = self.spec
        self.norm(f"{layer}.attn_norm")
        self.attention(f"{layer}.attn", side)
        if spec.bias_each_layer:
            self.add(f"{layer}.attn.bias.weight", "table", spec.buckets, side.heads)
        if side.name == "decoder":
            self.norm(f"{layer}.cross_norm")
            self.attention(f"{layer}.cross", side)
        self.norm(f"{layer}.mlp_norm")
        for part in ("gate", "up") if spec.gated else ("up",):
            self.linear(f"{layer}.mlp.{part}", side.ffn, spec.hidden)
        self.linear(f"{layer}.mlp.down", spec.hidden, side.ffn)


def weight_specs(spec: Seq2SeqSpec) -> dict[str, WeightSpec]:
    """Every canonical weight of the model, in the order of the forward pass."""
    weights = _Weights(spec)
    if spec.shared_embedding:
        weights.add("embed.weight", "embedding", spec.vocab_size, spec.hidden)
    weights.side(spec.encoder)
    weights.side(spec.decoder)
    if not spec.tied:
        weights.add("head.weight", "linear", spec.vocab_size, spec.hidden)
    if spec.head_bias:
        weights.add("head.bias", "vector", spec.vocab_size)
    return weights.found


# ---- programs -----------------------------------------------------------------------------------------------------


def build(spec: Seq2SeqSpec) -> ProgramSet:
    """The Programs `encode` (hidden [T, width]; writes the cross group) and `step` (logits [S, vocab])."""
    weights = weight_specs(spec)
    constants = {SINUSOIDS: sinusoids(spec)} if spec.positions == "sinusoidal" else {}
    known = weights | {name: WeightSpec(name, array.shape, "table") for name, array in constants.items()}
    encoder, decoder = spec.encoder, spec.decoder
    groups = (
        _group(FULL, StateKind.PAGED, decoder, True),
        _group(CROSS, StateKind.CROSS, decoder, False),
        _group(ENCODER, StateKind.PAGED, encoder, False),
    )
    programs = {"encode": _encode(spec, known), "step": _step(spec, known)}
    return ProgramSet(programs, weights, groups, spec.vocab_size, spec.context_length, constants)


def _group(name: str, kind: StateKind, side: Side, grows: bool) -> StateGroup:
    layers = tuple(range(side.layers))
    return StateGroup(
        name, kind, layers, side.heads, side.head_dim, side.head_dim, chunkable=grows, shareable=grows, rollback=grows
    )


def sinusoids(spec: Seq2SeqSpec) -> npt.NDArray[np.float32]:
    """float32 [context, hidden]: sines of position / wave length in the first half, cosines in the second (as fairseq
    and Marian keep them; arXiv 1706.03762 interleaves them); an odd last column is zero in the second half."""
    half = (spec.hidden + 1) // 2 if spec.position_offset == 0 else spec.hidden // 2
    rates = np.exp(-spec.sinusoid_step * np.arange(half, dtype=np.float64))
    positions = np.arange(spec.context_length, dtype=np.float64) + spec.position_offset
    angles = positions[:, None] * rates
    table = np.zeros((spec.context_length, spec.hidden), np.float32)
    table[:, :half] = np.sin(angles)
    cosines = np.cos(angles)[:, : spec.hidden - half]
    table[:, half : half + cosines.shape[1]] = cosines
    return table


class _Writer:
    """Writes the ops of one side."""

    def __init__(self, name: str, spec: Seq2SeqSpec, side: Side, weights: Mapping[str, WeightSpec]) -> None:
        self.spec, self.side = spec, side
        self.builder = Builder(name, weights)

    def norm(self, x: Value, name: str) -> Value:
        if self.spec.norm == "rms":
            return self.builder.one("rms_norm", x, weights=[name], eps=self.spec.norm_eps)
        return self.builder.one("layer_norm", x, weights=[name, f"{name}.bias"], eps=self.spec.norm_eps)

    def linears(self, x: Value, *names: str) -> tuple[Value, ...]:
        biases = [f"{name}.bias" if self.spec.bias else "" for name in names]
        return self.builder.op("linears", x, weights=[*(f"{name}.weight" for name in names), *biases])

    def embedding(self) -> str:
        return "embed.weight" if self.spec.shared_embedding else f"{self.side.name}.embed.weight"

    def embed(self) -> Value:
        spec, name = self.spec, self.side.name
        x = self.builder.one("embed", weights=[self.embedding()], scale=spec.embed_scale)
        if spec.positions == "learned":
            table, offset = f"{name}.positions.weight", spec.position_offset
            x = self.builder.one(
                "add", x, self.builder.one("embed", weights=[table], source="positions", offset=offset)
            )
        elif spec.positions == "sinusoidal":
            x = self.builder.one("add", x, self.builder.one("embed", weights=[SINUSOIDS], source="positions"))
        return self.norm(x, f"{name}.embed_norm") if spec.embed_norm else x

    def around(self, x: Value, name: str, part: str) -> Value:
        """x and what one part (`attn`, `cross`, `mlp`) of the layer `name` adds to it, with the part's norm."""
        norm = f"{name}.{part}_norm"
        h = self.norm(x, norm) if self.spec.pre_norm else x
        y = self.mlp(h, f"{name}.mlp") if part == "mlp" else self.attention(h, f"{name}.{part}", part == "cross")
        x = self.builder.one("add", x, y)
        return x if self.spec.pre_norm else self.norm(x, norm)

    def attention(self, x: Value, name: str, cross: bool) -> Value:
        spec, side = self.spec, self.side
        scale = side.head_dim**-0.5 if spec.scaled_attention else 1.0
        attrs: dict[str, Attr] = {
            "heads": side.heads, "kv_heads": side.heads, "head_dim": side.head_dim, "v_dim": side.head_dim,
            "scale": scale,
        }  # fmt: skip
        weights: list[str] = []
        if cross:
            attrs |= {"group": CROSS, "cross": True}
        else:
            encoder = side.name == "encoder"
            attrs |= {"group": ENCODER if encoder else FULL, "mask": "bidirectional" if encoder else "causal"}
            if spec.positions == "relative":
                weights = [f"{name}.bias.weight" if spec.bias_each_layer else f"{side.name}.bias.weight"]
                attrs |= {"bias": "relative", "buckets": spec.buckets, "max_distance": spec.max_distance}
        inputs = self.linears(x, f"{name}.q") if cross else self.linears(x, f"{name}.q", f"{name}.k", f"{name}.v")
        (y,) = self.linears(self.builder.one("attention", *inputs, weights=weights, **attrs), f"{name}.o")
        return y

    def mlp(self, x: Value, name: str) -> Value:
        if self.spec.gated:
            h = self.builder.one("glu", *self.linears(x, f"{name}.gate", f"{name}.up"), act=self.spec.activation)
        else:
            h = self.builder.one("act", *self.linears(x, f"{name}.up"), act=self.spec.activation)
        (y,) = self.linears(h, f"{name}.down")
        return y


def _encode(spec: Seq2SeqSpec, weights: Mapping[str, WeightSpec]) -> Program:
    writer = _Writer("encode", spec, spec.encoder, weights)
    builder, x = writer.builder, writer.embed()
    for i in range(spec.encoder.layers):
        builder.layer = i
        for part in ("attn", "mlp"):
            x = writer.around(x, f"encoder.layers.{i}", part)
    builder.layer = -1
    if spec.final_norm:
        x = writer.norm(x, "encoder.final_norm")
    for i in range(spec.decoder.layers):
        builder.layer = i
        name = f"decoder.layers.{i}.cross"
        builder.op("write_cross", *writer.linears(x, f"{name}.k", f"{name}.v"), group=CROSS)
    return builder.finish(hidden=x)


def _step(spec: Seq2SeqSpec, weights: Mapping[str, WeightSpec]) -> Program:
    writer = _Writer("step", spec, spec.decoder, weights)
    builder, x = writer.builder, writer.embed()
    for i in range(spec.decoder.layers):
        builder.layer = i
        for part in ("attn", "cross", "mlp"):
            x = writer.around(x, f"decoder.layers.{i}", part)
    builder.layer = -1
    x = builder.one("select_rows", x)
    if spec.final_norm:
        x = writer.norm(x, "decoder.final_norm")
    if spec.head_scale != 1.0:
        x = builder.one("scale", x, by=spec.head_scale)
    head = writer.embedding() if spec.tied else "head.weight"
    return builder.finish(logits=builder.one("linears", x, weights=[head, "head.bias" if spec.head_bias else ""]))
