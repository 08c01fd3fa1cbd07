"""Operations of a Program as ONNX nodes over [batch, sequence, width].

One small function each; what an op means is said in `runtime.ops`. Sources: the ONNX operator specification, opset 20.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import UnsupportedError
from inhouse.runtime.program import Op

with suppress(ImportError):  # export_onnx says so when it is asked for
    from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]
OpWriter = Callable[["Graph", Op, list[str]], list[str]]


class Graph:
    """Nodes, initialisers and outputs under way. Names of values are strings."""

    def __init__(self, opset: int) -> None:
        self._nodes: list[Any] = []
        self._tensors: dict[str, Any] = {}
        self._outputs: list[Any] = []
        self._opset, self._count = opset, 0
        self._shared: dict[str, str] = {}
        self._offset = 0

    def node(self, kind: str, *inputs: str, outputs: int = 1, **attrs: Any) -> Any:
        """Appends a node; its output's name, or a list of them."""
        self._count += 1
        names = [f"n{self._count}_{i}" for i in range(outputs)]
        self._nodes.append(helper.make_node(kind, list(inputs), names, **attrs))
        return names[0] if outputs == 1 else names

    def constant(self, array: Array, name: str = "") -> str:
        """An initialiser; equal unnamed ones are shared."""
        key = name or f"c_{array.dtype}_{array.shape}_{array.tobytes().hex()[:200]}_{array.size}"
        if key not in self._shared:
            self._count += not name
            self._shared[key] = name or f"c{self._count}"
            self._tensors[self._shared[key]] = numpy_helper.from_array(np.ascontiguousarray(array), self._shared[key])
        return self._shared[key]

    def number(self, value: float) -> str:
        return self.constant(np.array(value, np.float32))

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def weight(self, name: str, values: Array, side: tuple[BinaryIO, str] | None) -> None:
        """A weight, in the message or in a second file."""
        if side is None:
            self._tensors[name] = numpy_helper.from_array(values, name)
            return
        file, where = side
        file.write(bytes(-self._offset % 64))
        self._offset += -self._offset % 64
        tensor = TensorProto(name=name, dims=values.shape, data_type=TensorProto.FLOAT)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", where), ("offset", str(self._offset)), ("length", str(values.nbytes))):
            tensor.external_data.add(key=key, value=value)
        file.write(np.ascontiguousarray(values).data)
        self._offset += values.nbytes
        self._tensors[name] = tensor

    def rename(self, name: str, to: str) -> None:
        self._nodes.append(helper.make_node("Identity", [name], [to]))

    def output(self, role: str, name: str, width: int) -> None:
        self.rename(name, role)
        self._outputs.append(helper.make_tensor_value_info(role, TensorProto.FLOAT, ["batch", "sequence", width]))

    def model(self, producer: str, ir_version: int) -> Any:
        """The finished ModelProto."""
        ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])
        graph = helper.make_graph(self._nodes, "step", [ids], self._outputs, list(self._tensors.values()))
        opsets = [helper.make_opsetid("", self._opset)]
        return helper.make_model(graph, producer_name=producer, opset_imports=opsets, ir_version=ir_version)

    # Parts that several operations share.

    def positions(self) -> str:
        """int64 [sequence]."""
        if "positions" not in self._shared:
            shape = self.node("Shape", "input_ids", start=1, end=2)
            length = self.node("Squeeze", shape, self.ints(0))
            zero, one = self.constant(np.array(0, np.int64)), self.constant(np.array(1, np.int64))
            self._shared["positions"] = self.node("Range", zero, length, one)
        return self._shared["positions"]

    def gap(self) -> str:
        """int64 [queries, keys]: position of the query less that of the key."""
        if "gap" not in self._shared:
            at = self.positions()
            queries, keys = self.node("Unsqueeze", at, self.ints(1)), self.node("Unsqueeze", at, self.ints(0))
            self._shared["gap"] = self.node("Sub", queries, keys)
        return self._shared["gap"]

    def heads(self, x: str, count: int, width: int) -> str:
        """[B, L, count * width] -> [B, L, count, width]."""
        return str(self.node("Reshape", x, self.ints(0, 0, count, width)))

    def flat(self, x: str, width: int) -> str:
        return str(self.node("Reshape", x, self.ints(0, 0, width)))


def _embed(g: Graph, op: Op, xs: list[str]) -> list[str]:
    source, offset = str(op.attrs["source"]), int(op.attrs["offset"])
    ids = "input_ids"
    if source == "positions":
        ids = g.positions()
    elif source == "types":
        ids = g.node("Mul", "input_ids", g.ints(0))
    if offset:
        ids = g.node("Add", ids, g.ints(offset))
    y = g.node("Gather", op.weights[0], ids)
    if source == "positions":
        y = g.node("Unsqueeze", y, g.ints(0))
    return [y if op.attrs["scale"] == 1.0 else g.node("Mul", y, g.number(float(op.attrs["scale"])))]


