"""The native executor: a ProgramSet and its weights handed to libinhouse, one call a step. Knows pointers and
lifetimes; knows no kernels and no model files."""

import ctypes
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import UnsupportedError, UsageError
from inhouse.runtime.adapters import Adapter, check_adapter, check_slots
from inhouse.runtime.executor import F32, KV_DTYPES, Weight, require
from inhouse.runtime.kv_codes import code_state, element_type
from inhouse.runtime.library import last_error
from inhouse.runtime.native_flat import flatten
from inhouse.runtime.native_library import CAdapterPair, COutput, CWeight, check, library
from inhouse.runtime.native_steps import NativeSteps, pointer
from inhouse.runtime.packed import FORMATS, Packed, pack_float
from inhouse.runtime.program import ProgramSet
from inhouse.runtime.step import I32, Step, step_rules

_KV_NUMBERS = {"f32": 0, "f16": 1, "bf16": 2, "int8": 3}
assert set(_KV_NUMBERS) == set(KV_DTYPES)


def _c_weight(name: str, weight: Weight) -> CWeight:
    if isinstance(weight, Packed):
        number, data = FORMATS[weight.format].id, weight.data
        out, width = weight.shape
    else:
        if weight.dtype != np.float32 or weight.ndim != 1 or not weight.flags.c_contiguous:
            raise UsageError(f"weight {name!r} must be packed or a contiguous float32 vector", param=name)
        number, data = -1, weight.view(np.uint8)
        out, width = 1, weight.size
    return CWeight(number, 0, out, width, pointer(data), data.nbytes)


