"""A ProgramSet as the flat int64 array that the native library reads (layout: native/src/program.h).

Knows the numbers of ops and attributes, and refuses what the library cannot run; knows no pointers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import UnsupportedError
from inhouse.runtime.ops import ACTIVATIONS, GROUP_SCORES, MASKS, POOLINGS, ROTARY_SOURCES, SCORINGS, train_widths
from inhouse.runtime.packed_layout import TILE_ROWS
from inhouse.runtime.program import Attr, Axis, DType, Op, Program, ProgramSet, StateGroup, StateKind, Value

MAGIC = 0x31575048494E
FLAT_VERSION = 5

AXES = (Axis.TOKENS, Axis.SAMPLED, Axis.SEQUENCES, Axis.ROUTED)
DTYPES = (DType.F32, DType.I8)
GROUP_KINDS = (StateKind.PAGED, StateKind.WINDOW, StateKind.CROSS, StateKind.LATENT)
BIASES = ("none", "alibi", "relative")
SOURCES = ("tokens", "positions", "types")
MAX_TRAIN, MAX_TABLES = 1 << 16, 4  # kMaxTrain and kMaxTables of native/src/program.h
MAX_EXPERTS, MAX_TOP_K = 4096, 64  # kMaxExperts and kMaxTopK of native/src/kernels.h


def _bits(value: Attr) -> int:
    """The bits of a float as int64."""
    return int(np.float64(value).view(np.int64))


def _number(value: Attr) -> int:
    return int(value)


@dataclass(frozen=True, slots=True)
class _Context:
    """What an op's encoder may look at."""

    programs: ProgramSet
    op: Op

    def attrs(self, *names: str, real: Sequence[str] = ()) -> list[int]:
        return [_bits(self.op.attrs[n]) if n in real else _number(self.op.attrs[n]) for n in names]

    def refuse(self, why: str) -> UnsupportedError:
        where = f"layer {self.op.layer}" if self.op.layer >= 0 else "outside the layers"
        return UnsupportedError(
            f"the native executor cannot run {self.op.kind} ({where}): {why}", remedy="Use the torch executor"
        )


def _embed(c: _Context) -> list[int]:
    return [SOURCES.index(str(c.op.attrs["source"])), *c.attrs("offset", "scale", real=["scale"])]


def _embed_train(c: _Context) -> list[int]:
    widths = train_widths(c.op.attrs)
    width = rank = most = 1
    for name, n in zip(c.op.weights, widths, strict=True):
        slice_ = c.programs.weights[name].shape[1]
        width, rank = width * n, slice_ // (rank * n)
        most = max(most, slice_, width * rank)
    if most > MAX_TRAIN:
        raise c.refuse(f"a tensor train with a product of {most} numbers; at most {MAX_TRAIN}")
    padding = [0] * (MAX_TABLES - len(widths))
    return [SOURCES.index(str(c.op.attrs["source"])), *c.attrs("scale", real=["scale"]), *widths, *padding]


def _rotary(c: _Context) -> list[int]:
    return [*c.attrs("factor", real=["factor"]), ROTARY_SOURCES.index(str(c.op.attrs["source"]))]


def _quantize(c: _Context) -> list[int]:
    return [c.op.outputs[0].group, *c.attrs("powers")]


def _attention(c: _Context) -> list[int]:
    a = c.op.attrs
    if a["bias"] not in BIASES or (a["bias"] != "none") != bool(c.op.weights and c.op.weights[0]):
        raise c.refuse(f"its attribute bias={a['bias']} and its weights disagree")
    shape = c.attrs("heads", "kv_heads", "head_dim", "v_dim", "scale", "softcap", "window", real=["scale", "softcap"])
    mask = "bidirectional" if a["cross"] else str(a["mask"])  # all that the encoder stored is seen
    kind = [MASKS.index(mask), *c.attrs("cross"), BIASES.index(str(a["bias"]))]
    more = c.attrs("buckets", "max_distance", "v_from_k")
    more += _slot(c, "recent") if a["recent"] else [-1, 0]
    return [*_slot(c), *shape, *kind, *more, *c.attrs("sink", "stride")]


def _slot(c: _Context, name: str = "group") -> list[int]:
    """The state group that an attribute of an op names, and its layer's place there."""
    group = c.programs.group(str(c.op.attrs[name]))
    if c.op.layer not in group.layers:
        raise c.refuse(f"state group {group.name} has no such layer")
    return [c.programs.groups.index(group), group.layers.index(c.op.layer)]


