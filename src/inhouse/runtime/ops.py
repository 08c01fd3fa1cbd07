"""The one table of operations: what each takes, what it makes, and how closely two executors must agree.

Each row names the shapes in its docstring: x [T, W] reads "rows of axis T, width W". Attributes not listed are
refused. `tolerance` bounds max|a - b| / max|b| between the native and the torch executor on the same Program
and weights (float32; quantised activations are an op of their own, so both sides multiply the same integers).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from inhouse.core.errors import UsageError
from inhouse.runtime.program import Attr, Axis, DType, Op, Program, Value, WeightSpec

Shape = tuple[Axis, int, DType, int]  # axis, width, dtype, group
Weights = Sequence[WeightSpec | None]
Infer = Callable[[Sequence[Value], Weights, Mapping[str, Attr]], list[Shape]]

ROTARY_SOURCES = ("positions", "two_part")
MASKS = ("causal", "bidirectional", "prefix")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "quick_gelu", "tanh", "sigmoid")
POOLINGS = ("cls", "mean", "last", "max")
SCORINGS = ("softmax", "sigmoid", "softmax_after", "sparsemixer")
GROUP_SCORES = ("max", "top2")
BLOCK = 16  # positions of a block of state, as in runtime/step.py


@dataclass(frozen=True, slots=True)
class OpSpec:
    """One row of the table: attributes with their defaults (None: required), the shape rule, the tolerance."""

    infer: Infer
    attrs: Mapping[str, Attr | None] = field(default_factory=dict)
    tolerance: float = 1e-6


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message, remedy="The builder or a rewrite made an ill-formed Program; report it")


def _int(attrs: Mapping[str, Attr], name: str) -> int:
    value = attrs[name]
    _need(isinstance(value, int) and not isinstance(value, bool), f"attribute {name} must be an integer")
    assert isinstance(value, int)
    return value


def _f32(axis: Axis, width: int) -> Shape:
    return (axis, width, DType.F32, 0)


def _vector(weight: WeightSpec | None, length: int) -> None:
    _need(weight is not None and weight.shape == (length,), f"expected a vector of {length}, got {weight}")


def _same(xs: Sequence[Value], ws: Weights, attrs: Mapping[str, Attr]) -> list[Shape]:
    """x [A, W] -> y [A, W]."""
    _need(len(xs) == 1 and xs[0].dtype is DType.F32, "expected one f32 value")
    return [_f32(xs[0].axis, xs[0].width)]


def _pair(xs: Sequence[Value], ws: Weights, attrs: Mapping[str, Attr]) -> list[Shape]:
    """x [A, W], y [A, W] -> z [A, W]."""
    _need(len(xs) == 2 and xs[0].axis == xs[1].axis and xs[0].width == xs[1].width, "expected two values alike")
    return [_f32(xs[0].axis, xs[0].width)]


def _embed(xs: Sequence[Value], ws: Weights, attrs: Mapping[str, Attr]) -> list[Shape]:
    """table [rows, W] -> y [T, W]; `source` says which of the step's arrays indexes the table."""
    _need(not xs and len(ws) == 1 and ws[0] is not None and len(ws[0].shape) == 2, "expected one table")
    _need(attrs["source"] in ("tokens", "positions", "types"), f"unknown source {attrs['source']}")
    assert ws[0] is not None
    return [_f32(Axis(str(attrs["axis"])), ws[0].shape[1])]


def _embed_train(xs: Sequence[Value], ws: Weights, attrs: Mapping[str, Attr]) -> list[Shape]:
    """d tables [m_k, r_(k-1) n_k r_k], r_0 = r_d = 1, `widths` "n_1,..,n_d" -> y [T, n_1 .. n_d]: the digits of a token
    in the base of the m_k (the first slowest) choose a slice [r_(k-1), n_k, r_k] of each table; y is their product. An
    embedding as a tensor train (Novikov et al. 2015, arXiv 1509.06569)."""
    widths = train_widths(attrs)
    _need(not xs and attrs["source"] in ("tokens", "positions", "types"), f"unknown source {attrs['source']}")
    tables = [w for w in ws if w is not None and len(w.shape) == 2]
    _need(len(tables) == len(ws) == len(widths) and 2 <= len(ws) <= 4, "expected two to four tables")
    rank = 1
    for table, width in zip(tables, widths, strict=True):
        _need(table.shape[1] % (rank * width) == 0, f"{table.name} does not fit rank {rank} and width {width}")
        rank = table.shape[1] // (rank * width)
    _need(rank == 1, "the last table leaves a rank")
    return [_f32(Axis(str(attrs["axis"])), math.prod(widths))]