class NativeExecutor:
    """Executor (runtime.executor) on the CPU, by libinhouse.

    Args:
        programs: what to run; an op, mask or state that the library lacks raises UnsupportedError naming it.
        weights: every canonical weight, packed, vectors as float32; kept by reference.
        threads: threads of a step; None: $INHOUSE_THREADS, else the CPUs that this process may use.
        kv_dtype: element type of cached K and V, or one of CODED_KV, which adds a state group (`code_state`).
        isa: instruction set level; None: $INHOUSE_ISA, else the highest of this machine.

    Raises UnavailableError where the library is missing, UsageError for a weight that does not fit its spec.
    """

    _handle: int | None = None

    def __init__(
        self,
        programs: ProgramSet,
        weights: Mapping[str, Weight],
        *,
        threads: int | None = None,
        kv_dtype: str = "f16",
        isa: str | None = None,
    ) -> None:
        elements = element_type(kv_dtype)
        programs = code_state(programs, kv_dtype)
        if threads is not None and threads < 1:
            raise UsageError(f"{threads} threads; at least 1 is needed", param="threads")
        self._lib = library()
        self._programs, self._kv_dtype, self._kv_number = programs, kv_dtype, _KV_NUMBERS[elements]
        self._kept = self._gather(programs, weights)
        self._numbers = {name: i for i, name in enumerate(programs.programs)}
        self._groups = {group.name: i for i, group in enumerate(programs.groups)}
        self._steps = {
            name: NativeSteps(self._lib, step_rules(programs, name), list(self._groups)) for name in programs.programs
        }
        self._adapters: dict[int, list[Packed]] = {}  # slot -> what the library points into
        level = isa.encode() if isa else None
        name = self._lib.ih_isa_name(level)
        if name is None:
            raise UnsupportedError(last_error(self._lib), remedy="Leave INHOUSE_ISA unset to take the best level")
        self._name = f"native/{name.decode()}"
        self._handle = self._create(level, threads or 0)
        self.allocate({})

    @staticmethod
    def _gather(programs: ProgramSet, weights: Mapping[str, Weight]) -> dict[str, Weight]:
        """Weights and constants by name, each proven to fit its spec."""
        for name, spec in programs.weights.items():
            if name not in weights:
                raise UsageError(f"the weight {name!r} is missing", param=name)
            if tuple(weights[name].shape) != tuple(spec.shape):
                raise UsageError(f"weight {name!r} has shape {weights[name].shape}, needs {spec.shape}", param=name)
        kept: dict[str, Weight] = {name: weights[name] for name in programs.weights}
        for name, array in programs.constants.items():
            plain = np.ascontiguousarray(array, np.float32)
            kept[name] = pack_float(plain, "f32") if plain.ndim == 2 else plain
        return kept

    def _create(self, isa: bytes | None, threads: int) -> int:
        flat = flatten(self._programs, list(self._kept))
        entries = [_c_weight(name, weight) for name, weight in self._kept.items()]
        array = (CWeight * len(entries))(*entries)
        status = ctypes.c_int32()
        handle = self._lib.ih_model_create(
            pointer(flat), flat.size, array, len(entries), isa, threads, self._kv_number, ctypes.byref(status)
        )
        check(self._lib, status.value)
        return int(handle)

    @property
    def name(self) -> str:
        return self._name

    @property
    def programs(self) -> ProgramSet:
        return self._programs

    @property
    def kv_dtype(self) -> str:
        return self._kv_dtype

    @property
    def nbytes(self) -> int:
        """Bytes of buffers and state that the executor holds now, weights apart."""
        return int(self._lib.ih_model_bytes(self._open()))

    def _open(self) -> int:
        if self._handle is None:
            raise UsageError("the executor is closed")
        return self._handle

    def _group(self, group: str) -> int:
        self._programs.group(group)
        return self._groups[group]

    def allocate(self, blocks: Mapping[str, int]) -> None:
        """See Executor.allocate."""
        counts = {name: int(blocks.get(name, 0)) for name in self._groups}
        array = (ctypes.c_int64 * max(len(counts), 1))(*counts.values())
        for steps in self._steps.values():
            steps.allocated({})
        check(self._lib, self._lib.ih_state_allocate(self._open(), array))
        for steps in self._steps.values():
            steps.allocated(counts)

    def reserve(self, rows: int, sampled: int, sequences: int) -> None:
        """See Executor.reserve; pages that no step has touched take no memory yet."""
        check(self._lib, self._lib.ih_reserve(self._open(), rows, sampled, sequences))

    def run(self, program: str, step: Step) -> Mapping[str, F32]:
        """See Executor.run."""
        require(self._programs, program)
        c_step = self._steps[program].make(step)
        check_slots(step.adapters, self._adapters)
        which = self._programs.programs[program]
        outputs = (COutput * max(len(which.outputs), 1))()
        status = self._lib.ih_run(self._open(), self._numbers[program], ctypes.byref(c_step), outputs)
        check(self._lib, status)
        return {role: _view(self, output) for role, output in zip(which.outputs, outputs, strict=False)}

    def op_seconds(self, program: str) -> npt.NDArray[np.float64]:
        """Seconds that each op of the program took since the last call; the first call begins to measure.

        Row-wise ops that follow each other run as one and count for the first of them.
        """
        require(self._programs, program)
        times = np.zeros(len(self._programs.programs[program].ops), np.int64)
        check(self._lib, self._lib.ih_op_times(self._open(), self._numbers[program], pointer(times), times.size))
        return times.astype(np.float64) * 1e-9

    def set_adapter(self, slot: int, adapter: Adapter | None) -> None:
        """See Executor.set_adapter."""
        checked = check_adapter(self._programs, slot, adapter or {})
        numbers = {name: i for i, name in enumerate(self._kept)}
        tiles = [pack_float(m, "f32") for low in checked.values() for m in (low.a, low.b)]
        entries = [
            CAdapterPair(numbers[name], 0, _c_weight(name, a), _c_weight(name, b))
            for name, a, b in zip(checked, tiles[::2], tiles[1::2], strict=True)
        ]
        array = (CAdapterPair * max(len(entries), 1))(*entries)
        check(self._lib, self._lib.ih_set_adapter(self._open(), slot, array, len(entries)))
        self._adapters.pop(slot, None)
        if entries:
            self._adapters[slot] = tiles

    def copy_blocks(self, group: str, source: I32, target: I32) -> None:
        """See Executor.copy_blocks."""
        source, target = np.ascontiguousarray(source, np.int32), np.ascontiguousarray(target, np.int32)
        if source.shape != target.shape or source.ndim != 1:
            raise UsageError(f"{source.shape} source blocks for {target.shape} targets")
        number = self._group(group)
        status = self._lib.ih_copy_blocks(self._open(), number, pointer(source), pointer(target), source.size)
        check(self._lib, status)

    def read_blocks(self, group: str, blocks: I32) -> npt.NDArray[np.uint8]:
        """See Executor.read_blocks."""
        number, blocks = self._group(group), np.ascontiguousarray(blocks, np.int32)
        size = self._lib.ih_block_bytes(self._open(), number)
        data = np.empty((blocks.size, size), np.uint8)
        status = self._lib.ih_read_blocks(self._open(), number, pointer(blocks), blocks.size, pointer(data))
        check(self._lib, status)
        return data

    def write_blocks(self, group: str, blocks: I32, data: npt.NDArray[np.uint8]) -> None:
        """See Executor.write_blocks."""
        number, blocks = self._group(group), np.ascontiguousarray(blocks, np.int32)
        size = self._lib.ih_block_bytes(self._open(), number)
        data = np.ascontiguousarray(data, np.uint8)
        if data.shape != (blocks.size, size):
            raise UsageError(f"blocks need data of shape {(blocks.size, size)}, got {data.shape}")
        status = self._lib.ih_write_blocks(self._open(), number, pointer(blocks), blocks.size, pointer(data))
        check(self._lib, status)

    def close(self) -> None:
        """See Executor.close; closing twice is allowed."""
        if self._handle is not None:
            self._lib.ih_model_destroy(self._handle)
            self._handle = None

    def __del__(self) -> None:
        self.close()


class _Buffer:
    """A run of the library's floats as numpy takes it; keeps the executor that owns them."""

    def __init__(self, owner: NativeExecutor, address: int, rows: int, width: int) -> None:
        self._owner = owner
        self.__array_interface__ = {"version": 3, "typestr": "<f4", "shape": (rows, width), "data": (address, False)}


def _view(owner: NativeExecutor, output: COutput) -> F32:
    """The library's buffer as an array, float32 [rows, width]."""
    if output.rows == 0:
        return np.zeros((0, output.width), np.float32)
    return np.asarray(_Buffer(owner, output.data, output.rows, output.width))
