"""The torch executor: the Programs on any torch device. The truth that tests compare with, and what training and
compression run on. Paged state is in `torch_cache`, whole sequences in `torch_dense`, the operations in `torch_ops`."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from inhouse.core.errors import CapacityError, ExecutorError, InhouseError, UnsupportedError, UsageError
from inhouse.runtime.adapters import Adapter, check_adapter, check_slots
from inhouse.runtime.executor import F32, Weight, require
from inhouse.runtime.kv_codes import code_state, element_type
from inhouse.runtime.packed import Packed
from inhouse.runtime.program import Program, ProgramSet
from inhouse.runtime.step import I32, Step, check_step, step_rules
from inhouse.runtime.torch_cache import CodedCache, GroupCache, StepRows
from inhouse.runtime.torch_dense import forward
from inhouse.runtime.torch_program import Observe, evaluate

DTYPES: Mapping[str, torch.dtype] = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def to_torch(
    weights: Mapping[str, Weight], device: str | torch.device = "cpu", dtype: str = "f32"
) -> dict[str, Tensor]:
    """Weights as tensors on `device`: matrices in `dtype`, vectors in float32 (norms and biases are small, and
    norms are computed in float32). Packed matrices are dequantised; with `f32` that is exact."""
    out: dict[str, Tensor] = {}
    for name, weight in weights.items():
        array = weight.dequantize() if isinstance(weight, Packed) else weight
        tensor = torch.from_numpy(np.array(array, np.float32))
        out[name] = tensor.to(device, _dtype(dtype, "dtype") if tensor.dim() > 1 else torch.float32)
    return out


def _dtype(name: str, what: str) -> torch.dtype:
    if name not in DTYPES:
        raise UnsupportedError(f"the torch executor has no {what} {name!r}; it has {', '.join(DTYPES)}", param=what)
    return DTYPES[name]


class TorchExecutor:
    """Implements `runtime.executor.Executor` on a torch device.

    Args:
        programs: the model's Programs; those that a rewrite gave run too.
        weights: canonical name -> packed matrix or float32 vector; every name that the Programs list.
        device: any torch device (`cpu`, `cuda`, `cuda:1`, `mps`).
        kv_dtype: type of the cached K and V, one of KV_TYPES (runtime/kv_codes.py).
        dtype: type of matrices and activations: `f32`, `bf16` or `f16`.

    Raises:
        UsageError: a weight is missing or has another shape. UnsupportedError: no such dtype.
    """

    def __init__(
        self,
        programs: ProgramSet,
        weights: Mapping[str, Weight],
        *,
        device: str = "cpu",
        kv_dtype: str = "f32",
        dtype: str = "f32",
    ) -> None:
        self._elements = element_type(kv_dtype)
        programs = code_state(programs, kv_dtype)
        for spec in programs.weights.values():
            if spec.name not in weights or tuple(weights[spec.name].shape) != spec.shape:
                found = tuple(weights[spec.name].shape) if spec.name in weights else "nothing"
                raise UsageError(f"weight {spec.name} should have the shape {spec.shape}, found {found}")
        self._programs, self._kv_dtype, self._device = programs, kv_dtype, torch.device(device)
        self._rules = {name: step_rules(programs, name) for name in programs.programs}
        given = {name: weights[name] for name in programs.weights}
        self._weights = to_torch(given, self._device, dtype) | to_torch(programs.constants, self._device)
        self._adapters: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}
        self._caches: dict[str, GroupCache | CodedCache] = {}
        self._blocks: dict[str, int] = {}

    @property
    def name(self) -> str:
        return f"torch/{self._device}"

    @property
    def programs(self) -> ProgramSet:
        return self._programs

    @property
    def kv_dtype(self) -> str:
        return self._kv_dtype

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The weights and constants as they lie on the device, by canonical name."""
        return self._weights

    def allocate(self, blocks: Mapping[str, int]) -> None:
        """See Executor.allocate."""
        self._caches, self._blocks = {}, {}
        dtype = torch.int8 if self._elements == "int8" else DTYPES[self._elements]
        try:
            for group in self._programs.groups:
                count = blocks.get(group.name, 0)
                coded = CodedCache(group, count, self._device) if group.k_bits else None
                self._caches[group.name] = coded or GroupCache(group, count, dtype, self._device)
                self._blocks[group.name] = count
        except (RuntimeError, MemoryError) as error:
            self._caches, self._blocks = {}, {}
            raise CapacityError(f"no memory for {dict(blocks)} blocks of state: {error}") from error

    def reserve(self, rows: int, sampled: int, sequences: int) -> None:
        """Nothing to do: torch makes each tensor of a step when it is needed and keeps what it freed."""

    def run(self, program: str, step: Step) -> Mapping[str, F32]:
        """See Executor.run."""
        require(self._programs, program)
        check_step(self._rules[program], step, self._blocks)
        check_slots(step.adapters, self._adapters)
        try:
            with torch.inference_mode():
                rows = StepRows(step, self._caches, self._device, self._adapters)
                outputs = evaluate(self._programs.programs[program], self._weights, rows)
                return {role: tensor.float().cpu().numpy() for role, tensor in outputs.items()}
        except InhouseError:
            raise
        except (RuntimeError, MemoryError, IndexError) as error:  # torch reports out of memory as RuntimeError
            raise ExecutorError(f"the step of {step.tokens.size} tokens failed on {self.name}: {error}") from error

    def set_adapter(self, slot: int, adapter: Adapter | None) -> None:
        """See Executor.set_adapter."""
        checked = check_adapter(self._programs, slot, adapter or {})
        self._adapters.pop(slot, None)
        if checked:
            self._adapters[slot] = {
                name: (torch.from_numpy(low.a).to(self._device), torch.from_numpy(low.b).to(self._device))
                for name, low in checked.items()
            }

    def forward(
        self,
        program: str | Program,
        tokens: Tensor,
        weights: Mapping[str, Tensor] | None = None,
        *,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        rows: Tensor | None = None,
        observe: Observe | None = None,
    ) -> dict[str, Tensor]:
        """`torch_dense.forward` with this executor's weights, those in `weights` taking their place by name."""
        if isinstance(program, str):
            require(self._programs, program)
            program = self._programs.programs[program]
        together = self._weights if weights is None else self._weights | dict(weights)
        return forward(program, tokens, together, positions=positions, segments=segments, rows=rows, observe=observe)

    def copy_blocks(self, group: str, source: I32, target: I32) -> None:
        """See Executor.copy_blocks."""
        self._cache(group).copy(self._ids(group, source), self._ids(group, target))

    def read_blocks(self, group: str, blocks: I32) -> npt.NDArray[np.uint8]:
        """See Executor.read_blocks."""
        return self._cache(group).save(self._ids(group, blocks))

    def write_blocks(self, group: str, blocks: I32, data: npt.NDArray[np.uint8]) -> None:
        """See Executor.write_blocks."""
        self._cache(group).restore(self._ids(group, blocks), data)

    def close(self) -> None:
        """See Executor.close."""
        self._caches, self._blocks, self._weights = {}, {}, {}

    def _cache(self, group: str) -> GroupCache | CodedCache:
        self._programs.group(group)
        if group not in self._caches:
            raise UsageError(f"no blocks are allocated in state group {group!r}", remedy="Call allocate first")
        return self._caches[group]

    def _ids(self, group: str, blocks: I32) -> Tensor:
        count = self._blocks.get(group, 0)
        if blocks.size and not (0 <= int(blocks.min()) and int(blocks.max()) < count):
            raise UsageError(f"block ids {int(blocks.min())}..{int(blocks.max())} of {group}, allowed 0..{count - 1}")
        return torch.from_numpy(blocks.astype(np.int64)).to(self._device)