def _route(c: _Context) -> list[int]:
    a = c.op.attrs
    scoring, group_score = SCORINGS.index(str(a["scoring"])), GROUP_SCORES.index(str(a["group_score"]))
    if c.op.inputs[0].width > MAX_EXPERTS or int(a["top_k"]) > MAX_TOP_K:
        raise c.refuse(f"{a['top_k']} of {c.op.inputs[0].width} experts; at most {MAX_TOP_K} of {MAX_EXPERTS}")
    first, last = c.attrs("top_k", "normalize"), c.attrs("jitter", real=["jitter"])
    return [*first, scoring, _bits(a["scale"]), *c.attrs("groups", "top_groups"), group_score, *last]


def _head_linears(c: _Context) -> list[int]:
    heads = int(c.op.attrs["heads"])
    if c.op.outputs[0].width // heads % TILE_ROWS:
        raise c.refuse(f"{c.op.outputs[0].width // heads} outputs a head, which must be a multiple of {TILE_ROWS}")
    return [heads]


def _none(c: _Context) -> list[int]:
    return []


# By native number: the order is OpKind's.
_ENCODERS: Mapping[str, Callable[[_Context], list[int]]] = {
    "embed": _embed,
    "rms_norm": lambda c: c.attrs("eps", "heads", "offset", real=["eps", "offset"]),
    "layer_norm": lambda c: c.attrs("eps", real=["eps"]),
    "quantize_rows": _quantize,
    "linears": lambda c: c.attrs("narrow"),
    "rotary": _rotary,
    "rope": lambda c: c.attrs("head_dim", "interleaved"),
    "attention": _attention,
    "act": lambda c: [ACTIVATIONS.index(str(c.op.attrs["act"]))],
    "glu": lambda c: [ACTIVATIONS.index(str(c.op.attrs["act"])), *c.attrs("limit", "offset", real=["limit", "offset"])],
    "add": _none,
    "mul": _none,
    "scale": lambda c: c.attrs("by", real=["by"]),
    "soft_cap": lambda c: c.attrs("cap", real=["cap"]),
    "select_rows": _none,
    "pool": lambda c: [POOLINGS.index(str(c.op.attrs["mode"])), *c.attrs("normalize")],
    "write_cross": _slot,
    "route": _route,
    "dispatch": _none,
    "expert_linears": lambda c: c.attrs("experts"),
    "combine": _none,
    "scale_rows": _none,
    "concat": lambda c: c.attrs("heads"),
    "head_linears": _head_linears,
    "select_columns": _none,
    "embed_train": _embed_train,
}
_NUMBERS = {kind: number for number, kind in enumerate(_ENCODERS)}


def _value(value: Value, context: _Context) -> list[int]:
    if value.axis not in AXES:
        raise context.refuse(f"row axis {value.axis}")
    return [AXES.index(value.axis), value.width, DTYPES.index(value.dtype), value.group]


def _group(group: StateGroup) -> list[int]:
    if group.kind not in GROUP_KINDS:
        layer = group.layers[0] if group.layers else -1
        raise UnsupportedError(
            f"the native executor cannot keep the {group.kind} state group {group.name!r} (layer {layer})",
            remedy="Use the torch executor",
        )
    kind = GROUP_KINDS.index(group.kind)
    sizes = [kind, group.kv_heads, group.head_dim, group.v_dim, group.window, len(group.layers)]
    return [*sizes, group.k_bits, group.v_bits]


def _program(programs: ProgramSet, program: Program, weights: Mapping[str, int]) -> list[int]:
    numbers: dict[int, int] = {}
    values: list[int] = []
    ops: list[int] = []
    for op in program.ops:
        context = _Context(programs, op)
        if op.kind not in _NUMBERS:
            raise context.refuse("the native library has no such op")
        for value in op.outputs:
            numbers[value.id] = len(numbers)
            values += _value(value, context)
        names = [weights[name] if name else -1 for name in op.weights]
        attrs = _ENCODERS[op.kind](context)
        ops += [_NUMBERS[op.kind], len(op.inputs), len(names), len(op.outputs), len(attrs)]
        ops += [numbers[v.id] for v in op.inputs] + names + [numbers[v.id] for v in op.outputs] + attrs
    outputs = [numbers[v.id] for v in program.outputs.values()]
    return [len(numbers), len(program.ops), len(outputs), *values, *ops, *outputs]


def flatten(programs: ProgramSet, weights: Sequence[str]) -> npt.NDArray[np.int64]:
    """The flat form, int64 [n]; `weights` names weights and constants in the order that ops index them.

    Raises UnsupportedError, naming op and layer, for what the native library cannot run.
    """
    index = {name: i for i, name in enumerate(weights)}
    flat = [MAGIC, FLAT_VERSION, programs.vocab_size, programs.context_length]
    flat += [len(programs.groups), len(programs.programs)]
    for group in programs.groups:
        flat += _group(group)
    for program in programs.programs.values():
        flat += _program(programs, program, index)
    return np.asarray(flat, np.int64)
