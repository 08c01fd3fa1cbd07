"""Small programs with random weights, steps over them, and both executors side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from inhouse.model.build import build
from inhouse.model.spec import ModelSpec, RopeSpec
from inhouse.runtime.executor import Executor, Weight
from inhouse.runtime.native import NativeExecutor
from inhouse.runtime.native_library import available_levels
from inhouse.runtime.ops import Builder
from inhouse.runtime.packed import pack_float
from inhouse.runtime.program import Attr, Axis, ProgramSet, StateGroup, StateKind, WeightSpec
from inhouse.runtime.step import BLOCK_SIZE, Step

F32 = npt.NDArray[np.float32]
VOCAB, CONTEXT = 53, 1024
LEVELS = available_levels()


def noise(seed: int, *shape: int, scale: float = 1.0) -> F32:
    """Random normal floats."""
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


@dataclass(frozen=True)
class Model:
    """Programs and the weights they name."""

    programs: ProgramSet
    weights: Mapping[str, Weight]

    def native(
        self, blocks: int = 160, *, isa: str | None = None, threads: int | None = None, kv_dtype: str = "f16"
    ) -> NativeExecutor:
        """A NativeExecutor with that many blocks in every group."""
        executor = NativeExecutor(self.programs, self.weights, isa=isa, threads=threads, kv_dtype=kv_dtype)
        executor.allocate({group.name: blocks for group in executor.programs.groups})
        return executor

    def torch(self, blocks: int = 160, **options: str) -> Executor:
        """A TorchExecutor with that many blocks in every group."""
        from inhouse.runtime.torch_executor import TorchExecutor

        executor = TorchExecutor(self.programs, self.weights, **options)
        executor.allocate({group.name: blocks for group in executor.programs.groups})
        return executor


@dataclass
class OneOp:
    """Collects the inputs and weights of a program that embeds tokens and runs one op over them.

    Each input is a table of VOCAB random rows, looked up by token, so that one step tests many rows.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        self.specs: dict[str, WeightSpec] = {}
        self.weights: dict[str, Weight] = {}

    def vector(self, name: str, array: F32) -> str:
        """A vector weight."""
        self.specs[name], self.weights[name] = WeightSpec(name, array.shape, "vector"), array
        return name

    def matrix(self, name: str, array: F32, format_name: str = "f32") -> str:
        """A matrix in a float format."""
        self.specs[name] = WeightSpec(name, array.shape, "linear")
        self.weights[name] = pack_float(array, format_name)
        return name

    def packed(self, name: str, weight: Weight) -> str:
        """A matrix packed by the caller."""
        self.specs[name], self.weights[name] = WeightSpec(name, weight.shape, "linear"), weight
        return name

    def build(
        self, kind: str, widths: Sequence[int], names: Sequence[str] = (), attrs: Mapping[str, Attr] | None = None, *,
        spread: float = 1.0, groups: Sequence[StateGroup] = (), rotary: int = 0,
    ) -> Model:  # fmt: skip
        """Embeds inputs of those widths, of standard deviation `spread`, and runs the op; its outputs are named
        out0, out1, ... rotary > 0: the last input is a table of angles of that width."""
        for i, width in enumerate(widths):
            table = noise(self.seed + 100 + i, VOCAB, width, scale=spread)
            self.specs[f"in{i}"] = WeightSpec(f"in{i}", table.shape, "embedding")
            self.weights[f"in{i}"] = pack_float(table, "f32")
        constants = {}
        if rotary:
            constants["const.freq"] = (1e4 ** -(np.arange(rotary // 2) * 2 / rotary)).astype(np.float32)
        known = self.specs | {n: WeightSpec(n, a.shape, "vector") for n, a in constants.items()}
        builder = Builder("step", known)
        inputs = [builder.one("embed", weights=[f"in{i}"]) for i in range(len(widths))]
        if rotary:
            inputs.append(builder.one("rotary", weights=["const.freq"]))
        builder.layer = 0
        outputs = builder.op(kind, *inputs, weights=names, **(attrs or {}))
        program = builder.finish(**{f"out{i}": value for i, value in enumerate(outputs)})
        programs = ProgramSet({"step": program}, self.specs, tuple(groups), VOCAB, CONTEXT, constants)
        return Model(programs, self.weights)


def steps(programs: ProgramSet, chunks: Sequence[tuple[Sequence[int], int]], blocks_each: int = 20) -> Step:
    """A step over `chunks` of (tokens, first position), all rows sampled. Sequence n owns the blocks from
    n * blocks_each, in an order that is not theirs by position."""
    ids = [t for tokens, _ in chunks for t in tokens]
    positions = [first + i for tokens, first in chunks for i in range(len(tokens))]
    owners = [n for n, (tokens, _) in enumerate(chunks) for _ in tokens]
    order = np.random.default_rng(5).permutation(blocks_each)
    table = np.array([n * blocks_each + order for n in range(len(chunks))], np.int32).reshape(len(chunks), blocks_each)
    lengths = [first + len(tokens) for tokens, first in chunks]
    assert max(lengths, default=0) <= blocks_each * BLOCK_SIZE
    return Step(
        tokens=np.array(ids, np.int32), positions=np.array(positions, np.int32), sequences=np.array(owners, np.int32),
        lengths=np.array(lengths, np.int32), tables={group.name: table for group in programs.groups},
        sampled=np.arange(len(ids), dtype=np.int32), adapters=np.zeros(len(chunks), np.int32),
    )  # fmt: skip


def tokens(seed: int, count: int) -> list[int]:
    """Random token ids."""
    return [int(t) for t in np.random.default_rng(seed).integers(0, VOCAB, count)]


def worst(a: F32, b: F32) -> float:
    """max|a - b| / max|b|, the measure of OpSpec.tolerance; infinite where NaNs differ."""
    if not np.array_equal(np.isnan(a), np.isnan(b)):
        return float("inf")
    largest = float(np.nanmax(np.abs(b), initial=0.0))
    return float(np.nanmax(np.abs(a - b), initial=0.0)) / (largest or 1.0)


def group(layers: int = 1, kv_heads: int = 2, head_dim: int = 16, v_dim: int = 16, window: int = 0) -> StateGroup:
    """A state group called "kv"."""
    kind = StateKind.WINDOW if window else StateKind.PAGED
    return StateGroup("kv", kind, tuple(range(layers)), kv_heads, head_dim, v_dim, window)


def decoder(seed: int = 0, formats: Mapping[str, str] | None = None, **changes: object) -> Model:
    """A random decoder of two layers (one of them with a window of 40), float32 matrices unless `formats` says."""
    fields: dict[str, object] = {
        "family": "test", "hidden": 48, "layers": 2, "heads": 6, "kv_heads": 2, "head_dim": 16, "ffn": 96,
        "vocab_size": VOCAB, "context_length": CONTEXT, "rope": RopeSpec(dim=16), "norm_eps": 1e-5, "qk_norm": True,
        "windows": (0, 40),
    }  # fmt: skip
    programs = build(ModelSpec(**(fields | changes)))  # type: ignore[arg-type]
    weights: dict[str, Weight] = {}
    for i, (name, spec) in enumerate(programs.weights.items()):
        array = noise(seed + i, *spec.shape, scale=0.3 if len(spec.shape) == 2 else 0.2)
        is_norm = len(spec.shape) == 1 and "norm" in name
        packed = (formats or {}).get(name, "f32")
        weights[name] = pack_float(array, packed) if array.ndim == 2 else array + np.float32(is_norm)
    return Model(programs, weights)


__all__ = [
    "CONTEXT",
    "LEVELS",
    "VOCAB",
    "Axis",
    "Model",
    "OneOp",
    "decoder",
    "group",
    "noise",
    "steps",
    "tokens",
    "worst",
]
