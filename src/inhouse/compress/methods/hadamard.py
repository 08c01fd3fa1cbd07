"""Rotations that spread outliers: the residual stream by a Hadamard matrix, value heads each by their own.

Ashkboos et al. 2024 (QuaRot, arXiv 2404.00456): norm gains are first folded into what reads the norms, then the
stream's basis is turned: what writes into it (embedding, o, down) and what reads it (q, k, v, gate, up, head) takes the
rotation up, so nothing is added at run time. Values are turned head by head, v and o taking it up. A tied embedding
cannot take the last norm's gain; it is untied if the options say so, else only heads are turned and the report says
why. Which matrices read and write is derived from the graph.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from inhouse.compress.calibrate import Calibration
from inhouse.compress.fallbacks import KEY, fallback
from inhouse.compress.folding import fold_norm
from inhouse.compress.graph import bias_of, linear_folds, matrices_of, norm_folds, readers, uses
from inhouse.compress.values import Seed
from inhouse.compress.work import Work
from inhouse.core.errors import UnsupportedError, UsageError
from inhouse.model.spec import ModelSpec
from inhouse.runtime.program import Program

PASSES = ("add", "select_rows")  # ops that a rotation of their inputs passes through


@dataclass(frozen=True, slots=True)
class HadamardOptions:
    """stream: turn the residual stream. heads: turn values. untie: give a tied head a matrix of its own (it costs its
    bytes). seed: of the signs, which make the rotation a random one."""

    stream: bool = True
    heads: bool = True
    untie: bool = False
    seed: Seed = 0


@dataclass(frozen=True, slots=True)
class Stream:
    """The residual stream: tables looked up into it, (matrix, bias) that write to it, matrices that read its norms."""

    tables: tuple[str, ...]
    writers: tuple[tuple[str, str], ...]
    readers: tuple[str, ...]


def rotation(size: int, seed: int) -> Tensor:
    """A random orthogonal matrix f64 [size, size]: Hadamard of the largest power of two in `size`, times a random
    orthogonal matrix of what is left, rows with random signs."""
    made = torch.Generator().manual_seed(seed)
    power = size & -size
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < power:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    rest = size // power
    if rest > 1:
        q, r = torch.linalg.qr(torch.randn(rest, rest, generator=made, dtype=torch.float64))
        hadamard = torch.kron((q * r.diagonal().sign()).contiguous(), hadamard)
    signs = torch.where(torch.rand(size, generator=made) < 0.5, -1.0, 1.0).double()
    return signs[:, None] * hadamard / math.sqrt(power)


def hadamard(work: Work, calibration: Calibration | None, options: HadamardOptions, report: dict[str, Any]) -> None:
    """Model scope: what the model computes stays what it was. Raises UnsupportedError where the graph does not let the
    stream be turned, UsageError where nothing is asked for."""
    if not options.stream and not options.heads:
        raise UsageError("hadamard with neither stream nor heads turns nothing", param="stream")
    if options.heads:
        report["heads"] = _turn_heads(work, options.seed)
    if options.stream:
        reason = _prepare(work, options)
        if reason and not options.heads:
            raise UnsupportedError(reason, remedy="Set untie: true, or turn heads alone")
        if reason:
            report[KEY] = [fallback("the residual stream", "hadamard", "not turned", reason)]
            return
        _fold_norms(work)
        _turn_stream(work, stream_of(work.program), options.seed)
        report["stream"] = work.spec.hidden


def _turn_heads(work: Work, seed: int) -> int:
    """Turns the values of every layer that allows it; how many."""
    count = 0
    for i, fold in enumerate(linear_folds(work.program)):
        if fold.kind != "v_o":
            continue
        turn = rotation(fold.v_dim, seed + i)
        v = work.value(fold.producer).double().reshape(fold.kv_heads, fold.v_dim, -1)
        work.put(fold.producer, (turn.T @ v).reshape(work.shape(fold.producer)).float())
        if fold.bias:
            bias = work.value(fold.bias).double().reshape(fold.kv_heads, fold.v_dim)
            work.put(fold.bias, (bias @ turn).reshape(-1).float())
        o = work.value(fold.consumer).double().reshape(-1, fold.heads, fold.v_dim)
        work.put(fold.consumer, (o @ turn).reshape(work.shape(fold.consumer)).float())
        count += 1
    return count


def _prepare(work: Work, options: HadamardOptions) -> str:
    """Unties where that is asked for; why the stream cannot be turned, "" if it can."""
    spec = work.spec
    if not isinstance(spec, ModelSpec):
        return f"a {type(spec).__name__} has no one residual stream"
    if spec.tied:
        if not options.untie:
            return (
                "the head is the embedding, which cannot take up the last norm's gain (untie: true makes it a matrix)"
            )
        work.replace_spec(replace(spec, tied=False))
        work.put("head.weight", work.value("embed.weight"))
    try:
        stream_of(work.program)
    except UnsupportedError as error:
        return error.message
    return ""


def _fold_norms(work: Work) -> None:
    for fold in norm_folds(work.program):
        names = [fold.gain, *fold.consumers]
        weights: Mapping[str, Tensor] = {name: work.value(name) for name in names}
        gain = weights[fold.gain] + float(fold.norm.attrs.get("offset", 0.0))
        for name, value in fold_norm(fold, gain, weights).items():  # the gain divided by itself is 1
            work.put(name, value)


def stream_of(program: Program) -> Stream:
    """Raises UnsupportedError for anything in the stream but look-ups, additions, and RMS norms read by linears."""
    reading, used = readers(program), uses(program)
    maker = {value.id: (op, i) for op in program.ops for i, value in enumerate(op.outputs)}
    foldable = {fold.norm.outputs[0].id: fold for fold in norm_folds(program)}
    tables: dict[str, None] = {}
    writers: dict[tuple[str, str], None] = {}
    read: dict[str, None] = {}
    waiting = [op.outputs[0].id for op in program.ops if op.kind == "embed"]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        op, place = maker[value]
        if op.kind == "embed":
            tables[op.weights[0]] = None
        elif op.kind == "linears":
            name = matrices_of(op)[place]
            writers[name, bias_of(op, name)] = None
        elif op.kind in PASSES:
            waiting += [other.id for other in op.inputs]
        else:
            raise UnsupportedError(f"{op.kind} writes into the residual stream, which no rotation passes")
        for user in reading.get(value, []):
            if user.kind in PASSES:
                waiting.append(user.outputs[0].id)
            elif user.kind == "rms_norm" and user.outputs[0].id in foldable:
                read |= dict.fromkeys(foldable[user.outputs[0].id].consumers)
            else:
                raise UnsupportedError(f"{user.kind} reads the residual stream, which no rotation passes")
    names = [*tables, *(name for name, _ in writers), *read]
    if any(used[name] != 1 for name in names) or len(set(names)) != len(names):
        raise UnsupportedError("a matrix both reads and writes the residual stream")
    return Stream(tuple(tables), tuple(writers), tuple(read))


def _turn_stream(work: Work, stream: Stream, seed: int) -> None:
    turn = rotation(work.spec.hidden, seed)
    for name in (*stream.tables, *stream.readers):
        work.put(name, (work.value(name).double() @ turn).float())
    for name, bias in stream.writers:
        work.put(name, (turn.T @ work.value(name).double()).float())
        if bias:
            work.put(bias, (work.value(bias).double() @ turn).float())
