"""The Program: a model as a short, printable list of field-standard operations over named values and weights.

Knows what an operation is and checks its shapes; knows nothing of files, families, devices or buffers.
A Program is in single-assignment form: each op makes new values. A value is shaped (row axis, width); row
axes have no size here, a Step gives them one. Aliasing and buffer reuse belong to an executor's planner.

The table of operations with their shapes, attributes and tolerances is in `inhouse.runtime.ops`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import UnsupportedError

PROGRAM_VERSION = 1  # part of cache keys and receipts; raise it when the meaning of any op changes

Attr = bool | int | float | str


class Axis(StrEnum):
    """What the rows of a value are."""

    TOKENS = "T"  # tokens of the step
    SAMPLED = "S"  # rows whose logits are wanted
    ROUTED = "R"  # (token, expert) pairs, ordered by expert, then token
    SEQUENCES = "N"  # one row a sequence


class DType(StrEnum):
    """Element type of a value."""

    F32 = "f32"
    I8 = "i8"  # quantised rows: int8 codes with one f32 scale for each group of a row


class StateKind(StrEnum):
    """How a state group is kept."""

    PAGED = "paged"  # K and V of every position, in blocks
    WINDOW = "window"  # K and V of the last `window` positions, in blocks
    CROSS = "cross"  # K and V of the encoder's output, in blocks by encoder position; written once by `encode`
    LATENT = "latent"  # K alone, of which V is the first v_dim elements: the compressed KV of MLA
    RECURRENT = "recurrent"  # fixed size a sequence (linear attention, state-space models)


@dataclass(frozen=True, slots=True)
class Value:
    """One value: `width` elements in each row of `axis`."""

    id: int
    axis: Axis
    width: int
    dtype: DType = DType.F32
    group: int = 0  # I8 only: elements that share a scale (width itself: one scale a row)

    def __str__(self) -> str:
        kind = "" if self.dtype is DType.F32 else f" {self.dtype}/{self.group}"
        return f"%{self.id}[{self.axis}, {self.width}{kind}]"


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """A canonical weight: unfused, linears [out, in], embeddings [rows, width], vectors [n]."""

    name: str
    shape: tuple[int, ...]
    kind: str  # "linear" | "embedding" (a tied head reads it as a linear) | "vector" | "table" (rows that stay floats)


@dataclass(frozen=True, slots=True)
class StateGroup:
    """State that grows with a sequence; the engine deals in block ids, the executor alone knows the bytes."""

    name: str
    kind: StateKind
    layers: tuple[int, ...]  # layers that keep state here, ascending
    kv_heads: int
    head_dim: int
    v_dim: int
    window: int = 0  # positions kept; 0: all
    chunkable: bool = True  # may a prompt be run in several steps
    shareable: bool = True  # may a prefix be shared between sequences
    rollback: bool = True  # may the last positions be dropped again
    k_bits: int = 0  # K and V are codes of so many bits (runtime/kv_codes.py); 0: elements of the executor's KV type
    v_bits: int = 0
    sink: int = 0  # of a window group: the first positions, whole blocks, are kept too,
    stride: int = 0  # and every stride-th block, counted from the first; 0: none

    def bytes_per_token(self, element_bytes: int) -> int:
        """Bytes one position takes over all layers of the group, with `element_bytes` an element. 1 stands for int8
        codes: K padded to 4 elements, V to 16, and a float scale for each (a latent group, which stores no V, has room
        for both scales)."""
        v_dim = 0 if self.kind is StateKind.LATENT else self.v_dim
        if self.k_bits:
            return len(self.layers) * self.kv_heads * self._coded_bytes()
        if element_bytes == 1:
            head = -(-self.head_dim // 4) * 4 + -(-v_dim // 16) * 16 + 8
            return len(self.layers) * self.kv_heads * head
        return len(self.layers) * self.kv_heads * (self.head_dim + v_dim) * element_bytes

    def _coded_bytes(self) -> int:
        """A sixteenth of a head's block of codes, as native/src/kv_codes.h lays it out: codes in whole words and
        vectors, two bytes for each channel of K, four for each position and 32 elements of V, four floats for the
        head."""
        codes = 64 * -(-self.k_bits * self.head_dim // 32) + 32 * self.v_bits * -(-self.v_dim // 16)
        block = 16 + 64 * -(-self.v_dim // 32) + codes + 2 * self.head_dim
        return -(-block // 16)


@dataclass(frozen=True, slots=True)
class Op:
    """One operation. `weights` holds canonical names, "" where an optional one is absent."""

    kind: str
    inputs: tuple[Value, ...]
    weights: tuple[str, ...]
    outputs: tuple[Value, ...]
    attrs: Mapping[str, Attr]
    layer: int = -1  # -1: outside the layers

    def __str__(self) -> str:
        """Attributes that are off (0, false, none) and trailing absent weights are left out."""
        outs = ", ".join(map(str, self.outputs))
        weights = [w or "-" for w in self.weights]
        while weights and weights[-1] == "-":
            weights.pop()
        args = [f"%{v.id}" for v in self.inputs] + weights
        shown = {k: v for k, v in self.attrs.items() if v not in (0, "none")}
        args += [f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in shown.items()]
        call = f"{self.kind}({', '.join(args)})"
        return f"{outs} = {call}" if outs else call


@dataclass(frozen=True, slots=True)
class Program:
    """A named list of ops. `outputs` maps a role (`logits`, `hidden`, `pooled`, `scores`) to its value."""

    name: str  # "step" | "encode" | "embed"
    ops: tuple[Op, ...]
    outputs: Mapping[str, Value]

    def format(self) -> str:
        """The Program as text, one op a line, headed by its name and grouped by layer."""
        lines, layer = [f"program {self.name} (version {PROGRAM_VERSION})"], None
        for op in self.ops:
            if op.layer != layer:
                layer = op.layer
                lines.append(f"  layer {layer}:" if layer >= 0 else "  --")
            lines.append(f"    {op}")
        lines += [f"  return {role}: {value}" for role, value in self.outputs.items()]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class ProgramSet:
    """The Programs of one model over one set of weights, with the state they keep.

    `constants` are float arrays that the builder computes (rotary frequencies, ALiBi slopes); ops name them
    like weights, with the prefix "const.". `context_length` bounds positions (length-dependent RoPE is
    fixed from it).
    """

    programs: Mapping[str, Program]
    weights: Mapping[str, WeightSpec]
    groups: tuple[StateGroup, ...]
    vocab_size: int
    context_length: int
    constants: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    prefix_token: int = -1  # a prompt's positions before the first of it are a step's prefix; -1: there is none
    version: int = PROGRAM_VERSION

    def group(self, name: str) -> StateGroup:
        """The state group called `name`; raises UnsupportedError if there is none."""
        for group in self.groups:
            if group.name == name:
                return group
        raise UnsupportedError(f"no state group {name!r}; there are {[g.name for g in self.groups]}")