def train_widths(attrs: Mapping[str, Attr]) -> list[int]:
    """The widths of `embed_train`."""
    parts = str(attrs["widths"]).split(",")
    _need(all(part.isdecimal() and int(part) > 0 for part in parts), f"widths are {attrs['widths']!r}")
    return [int(part) for part in parts]


def _rms_norm(xs: Sequence[Value], ws: Weights, attrs: Mapping[str, Attr]) -> list[Shape]:
    """x [A, W], w [W / heads] -> y [A, W]; y = x / sqrt(mean(x^2) + eps) * (offset + w), for each head apart."""
    heads = _int(attrs, "heads")
    _need(len(xs) == 1 and xs[0].width % heads == 0, "width must be a multiple of heads")
    _vector(ws[0], xs[0].width // heads)
    return [_f32(xs[0].axis, xs[0].width)]


def _layer_norm(xs: Sequence[Value], ws: Weights, attrs: Mapping[str, Attr]) -> list[Shape]:
    """x [A, W], w [W], b [W] or absent -> y [A, W]."""
    _vector(ws[0], xs[0].width)
    if len(ws) > 1 and ws[1] is not None:
        _vector(ws[1], xs[0].width)
    return [_f32(xs[0].axis, xs[0].width)]


def _quantize_rows(xs: Sequence[Value], ws: Weights, attrs: Mapping[str, Attr]) -> list[Shape]:
    """x [A, W] -> q [A, W] int8: s = max|x| / 127 over each `group` of a row (0: the whole row; the last group
    may be short), q = round-half-even(x * (127 / max|x|)), all in f32; s = 0 and q = 0 where the group is all zero.
    With `powers`, s is the least power of two that is not below that, and q = round-half-even(x / s)."""
    group = _int(attrs, "group") or xs[0].width
    return [(xs[0].axis, xs[0].width, DType.I8, group)]


def _linears(xs: Sequence[Value], ws: Weights, attrs: Mapping[str, Attr]) -> list[Shape]:
    """x [A, in], n weights [out_i, in], n biases [out_i] or absent -> n values [A, out_i] = x W_i^T + b_i.
    With `narrow` (bf16 weights alone) x is rounded to bf16."""
    _need(len(xs) == 1 and len(ws) >= 2 and len(ws) % 2 == 0, "expected weights, then as many biases")
    half, shapes = len(ws) // 2, []
    for weight, bias in zip(ws[:half], ws[half:], strict=True):
        _need(weight is not None and len(weight.shape) == 2, f"expected a matrix, got {weight}")
        assert weight is not None
        _need(weight.shape[1] == xs[0].width, f"{weight.name} takes {weight.shape[1]}, value has {xs[0].width}")
        if bias is not None:
            _vector(bias, weight.shape[0])
        shapes.append(_f32(xs[0].axis, weight.shape[0]))
    return shapes


def _rotary(xs: Sequence[Value], ws: Weights, attrs: Mapping[str, Attr]) -> list[Shape]:
    """inv_freq [D / 2] -> r [T, D]: cos(position * inv_freq) * factor, then sin(...) * factor.

    source `two_part` (ChatGLM-6B), of a sequence with the prefix P: the first half of inv_freq meets
    min(position, max(P - 1, 0)), the second max(position - max(P - 1, 0), 0)."""
    _need(attrs["source"] in ROTARY_SOURCES, f"unknown source {attrs['source']}")
    _need(len(ws) == 1 and ws[0] is not None and len(ws[0].shape) == 1, "expected inverse frequencies")
    assert ws[0] is not None
    return [_f32(Axis(str(attrs["axis"])), 2 * ws[0].shape[0])]


def _rope(xs: Sequence[Value], ws: Weights, attrs: Mapping[str, Attr]) -> list[Shape]:
    """x [A, heads * head_dim], r [A, D], D <= head_dim -> y: the first D of each head rotated. Half form: pairs
    (i, i + D/2); interleaved: pairs (2i, 2i + 1)."""
    head_dim = _int(attrs, "head_dim")
    _need(len(xs) == 2 and xs[0].width % head_dim == 0, "width must be a multiple of head_dim")
    _need(xs[1].width <= head_dim and xs[1].width % 2 == 0, "rotary width beyond head_dim")
    return [_f32(xs[0].axis, xs[0].width)]


def _attention(xs: Sequence[Value], ws: Weights, attrs: Mapping[str, Attr]) -> list[Shape]:
    """q [A, heads * head_dim], k [A, kv_heads * head_dim], v [A, kv_heads * v_dim] -> y [A, heads * v_dim].

    self: k and v of each row are stored in `group`'s cache at that row's position, then read back with all
    that the mask admits; v_from_k: q and k alone, V is the first v_dim elements of each stored K (latent group);
    cross: q alone, K and V are positions 0..encoder_lengths[n] of a cross group, all seen.
    score = scale * q.k; softcap > 0: cap * tanh(score / cap). Which keys a query at p sees: causal: k <= p;
    prefix: k <= p or k < prefixes[n]; bidirectional: all stored; window > 0: of those |p - k| < window only.
    Over a bf16 cache queries are rounded to bf16 too, and so are softmax weights as 2^(score log2(e) - m), m a whole
    number near the largest (which one does not matter to the rounding); products and sums are f32, and the weights are
    divided by the sum of the rounded ones.
    optional weights: (ALiBi slopes [heads] | relative bias table [buckets, heads] of T5, sinks [heads]); buckets of
    relative bias look both ways unless the mask is causal.

    recent: `group` keeps codes (runtime/kv_codes.py says which query reads which block as codes), the window group
    `recent` what they are made from. sink, stride: a causal window also sees the first `sink` positions (whole blocks)
    and every stride-th block of 16, counted from the first (StreamingLLM, arXiv 2309.17453; strided sparse attention,
    arXiv 1904.10509)."""
    heads, kv = _int(attrs, "heads"), _int(attrs, "kv_heads")
    head_dim, v_dim = _int(attrs, "head_dim"), _int(attrs, "v_dim")
    _need(attrs["mask"] in MASKS, f"unknown mask {attrs['mask']}")
    _need(attrs["mask"] != "prefix" or not attrs["window"], "the prefix mask takes no window")
    _need(heads % kv == 0 and xs[0].width == heads * head_dim, "q must be heads * head_dim wide")
    plain = attrs["mask"] == "causal" and not attrs["cross"] and not attrs["v_from_k"]
    _need(not attrs["recent"] or (plain and not attrs["window"]), "codes go with plain causal attention")
    if attrs["sink"] or attrs["stride"]:
        _need(plain and bool(attrs["window"]) and attrs["bias"] == "none", "sink and stride go with a causal window")
        _need(_int(attrs, "sink") % BLOCK == 0, f"a sink must be a multiple of {BLOCK} positions")
    if attrs["cross"]:
        _need(len(xs) == 1, "cross attention takes q alone")
        _need(attrs["bias"] != "relative" and not attrs["window"], "cross attention has no window or relative bias")
    elif attrs["v_from_k"]:
        _need(len(xs) == 2 and xs[1].width == kv * head_dim and v_dim <= head_dim, "k width or v_dim wrong")
    else:
        _need(len(xs) == 3 and xs[1].width == kv * head_dim and xs[2].width == kv * v_dim, "k or v width wrong")
    return [_f32(xs[0].axis, heads * v_dim)]


def _write_cross(xs: Sequence[Value], ws: Weights, attrs: Mapping[str, Attr]) -> list[Shape]:
    """k [T, kv_heads * head_dim], v [T, kv_heads * v_dim] -> nothing; stored in the cross group `group` for the op's
    layer, each row at its own position."""
    _need(len(xs) == 2 and all(x.axis is Axis.TOKENS for x in xs), "expected k and v over tokens")
    return []


def _act(xs: Sequence[Value], ws: Weights, attrs: Mapping[str, Attr]) -> list[Shape]:
    """x [A, W] -> act(x) [A, W]."""
    _need(attrs["act"] in ACTIVATIONS, f"unknown activation {attrs['act']}")
    return _same(xs, ws, attrs)


def _glu(xs: Sequence[Value], ws: Weights, attrs: Mapping[str, Attr]) -> list[Shape]:
    """gate [A, W], up [A, W] -> act(gate) * (up + offset); limit > 0: gate is first cut to at most `limit`, up to
    -limit..limit."""
    _need(attrs["act"] in ACTIVATIONS, f"unknown activation {attrs['act']}")
    return _pair(xs, ws, attrs)


def _select_rows(xs: Sequence[Value], ws: Weights, attrs: Mapping[str, Attr]) -> list[Shape]:
    """x [T, W] -> y [S, W]: the step's sampled rows, in the step's order."""
    _need(len(xs) == 1 and xs[0].axis is Axis.TOKENS, "expected a value over tokens")
    return [_f32(Axis.SAMPLED, xs[0].width)]


def _select_columns(xs: Sequence[Value], ws: Weights, attrs: Mapping[str, Attr]) -> list[Shape]:
    """x [A, W], order [W] (column numbers as floats) -> y [A, W]: y[:, j] = x[:, order[j]]."""
    _vector(ws[0], xs[0].width)
    return _same(xs, ws, attrs)


def _pool(xs: Sequence[Value], ws: Weights, attrs: Mapping[str, Attr]) -> list[Shape]:
    """x [T, W] -> y [N, W]: one row a sequence; normalize: divided by its L2 norm."""
    _need(attrs["mode"] in POOLINGS, f"unknown pooling {attrs['mode']}")
    return [_f32(Axis.SEQUENCES, xs[0].width)]


def _route(xs: Sequence[Value], ws: Weights, attrs: Mapping[str, Attr]) -> list[Shape]:
    """router logits [T, experts], correction [experts] or absent -> routing [T, 2 * top_k]: expert ids (as floats),
    then their weights.

    Scores are the softmax or the sigmoid of the logits (softmax, sigmoid) or the logits themselves (softmax_after). The
    top_k experts of the largest score + correction are chosen, ties by lower index; groups > 0: only experts of the
    top_groups best of `groups` equal runs, a run counting as its largest value (max) or its two largest (top2).
    Weights are the scores, without the correction; normalize: divided by their sum; softmax_after: their softmax;
    then times `scale`. sparsemixer (arXiv 2409.12136): two experts in turn, each with its softmax weight among those
    not yet taken whose distance to the best, over max(|logit|, best), is at most 2 * jitter."""
    _need(len(xs) == 1 and len(ws) <= 1, "expected router logits and at most a correction")
    experts, top_k = xs[0].width, _int(attrs, "top_k")
    groups, top_groups = _int(attrs, "groups"), _int(attrs, "top_groups")
    _need(attrs["scoring"] in SCORINGS, f"unknown scoring {attrs['scoring']}")
    _need(attrs["group_score"] in GROUP_SCORES, f"unknown group score {attrs['group_score']}")
    if ws and ws[0] is not None:
        _vector(ws[0], experts)
    reach = experts
    if groups:
        _need(groups > 0 and experts % groups == 0 and 1 <= top_groups <= groups, "groups do not divide the experts")
        _need(attrs["group_score"] != "top2" or experts // groups >= 2, "groups of one expert have no two best")
        reach = experts // groups * top_groups
    _need(1 <= top_k <= reach, f"top_k is {top_k}, {reach} experts can be chosen")
    _need(attrs["scoring"] != "sparsemixer" or (top_k == 2 and not groups), "sparsemixer takes two experts, no groups")
    return [_f32(Axis.TOKENS, 2 * top_k)]


def _dispatch(xs: Sequence[Value], ws: Weights, attrs: Mapping[str, Attr]) -> list[Shape]:
    """x [T, W], routing [T, 2k] -> y [R, W]: a row for each (expert, token), by expert, then by token."""
    _need(len(xs) == 2 and xs[1].width % 2 == 0, "expected a value and its routing")
    return [_f32(Axis.ROUTED, xs[0].width)]


def _expert_linears(xs: Sequence[Value], ws: Weights, attrs: Mapping[str, Attr]) -> list[Shape]:
    """x [R, in], routing [T, 2k], n * experts weights [out_i, in], as many biases [out_i] or absent, both by i, then by
    expert -> n values [R, out_i]: each row times its expert's matrices."""
    experts = _int(attrs, "experts")
    _need(len(xs) == 2 and xs[0].axis is Axis.ROUTED, "expected routed rows and routing")
    _need(experts >= 1 and len(ws) > 0 and len(ws) % (2 * experts) == 0, "expected weights, then as many biases")
    half, shapes = len(ws) // 2, []
    for first in range(0, half, experts):
        weights = ws[first : first + experts]
        shape = weights[0].shape if weights[0] is not None else ()
        _need(len(shape) == 2 and all(w is not None and w.shape == shape for w in weights), "experts differ in shape")
        _need(shape[1] == xs[0].width, f"experts take {shape[1]}, value has {xs[0].width}")
        for bias in ws[half + first : half + first + experts]:
            if bias is not None:
                _vector(bias, shape[0])
        shapes.append(_f32(Axis.ROUTED, shape[0]))
    return shapes


def _combine(xs: Sequence[Value], ws: Weights, attrs: Mapping[str, Attr]) -> list[Shape]:
    """y [R, W], routing [T, 2k] -> z [T, W]: weighted sum, experts added in index order."""
    _need(len(xs) == 2 and xs[0].axis is Axis.ROUTED, "expected routed rows and routing")
    return [_f32(Axis.TOKENS, xs[0].width)]


def _scale_rows(xs: Sequence[Value], ws: Weights, attrs: Mapping[str, Attr]) -> list[Shape]:
    """x [A, W], s [A, 1] -> y [A, W]: each row times its number."""
    _need(len(xs) == 2 and xs[0].axis == xs[1].axis and xs[1].width == 1, "expected a value and a number a row")
    return [_f32(xs[0].axis, xs[0].width)]


def _concat(xs: Sequence[Value], ws: Weights, attrs: Mapping[str, Attr]) -> list[Shape]:
    """x [A, heads * a], y [A, heads * b] -> z [A, heads * (a + b)]: in each head x's elements, then y's."""
    heads = _int(attrs, "heads")
    _need(len(xs) == 2 and xs[0].axis == xs[1].axis, "expected two values over the same rows")
    _need(heads >= 1 and xs[0].width % heads == 0 and xs[1].width % heads == 0, "widths must be multiples of heads")
    return [_f32(xs[0].axis, xs[0].width + xs[1].width)]


def _head_linears(xs: Sequence[Value], ws: Weights, attrs: Mapping[str, Attr]) -> list[Shape]:
    """x [A, heads * in], weight [heads * out, in] -> y [A, heads * out]: each head times its own out rows."""
    heads = _int(attrs, "heads")
    _need(len(xs) == 1 and len(ws) == 1 and ws[0] is not None and len(ws[0].shape) == 2, "expected a value, a matrix")
    assert ws[0] is not None
    rows, width = ws[0].shape
    _need(heads >= 1 and rows % heads == 0 and xs[0].width == heads * width, "the matrix does not fit the heads")
    return [_f32(xs[0].axis, rows)]


ATTENTION_ATTRS: Mapping[str, Attr | None] = {
    "group": None, "heads": None, "kv_heads": None, "head_dim": None, "v_dim": None, "scale": None,
    "softcap": 0.0, "window": 0, "mask": "causal", "cross": False, "bias": "none",  # none | alibi | relative
    "buckets": 0, "max_distance": 0, "v_from_k": False, "recent": "", "sink": 0, "stride": 0,
}  # fmt: skip

ROUTE_ATTRS: Mapping[str, Attr | None] = {
    "top_k": None, "normalize": True, "scoring": "softmax", "scale": 1.0, "groups": 0, "top_groups": 0,
    "group_score": "max", "jitter": 0.0,
}  # fmt: skip

OPS: Mapping[str, OpSpec] = {
    "embed": OpSpec(_embed, {"axis": "T", "source": "tokens", "offset": 0, "scale": 1.0}, 0.0),
    "embed_train": OpSpec(_embed_train, {"axis": "T", "source": "tokens", "scale": 1.0, "widths": None}, 2e-6),
    "rms_norm": OpSpec(_rms_norm, {"eps": None, "heads": 1, "offset": 0.0}, 2e-6),
    "layer_norm": OpSpec(_layer_norm, {"eps": None}, 4e-6),
    "quantize_rows": OpSpec(_quantize_rows, {"group": 0, "powers": False}, 0.0),
    "linears": OpSpec(_linears, {"narrow": False}, 2e-5),
    "rotary": OpSpec(_rotary, {"axis": "T", "factor": 1.0, "source": "positions"}, 1e-6),
    "rope": OpSpec(_rope, {"head_dim": None, "interleaved": False}, 1e-6),
    "attention": OpSpec(_attention, ATTENTION_ATTRS, 1e-5),
    "write_cross": OpSpec(_write_cross, {"group": None}, 0.0),
    "act": OpSpec(_act, {"act": None}, 2e-6),
    "glu": OpSpec(_glu, {"act": "silu", "limit": 0.0, "offset": 0.0}, 2e-6),
    "add": OpSpec(_pair, {}, 0.0),
    "mul": OpSpec(_pair, {}, 0.0),
    "scale": OpSpec(_same, {"by": None}, 0.0),
    "soft_cap": OpSpec(_same, {"cap": None}, 2e-6),
    "select_rows": OpSpec(_select_rows, {}, 0.0),
    "select_columns": OpSpec(_select_columns, {}, 0.0),
    "pool": OpSpec(_pool, {"mode": None, "normalize": False}, 2e-6),
    "route": OpSpec(_route, ROUTE_ATTRS, 2e-6),
    "dispatch": OpSpec(_dispatch, {}, 0.0),
    "expert_linears": OpSpec(_expert_linears, {"experts": None}, 2e-5),
    "combine": OpSpec(_combine, {}, 2e-6),
    "scale_rows": OpSpec(_scale_rows, {}, 0.0),
    "concat": OpSpec(_concat, {"heads": 1}, 0.0),
    "head_linears": OpSpec(_head_linears, {"heads": None}, 2e-5),
}


class Builder:
    """Writes a Program op by op, checking shapes as it goes.

    Args:
        name: the Program's name.
        weights: every weight and constant that ops may name.
    """

    def __init__(self, name: str, weights: Mapping[str, WeightSpec]) -> None:
        self._name, self._weights = name, weights
        self._ops: list[Op] = []
        self._next = 0
        self.layer = -1  # given to the ops that follow

    def op(self, kind: str, *inputs: Value, weights: Sequence[str] = (), **attrs: Attr) -> tuple[Value, ...]:
        """Appends an op; returns its outputs. Raises UsageError for an unknown op, attribute, weight or shape."""
        spec = OPS.get(kind)
        if spec is None:
            raise UsageError(f"unknown op {kind!r}; known: {', '.join(OPS)}")
        full = complete_attrs(kind, attrs)
        for name in weights:
            _need(not name or name in self._weights, f"op {kind} names the unknown weight {name!r}")
        shapes = spec.infer(inputs, [self._weights[w] if w else None for w in weights], full)
        outputs = tuple(Value(self._next + i, *shape) for i, shape in enumerate(shapes))
        self._next += len(outputs)
        self._ops.append(Op(kind, tuple(inputs), tuple(weights), outputs, full, self.layer))
        return outputs

    def one(self, kind: str, *inputs: Value, weights: Sequence[str] = (), **attrs: Attr) -> Value:
        """`op` for the kinds that make exactly one value."""
        (value,) = self.op(kind, *inputs, weights=weights, **attrs)
        return value

    def finish(self, **outputs: Value) -> Program:
        """The Program, with each role bound to its value."""
        program = Program(self._name, tuple(self._ops), dict(outputs))
        check(program, self._weights)
        return program


def complete_attrs(kind: str, attrs: Mapping[str, Attr]) -> dict[str, Attr]:
    """`attrs` with defaults filled in, in the table's order; unknown or missing ones raise UsageError."""
    spec = OPS[kind]
    unknown = sorted(set(attrs) - set(spec.attrs))
    _need(not unknown, f"op {kind} has no attribute {', '.join(unknown)}")
    full: dict[str, Attr] = {}
    for name, default in spec.attrs.items():
        value = attrs.get(name, default)
        if value is None:
            raise UsageError(f"op {kind} needs the attribute {name}")
        full[name] = value
    return full


def check(program: Program, weights: Mapping[str, WeightSpec]) -> None:
    """Proves a Program well formed: each value made once and before use, every shape as its op's rule says."""
    made: dict[int, Value] = {}
    for op in program.ops:
        for value in op.inputs:
            _need(made.get(value.id) == value, f"{op.kind} reads {value} before it is made")
        attrs = complete_attrs(op.kind, op.attrs)
        shapes = OPS[op.kind].infer(op.inputs, [weights[w] if w else None for w in op.weights], attrs)
        _need(len(shapes) == len(op.outputs), f"{op.kind} makes {len(shapes)} values")
        for value, shape in zip(op.outputs, shapes, strict=True):
            _need((value.axis, value.width, value.dtype, value.group) == shape, f"{value} is not {shape}")
            _need(value.id not in made, f"{value} is made twice")
            made[value.id] = value
    for role, value in program.outputs.items():
        _need(made.get(value.id) == value, f"output {role} is not made")