def _rms_norm(g: Graph, op: Op, xs: list[str]) -> list[str]:
    heads, width = int(op.attrs["heads"]), op.inputs[0].width
    x = g.heads(xs[0], heads, width // heads) if heads > 1 else xs[0]
    mean = g.node("ReduceMean", g.node("Mul", x, x), g.ints(-1), keepdims=1)
    root = g.node("Sqrt", g.node("Add", mean, g.number(float(op.attrs["eps"]))))
    gain = op.weights[0]
    if op.attrs["offset"]:
        gain = g.node("Add", gain, g.number(float(op.attrs["offset"])))
    y = g.node("Mul", g.node("Div", x, root), gain)
    return [g.flat(y, width) if heads > 1 else y]


def _layer_norm(g: Graph, op: Op, xs: list[str]) -> list[str]:
    inputs = [xs[0], op.weights[0], *(name for name in op.weights[1:2] if name)]
    return [g.node("LayerNormalization", *inputs, axis=-1, epsilon=float(op.attrs["eps"]))]


def _linears(g: Graph, op: Op, xs: list[str]) -> list[str]:
    half, made = len(op.weights) // 2, []
    for weight, bias in zip(op.weights[:half], op.weights[half:], strict=True):
        y = g.node("MatMul", xs[0], g.node("Transpose", weight, perm=[1, 0]))
        made.append(g.node("Add", y, bias) if bias else y)
    return made


def _rotary(g: Graph, op: Op, xs: list[str]) -> list[str]:
    """[sequence, D]: angles in double, as everywhere; the cosine as a sine, which every runtime has in double."""
    if op.attrs["source"] != "positions":
        raise UnsupportedError(f"ONNX has no form here of rotary positions {op.attrs['source']!r}")
    at = g.node("Unsqueeze", g.node("Cast", g.positions(), to=TensorProto.DOUBLE), g.ints(1))
    angles = g.node("Mul", at, g.node("Cast", op.weights[0], to=TensorProto.DOUBLE))
    quarter = g.constant(np.array(np.pi / 2, np.float64))
    both = g.node("Concat", g.node("Add", angles, quarter), angles, axis=-1)
    table = g.node("Mul", g.node("Sin", both), g.constant(np.array(float(op.attrs["factor"]), np.float64)))
    return [g.node("Cast", table, to=TensorProto.FLOAT)]


def _rope(g: Graph, op: Op, xs: list[str]) -> list[str]:
    head_dim, width, dim = int(op.attrs["head_dim"]), op.inputs[0].width, op.inputs[1].width
    x = g.heads(xs[0], width // head_dim, head_dim)
    turned, rest = x, ""
    if dim < head_dim:
        turned, rest = g.node("Split", x, g.ints(dim, head_dim - dim), outputs=2, axis=-1)
    table = g.node("Unsqueeze", xs[1], g.ints(0, 2))  # [1, L, 1, D]
    cos, sin = g.node("Split", table, g.ints(dim // 2, dim // 2), outputs=2, axis=-1)
    if op.attrs["interleaved"]:
        pairs = g.node("Reshape", turned, g.ints(0, 0, width // head_dim, dim // 2, 2))
        a, b = (
            g.node("Squeeze", part, g.ints(-1)) for part in g.node("Split", pairs, g.ints(1, 1), outputs=2, axis=-1)
        )
    else:
        a, b = g.node("Split", turned, g.ints(dim // 2, dim // 2), outputs=2, axis=-1)
    first = g.node("Sub", g.node("Mul", a, cos), g.node("Mul", b, sin))
    second = g.node("Add", g.node("Mul", b, cos), g.node("Mul", a, sin))
    if op.attrs["interleaved"]:
        parts = [g.node("Unsqueeze", part, g.ints(-1)) for part in (first, second)]
        y = g.node("Reshape", g.node("Concat", *parts, axis=-1), g.ints(0, 0, width // head_dim, dim))
    else:
        y = g.node("Concat", first, second, axis=-1)
    if rest:
        y = g.node("Concat", y, rest, axis=-1)
    return [g.flat(y, width)]


def _attention(g: Graph, op: Op, xs: list[str]) -> list[str]:
    a = op.attrs
    if a["cross"] or a["v_from_k"] or a["mask"] == "prefix" or a["bias"] == "relative":
        what = "cross attention" if a["cross"] else "latent attention" if a["v_from_k"] else f"{a['mask']} {a['bias']}"
        raise UnsupportedError(f"ONNX has no form here of {what}")
    heads, kv = int(a["heads"]), int(a["kv_heads"])
    head_dim, v_dim = int(a["head_dim"]), int(a["v_dim"])

    def split(x: str, groups: int, each: int, width: int) -> str:
        """[B, L, ..] -> [B, groups, each, L, width]."""
        y = g.node("Reshape", x, g.ints(0, 0, groups, each, width))
        return str(g.node("Transpose", y, perm=[0, 2, 3, 1, 4]))

    q = split(xs[0], kv, heads // kv, head_dim)
    k, v = split(xs[1], kv, 1, head_dim), split(xs[2], kv, 1, v_dim)
    scores = g.node("MatMul", q, g.node("Transpose", k, perm=[0, 1, 2, 4, 3]))
    scores = g.node("Mul", scores, g.number(float(a["scale"])))
    if a["softcap"]:
        cap = g.number(float(a["softcap"]))
        scores = g.node("Mul", g.node("Tanh", g.node("Div", scores, cap)), cap)
    if a["bias"] == "alibi":
        distance = g.node("Cast", g.node("Neg", g.node("Abs", g.gap())), to=TensorProto.FLOAT)
        slopes = g.node("Reshape", op.weights[0], g.ints(kv, heads // kv, 1, 1))
        scores = g.node("Add", scores, g.node("Mul", slopes, distance))
    if a["sink"] or a["stride"]:
        raise UnsupportedError(f"layer {op.layer} attends static blocks beside its window, which this graph cannot say")
    seen = _seen(g, str(a["mask"]), int(a["window"]))
    if seen:
        scores = g.node("Where", seen, scores, g.number(-np.inf))
    if len(op.weights) > 1 and op.weights[1]:
        scores = _with_sinks(g, op.weights[1], scores, kv, heads // kv)
    else:
        scores = g.node("Softmax", scores, axis=-1)
    y = g.node("Transpose", g.node("MatMul", scores, v), perm=[0, 3, 1, 2, 4])
    return [g.flat(y, heads * v_dim)]


def _seen(g: Graph, mask: str, window: int) -> str:
    """bool [queries, keys]; "" where all are seen."""
    gap = g.gap()
    parts = [g.node("GreaterOrEqual", gap, g.ints(0))] if mask == "causal" else []
    if window:
        near = gap if mask == "causal" else g.node("Abs", gap)
        parts.append(g.node("Less", near, g.ints(window)))
    if len(parts) == 2:
        return str(g.node("And", *parts))
    return str(parts[0]) if parts else ""


def _with_sinks(g: Graph, sinks: str, scores: str, kv: int, each: int) -> str:
    """The softmax with one more score in each head, which carries no value."""
    sink = g.node("Reshape", sinks, g.ints(kv, each, 1, 1))
    top = g.node("Max", g.node("ReduceMax", scores, g.ints(-1), keepdims=1), sink)
    weights = g.node("Exp", g.node("Sub", scores, top))
    total = g.node("Add", g.node("ReduceSum", weights, g.ints(-1), keepdims=1), g.node("Exp", g.node("Sub", sink, top)))
    return str(g.node("Div", weights, total))


def _activation(g: Graph, x: str, name: str) -> str:
    match name:
        case "silu":
            return str(g.node("Mul", x, g.node("Sigmoid", x)))
        case "quick_gelu":
            return str(g.node("Mul", x, g.node("Sigmoid", g.node("Mul", x, g.number(1.702)))))
        case "gelu":
            return str(g.node("Gelu", x))
        case "gelu_tanh":
            return str(g.node("Gelu", x, approximate="tanh"))
    return str(g.node({"relu": "Relu", "tanh": "Tanh", "sigmoid": "Sigmoid"}[name], x))


def _act(g: Graph, op: Op, xs: list[str]) -> list[str]:
    return [_activation(g, xs[0], str(op.attrs["act"]))]


def _glu(g: Graph, op: Op, xs: list[str]) -> list[str]:
    gate, up = xs
    limit = float(op.attrs["limit"])
    if limit:
        gate = g.node("Min", gate, g.number(limit))
        up = g.node("Max", g.node("Min", up, g.number(limit)), g.number(-limit))
    if op.attrs["offset"]:
        up = g.node("Add", up, g.number(float(op.attrs["offset"])))
    return [g.node("Mul", _activation(g, gate, str(op.attrs["act"])), up)]


def _soft_cap(g: Graph, op: Op, xs: list[str]) -> list[str]:
    cap = g.number(float(op.attrs["cap"]))
    return [g.node("Mul", g.node("Tanh", g.node("Div", xs[0], cap)), cap)]


_WRITERS: Mapping[str, OpWriter] = {
    "embed": _embed,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "linears": _linears,
    "rotary": _rotary,
    "rope": _rope,
    "attention": _attention,
    "act": _act,
    "glu": _glu,
    "add": lambda g, op, xs: [g.node("Add", *xs)],
    "mul": lambda g, op, xs: [g.node("Mul", *xs)],
    "scale": lambda g, op, xs: [g.node("Mul", xs[0], g.number(float(op.attrs["by"])))],
    "soft_cap": _soft_cap,
    "select_rows": lambda g, op, xs: list(xs),
}


def writers() -> Mapping[str, OpWriter]:
    """Operation -> the function that writes it."""
    return _WRITERS
