"""Bytes: what weights, state, activations and workspace take, and how many blocks of state fit.

The engine allocates state by it: exactly, down to the byte, for the blocks; what a step needs beside them (activations
and workspace) is estimated, so that it is left free before state takes its share. Knows Programs and the machine's
memory; allocates nothing.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import psutil

from inhouse.core.errors import CapacityError
from inhouse.runtime.executor import KV_DTYPES, Weight
from inhouse.runtime.packed import Packed
from inhouse.runtime.program import Axis, DType, Program, ProgramSet, StateGroup
from inhouse.runtime.step import BLOCK_SIZE

STATE_SHARE = 0.6  # of the memory left beside a step's own that state may take when no budget is given
CGROUP = Path("/sys/fs/cgroup")


def weight_bytes(weights: Mapping[str, Weight]) -> int:
    """Bytes of all weights; two names for the same memory (a tied embedding) count once."""
    arrays = [w.data if isinstance(w, Packed) else w for w in weights.values()]
    return sum({(a.ctypes.data, a.nbytes): a.nbytes for a in arrays}.values())


def block_bytes(group: StateGroup, kv_dtype: str) -> int:
    """Bytes of one block of a state group, over all its layers."""
    return group.bytes_per_token(KV_DTYPES[kv_dtype]) * BLOCK_SIZE


def blocks_per_sequence(group: StateGroup, context: int, step_tokens: int) -> int:
    """Blocks that one sequence of `context` tokens holds at most; a window group holds its window and one step."""
    whole = -(-context // BLOCK_SIZE)
    if not group.window:
        return whole
    return min(whole, -(-(group.window + step_tokens) // BLOCK_SIZE) + 1)


def sequence_bytes(programs: ProgramSet, kv_dtype: str, context: int, step_tokens: int) -> int:
    """Bytes of state of one sequence of `context` tokens."""
    return sum(blocks_per_sequence(g, context, step_tokens) * block_bytes(g, kv_dtype) for g in programs.groups)


def context_for(programs: ProgramSet, kv_dtype: str, budget: int, step_tokens: int) -> int:
    """The longest context, at most the model's own, of which one sequence fits `budget` bytes; whole blocks."""
    low, high = 0, -(-programs.context_length // BLOCK_SIZE)
    while low < high:
        middle = (low + high + 1) // 2
        fits = sequence_bytes(programs, kv_dtype, middle * BLOCK_SIZE, step_tokens) <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    return min(low * BLOCK_SIZE, programs.context_length)


def activation_bytes(programs: ProgramSet, step_tokens: int, logit_rows: int) -> int:
    """Bytes of the values that live at once, in the worst op of any Program; S and N axes have logit_rows rows."""
    sizes = {Axis.TOKENS: step_tokens, Axis.ROUTED: step_tokens}
    return max((_peak(p, sizes, logit_rows) for p in programs.programs.values()), default=0)


def _peak(program: Program, sizes: Mapping[Axis, int], others: int) -> int:
    """The largest sum of live values while the program runs (a value lives from its op to its last use)."""
    last = {value.id: i for i, op in enumerate(program.ops) for value in (*op.inputs, *op.outputs)}
    last |= {value.id: len(program.ops) for value in program.outputs.values()}
    live: dict[int, int] = {}
    peak = 0
    for i, op in enumerate(program.ops):
        for value in op.outputs:
            element = 4 if value.dtype is DType.F32 else 1
            live[value.id] = sizes.get(value.axis, others) * value.width * element
        peak = max(peak, sum(live.values()))
        live = {key: size for key, size in live.items() if last[key] > i}
    return peak


def workspace_bytes(step_tokens: int, threads: int) -> int:
    """Bytes that kernels use beside values: each thread's attention partials and quantised rows."""
    return threads * (2 << 20) + step_tokens * 4096


def available_bytes(cgroup: Path = CGROUP) -> int:
    """Memory that this process may still take: what the machine has available, or less where its cgroup says so."""
    available = int(psutil.virtual_memory().available)
    limits = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
    for limit, usage in limits:
        allowed, used = _read_bytes(cgroup / limit), _read_bytes(cgroup / usage)
        if allowed is not None and used is not None:
            available = min(available, max(allowed - used, 0))
    return available


def _read_bytes(path: Path) -> int | None:
    """The number in a cgroup file; None if there is none ("max", or no such file)."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def kv_blocks_for(
    programs: ProgramSet, kv_dtype: str, budget: int, *, context: int, sequences: int, step_tokens: int
) -> dict[str, int]:
    """Blocks of each state group within `budget` bytes, in the proportion in which sequences of `context` use them,
    and no more than `sequences` of them need. Raises CapacityError if not even one sequence fits."""
    each = {g.name: blocks_per_sequence(g, context, step_tokens) for g in programs.groups}
    one = sequence_bytes(programs, kv_dtype, context, step_tokens)
    if one > budget:
        raise CapacityError(
            f"one sequence of {context} tokens needs {one} bytes of state ({kv_dtype}), the budget is {budget}",
            remedy="Lower the context length, choose a smaller KV type, or free memory",
            needed=one,
            budget=budget,
        )
    share = min(budget / one, sequences) if one else sequences
    return {name: max(int(share * blocks), blocks) for name, blocks in each.items()}


def default_kv_budget(programs: ProgramSet, step_tokens: int, logit_rows: int, share: float = STATE_SHARE) -> int:
    """Bytes for state when the user names none: a share of what is available now (weights are mapped already) less
    what a step of `step_tokens` tokens with `logit_rows` rows of logits needs."""
    needed = activation_bytes(programs, step_tokens, logit_rows) + workspace_bytes(step_tokens, threads_available())
    return int(max(available_bytes() - needed, 0) * share)


def threads_available() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
