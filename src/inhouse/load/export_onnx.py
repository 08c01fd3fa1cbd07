"""A decoder as an ONNX model: token ids of whole sequences in, logits of every position out, without a cache.

The graph is written from the same Program that the executors run, op by op; an op that has no form here is an error
that names it. Needs the package `onnx` (extra `onnx`). Inputs `input_ids` int64 [batch, sequence]; output `logits`
f32 [batch, sequence, vocab]. Weights beyond INLINE_BYTES lie in a second file, OUT.data, beside the first.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np

from inhouse.core.errors import ConflictError, UnavailableError, UnsupportedError
from inhouse.core.progress import Progress
from inhouse.load.describe import Described
from inhouse.load.export_report import ExportReport, Written
from inhouse.load.export_targets import Target, Weights
from inhouse.load.onnx_graph import Graph, OpWriter, writers
from inhouse.load.packing import Part
from inhouse.model.build import build
from inhouse.model.families.family import Derive
from inhouse.runtime.program import Op
from inhouse.store.writing import atomic_file

try:
    import onnx
except ImportError:  # said when it is asked for
    onnx = None  # type: ignore[assignment]

INLINE_BYTES = 1 << 30  # a protobuf message may not pass 2 GiB
OPSET, IR_VERSION = 20, 10


def export_onnx(
    described: Described, parts: Sequence[Part], weights: Weights, out: Path, progress: Progress
) -> ExportReport:
    """Writes the model. Raises UnavailableError without `onnx`, UnsupportedError for an op without a form,
    ConflictError if the second file's name is taken."""
    if onnx is None:
        raise UnavailableError("the package onnx is not installed", remedy="pip install 'inhouse[onnx]'")
    programs = build(described.spec)
    program = programs.programs.get("step")
    if program is None or "logits" not in program.outputs:
        raise UnsupportedError(f"{described.family.name} has no Program that gives logits")
    known = writers()
    missing = sorted({op.kind for op in program.ops if op.kind not in known})
    if missing:
        raise UnsupportedError(f"ONNX has no form here of the operations {', '.join(missing)}", param=missing[0])
    report = ExportReport(out, "onnx")
    by_name = {part.spec.name: part for part in parts}
    graph = Graph(OPSET)
    for name, array in programs.constants.items():
        graph.constant(array, name)
    _write_ops(graph, program.ops, known)
    graph.output("logits", f"v{program.outputs['logits'].id}", programs.vocab_size)
    with ExitStack() as stack:
        side = _side_file(stack, out, by_name.values())
        total, done = sum(int(np.prod(p.spec.shape)) for p in by_name.values()), 0
        for name, part in by_name.items():
            target = Target(name, part.spec.shape, ((part, _whole(part)),), False)
            graph.weight(name, weights.floats(target), side)
            done += int(np.prod(part.spec.shape))
            progress("export", done, total)
            exact = "vector" if part.format == "vector" else part.format
            report.tensors.append(Written(name, exact, "F32", True, weights.changed(target)))
        file = stack.enter_context(atomic_file(out))
        file.write(graph.model(f"{described.family.name} by inhouse", IR_VERSION).SerializeToString())
    data = out.with_name(out.name + ".data")
    report.nbytes = out.stat().st_size + (data.stat().st_size if data.exists() else 0)
    report.notes.append("whole sequences without a cache: each call computes every position")
    return report


def _whole(part: Part) -> Derive:
    return Derive(part.spec.name, part.spec.shape, part.spec.shape)


def _side_file(stack: ExitStack, out: Path, parts: Iterable[Part]) -> tuple[BinaryIO, str] | None:
    """The second file, where the weights need one: (file, its name)."""
    nbytes = sum(4 * int(np.prod(part.spec.shape)) for part in parts)
    if nbytes <= INLINE_BYTES:
        return None
    data = out.with_name(out.name + ".data")
    if data.exists():
        raise ConflictError(f"{data} exists", remedy="Name another place; nothing is overwritten.")
    return stack.enter_context(atomic_file(data)), data.name


def _write_ops(graph: Graph, ops: Sequence[Op], known: Mapping[str, OpWriter]) -> None:
    for op in ops:
        names = known[op.kind](graph, op, [f"v{value.id}" for value in op.inputs])
        for value, name in zip(op.outputs, names, strict=True):
            graph.rename(name, f"v{value.id}")
