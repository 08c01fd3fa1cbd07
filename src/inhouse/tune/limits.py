"""The roofline of a step: what a Program must read and compute, and how long this machine needs for that at least.

Counts each matrix once a step, the head for sampled rows alone, K and V of every position once a sequence in the bytes
of the KV type. int8 products at the int8 peak; products with bf16 weights, and attention, at twice the f32 peak (what
bf16 dot products reach; a stricter yardstick than f32 arithmetic, which is all that AVX2 has); other float products at
the f32 peak. Norms, activations, sampling and everything in Python are not counted: they are what a share below 100 %
is lost to. Run as a module it measures the machine's peaks and prints them as JSON.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass

from inhouse.core.errors import ExecutorError
from inhouse.runtime.executor import KV_DTYPES, Weight
from inhouse.runtime.kv_codes import element_type
from inhouse.runtime.packed import Packed, is_float
from inhouse.runtime.probe import Peaks, measure_peaks
from inhouse.runtime.program import Axis, Op, ProgramSet


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one sequence has in a step: `new` tokens after `past` stored ones, `sampled` of them with logits."""

    new: int
    past: int
    sampled: int = 1


@dataclass(frozen=True, slots=True)
class Work:
    """What steps must do at least. Operations: a multiply and an add are two."""

    bytes_read: float = 0.0
    int8_ops: float = 0.0
    f32_ops: float = 0.0
    attention_ops: float = 0.0
    bf16_ops: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.bytes_read + other.bytes_read, self.int8_ops + other.int8_ops,
            self.f32_ops + other.f32_ops, self.attention_ops + other.attention_ops, self.bf16_ops + other.bf16_ops,
        )  # fmt: skip

    @property
    def ops(self) -> float:
        """All operations together."""
        return self.int8_ops + self.f32_ops + self.attention_ops + self.bf16_ops

    def seconds(self, peaks: Peaks) -> float:
        """The least time: reading and computing overlap, the kinds of arithmetic do not."""
        arithmetic = self.int8_ops / peaks.int8_ops + self.f32_ops / peaks.f32_ops
        halves = (self.attention_ops + self.bf16_ops) / (2 * peaks.f32_ops)
        return max(self.bytes_read / peaks.read_bytes, arithmetic + halves)


DISTURBED = 0.1  # two limits of the same work that differ by more: the machine was not the same before and after


def mean_peaks(before: Peaks, after: Peaks) -> Peaks:
    """The mean of two probes, rate by rate."""
    return Peaks(*((a + b) / 2 for a, b in zip(astuple(before), astuple(after), strict=True)))


def disturbed(work: Work, before: Peaks, after: Peaks) -> bool:
    """Whether the limits that two probes allow for `work` differ by more than DISTURBED of the lesser."""
    less, more = sorted((work.seconds(before), work.seconds(after)))
    return more > less * (1 + DISTURBED)


def step_work(
    programs: ProgramSet, weights: Mapping[str, Weight], kv_dtype: str, chunks: Sequence[Chunk], program: str = "step"
) -> Work:
    """The work of one step over `chunks`, one a sequence. `programs` are those that the executor runs."""
    rows = {Axis.TOKENS: sum(c.new for c in chunks), Axis.SAMPLED: sum(c.sampled for c in chunks)}
    work = Work()
    for op in programs.programs[program].ops:
        if op.kind == "linears":
            work += _linears(op, weights, rows.get(op.inputs[0].axis, len(chunks)))
        elif op.kind == "attention":
            work += _attention(op, programs, kv_dtype, chunks)
    return work


def _linears(op: Op, weights: Mapping[str, Weight], rows: int) -> Work:
    work = Work()
    for name in op.weights[: len(op.weights) // 2]:
        weight = weights[name]
        if not isinstance(weight, Packed):
            continue
        ops = 2.0 * weight.shape[0] * weight.shape[1] * rows
        kind = "int8_ops" if not is_float(weight.format) else "bf16_ops" if weight.format == "bf16" else "f32_ops"
        work += Work(weight.nbytes if rows else 0.0, **{kind: ops})
    return work


def _attention(op: Op, programs: ProgramSet, kv_dtype: str, chunks: Sequence[Chunk]) -> Work:
    window, heads = int(op.attrs["window"]), int(op.attrs["heads"])  # codes: recent positions count as codes too
    width = int(op.attrs["head_dim"]) + int(op.attrs["v_dim"])
    group = programs.group(str(op.attrs["group"]))
    a_position = group.bytes_per_token(KV_DTYPES[element_type(kv_dtype)]) / len(group.layers)
    seen = stored = 0
    for chunk in chunks:
        lengths = range(chunk.past + 1, chunk.past + chunk.new + 1)
        seen += sum(min(n, window) for n in lengths) if window else sum(lengths)
        stored += min(chunk.past + chunk.new, window + chunk.new - 1) if window else chunk.past + chunk.new
    return Work(stored * a_position, attention_ops=2.0 * heads * width * seen)


def fresh_peaks(threads: int = 0) -> Peaks:
    """The machine's peaks as they are now, measured in a process of its own, so that its memory is not ours.
    Raises ExecutorError if that process fails."""
    command = [sys.executable, "-m", "inhouse.tune.limits", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ExecutorError(f"measuring the machine's peaks failed: {done.stderr.strip()[-300:]}")
    return Peaks(**json.loads(done.stdout))


if __name__ == "__main__":
    print(json.dumps(asdict(measure_peaks(threads=int(sys.argv[1]) if sys.argv[1:] else 0))))
