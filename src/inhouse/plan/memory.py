"""Bytes: what weights, state, activations and workspace take, and how many blocks of state fit.

The engine allocates state by it: exactly, down to the byte, for the blocks; what a step needs beside them (activations
and workspace) is estimated, so that it is left free before state takes its share. Knows Programs and the machine's
memory; allocates nothing.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from inhouse.core.errors import CapacityError
from inhouse.runtime.executor import KV_DTYPES, Weight
from inhouse.runtime.kv_codes import element_type
from inhouse.runtime.packed import Packed
from inhouse.runtime.program import Axis, DType, Program, ProgramSet, StateGroup
from inhouse.runtime.step import BLOCK_SIZE, static_blocks

STATE_SHARE = 0.6  # of the memory left beside a step's own that state may take when no budget is given
CGROUP = Path("/sys/fs/cgroup")


def weight_bytes(weights: Mapping[str, Weight]) -> int:
    """Bytes of all weights; two names for the same memory (a tied embedding) count once."""
    arrays = [w.data if isinstance(w, Packed) else w for w in weights.values()]
    return sum({(a.ctypes.data, a.nbytes): a.nbytes for a in arrays}.values())


def block_bytes(group: StateGroup, kv_dtype: str) -> int:
    """Bytes of one block of a state group, over all its layers."""
    return group.bytes_per_token(KV_DTYPES[element_type(kv_dtype)]) * BLOCK_SIZE


def token_bytes(programs: ProgramSet, kv_dtype: str) -> int:
    """Bytes that one more token of a long sequence takes; what is kept of recent positions alone does not grow."""
    growing = [group for group in programs.groups if not group.window]
    return sum(group.bytes_per_token(KV_DTYPES[element_type(kv_dtype)]) for group in growing)


def blocks_per_sequence(group: StateGroup, context: int, step_tokens: int) -> int:
    """Blocks that one sequence of `context` tokens holds at most; a window group holds its window, one step, and what
    it keeps for good."""
    whole = -(-context // BLOCK_SIZE)
    if not group.window:
        return whole
    static = int(static_blocks(np.arange(whole), group.sink, group.stride).sum())
    return min(whole, -(-(group.window + step_tokens) // BLOCK_SIZE) + 1 + static)


@dataclass(frozen=True, slots=True)
class Shares:
    """The state groups of a model, by who holds them."""

    own: tuple[StateGroup, ...]  # grow with each sequence
    cross: tuple[StateGroup, ...]  # written by `encode`, read by sequences with that input
    scratch: tuple[StateGroup, ...]  # used within one step of a Program that runs inputs whole


def share_groups(programs: ProgramSet) -> Shares:
    """Which group is what: own and cross are those that `step` names, all others are scratch."""
    step = programs.programs.get("step")
    ops = step.ops if step else ()
    cross = {op.attrs["group"] for op in ops if op.attrs.get("cross")}
    named = {op.attrs.get(name) for op in ops for name in ("group", "recent")}
    own = named - cross - {None, ""}
    return Shares(
        tuple(g for g in programs.groups if g.name in own),
        tuple(g for g in programs.groups if g.name in cross),
        tuple(g for g in programs.groups if g.name not in own | cross),
    )


def scratch_tokens(context: int, step_tokens: int) -> int:
    """Positions of a scratch group: those of one step, which may be one input as long as the context."""
    return max(context, step_tokens) + BLOCK_SIZE * 64  # each input of a step leaves part of a block


def sequence_bytes(programs: ProgramSet, kv_dtype: str, context: int, step_tokens: int) -> int:
    """Bytes of state of one sequence of `context` tokens, and as many of encoder input."""
    shares = share_groups(programs)
    groups = (*shares.own, *shares.cross)
    return sum(blocks_per_sequence(g, context, step_tokens) * block_bytes(g, kv_dtype) for g in groups)


def scratch_blocks(programs: ProgramSet, context: int, step_tokens: int) -> dict[str, int]:
    """Blocks of each scratch group; whatever the number of sequences."""
    tokens = scratch_tokens(context, step_tokens)
    return {g.name: -(-tokens // BLOCK_SIZE) for g in share_groups(programs).scratch}


def _scratch_bytes(programs: ProgramSet, kv_dtype: str, context: int, step_tokens: int) -> int:
    blocks = scratch_blocks(programs, context, step_tokens)
    return sum(count * block_bytes(programs.group(name), kv_dtype) for name, count in blocks.items())


def context_for(programs: ProgramSet, kv_dtype: str, budget: int, step_tokens: int) -> int:
    """The longest context, at most the model's own, of which one sequence fits `budget` bytes; whole blocks."""
    low, high = 0, -(-programs.context_length // BLOCK_SIZE)
    while low < high:
        middle = (low + high + 1) // 2
        tokens = middle * BLOCK_SIZE
        one = sequence_bytes(programs, kv_dtype, tokens, step_tokens)
        fits = one + _scratch_bytes(programs, kv_dtype, tokens, step_tokens) <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    return min(low * BLOCK_SIZE, programs.context_length)


def activation_bytes(programs: ProgramSet, step_tokens: int, logit_rows: int) -> int:
    """Bytes of the values that live at once, in the worst op of any Program; S and N axes have logit_rows rows."""
    return max((_peak(p, step_tokens, logit_rows) for p in programs.programs.values()), default=0)


def _peak(program: Program, tokens: int, others: int) -> int:
    """The largest sum of live values while the program runs (a value lives from its op to its last use)."""
    top_k = max((int(op.attrs["top_k"]) for op in program.ops if op.kind == "route"), default=0)
    sizes = {Axis.TOKENS: tokens, Axis.ROUTED: tokens * top_k}
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
    shares = share_groups(programs)
    each = {g.name: blocks_per_sequence(g, context, step_tokens) for g in (*shares.own, *shares.cross)}
    one = sequence_bytes(programs, kv_dtype, context, step_tokens)
    scratch = _scratch_bytes(programs, kv_dtype, context, step_tokens)
    if one + scratch > budget:
        raise CapacityError(
            f"one sequence of {context} tokens needs {one + scratch} bytes of state ({kv_dtype}), "
            f"the budget is {budget}",
            remedy="Lower the context length, choose a smaller KV type, or free memory",
            needed=one + scratch,
            budget=budget,
        )
    share = min((budget - scratch) / one, sequences) if one else sequences
    grown = {name: max(int(share * blocks), blocks) for name, blocks in each.items()}
    return grown | scratch_blocks(programs, context, step_tokens)


def default_kv_budget(programs: ProgramSet, step_tokens: int, logit_rows: int, share: float = STATE_SHARE) -> int:
    """Bytes for state when the user names none: a share of what is available now (weights are mapped already) less
    what a step of `step_tokens` tokens with `logit_rows` rows of logits needs."""
    needed = activation_bytes(programs, step_tokens, logit_rows) + workspace_bytes(step_tokens, threads_available())
    return int(max(available_bytes() - needed, 0) * share)


def threads_available() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
