"""A Step as libinhouse takes it: copied, proven well formed, then pointers. Knows arrays; knows no Programs.

The library proves the values (`ih_step_fits`), because numpy takes ten times as long; `check_step` stays the
definition, and says what is wrong where the library says no.
"""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from inhouse.runtime.native_library import CStep, CStepGroup, CStepRules
from inhouse.runtime.step import I32, Step, StepRules, check_step

_INT32 = np.dtype(np.int32)


def pointer(array: npt.NDArray[np.generic]) -> int:
    """The address of an array's first element."""
    return array.ctypes.data


class NativeSteps:
    """Makes the library's steps of one Program.

    Args:
        groups: names of the model's state groups, in the library's order.
    """

    def __init__(self, lib: ctypes.CDLL, rules: StepRules, groups: Sequence[str]) -> None:
        self._lib, self._rules, self._groups = lib, rules, list(groups)
        self._named = [group.name for group in (*rules.groups, *rules.cross)]
        self._places = [self._groups.index(name) for name in self._named]
        count = max(len(self._groups), 1)
        self._pointers, self._widths = (ctypes.c_void_p * count)(), (ctypes.c_int64 * count)()
        self._arena, self._address, self._used = np.zeros(0, np.int32), 0, 0
        self._blocks: dict[str, int] = {}
        self._native = self._native_rules({})

    def allocated(self, blocks: Mapping[str, int]) -> None:
        """What was allocated in each state group."""
        self._blocks = dict(blocks)
        self._native = self._native_rules(blocks)

    def _native_rules(self, blocks: Mapping[str, int]) -> CStepRules:
        rules = self._rules
        named = [(group, 0) for group in rules.groups] + [(replace(group, window=0), 1) for group in rules.cross]
        entries = [
            CStepGroup(
                self._groups.index(group.name), cross, group.window, blocks.get(group.name, 0), group.sink, group.stride
            )
            for group, cross in named
        ]
        array = (CStepGroup * max(len(entries), 1))(*entries)
        return CStepRules(rules.vocab_size, rules.context_length, rules.types, len(entries), array)

    def make(self, step: Step) -> CStep:
        """The step's pointers, valid until the next `make`. Raises UsageError as `check_step` does."""
        rows, count, sampled = step.tokens.size, step.lengths.size, step.sampled.size
        of_rows = (step.tokens, step.positions, step.sequences, step.types)
        of_sequences = (step.lengths, step.prefixes, step.encoder_lengths, step.adapters)
        if not (_vectors(of_rows, rows) and _vectors(of_sequences, count) and _vectors((step.sampled,), sampled)):
            self._refuse(step)
        tables = [step.tables[name] if name in step.tables else None for name in self._named]
        if any(table is None or not _is_table(table, count) for table in tables):
            self._refuse(step)
        self._room(4 * rows + 4 * count + sampled + sum(table.size for table in tables if table is not None))
        at = [self._copy(array) for array in (*of_rows, *of_sequences, step.sampled)]
        for place, table in zip(self._places, tables, strict=True):
            assert table is not None
            self._pointers[place], self._widths[place] = self._copy(table), table.shape[1]
        tokens, positions, sequences, types, lengths, prefixes, encoder_lengths, adapters, rows_of_logits = at
        made = CStep(
            rows, count, sampled, tokens, positions, sequences, lengths, rows_of_logits, self._pointers, self._widths,
            types, prefixes, encoder_lengths, adapters,
        )  # fmt: skip
        if not self._lib.ih_step_fits(self._native, made):
            self._refuse(step)
        return made

    def _room(self, entries: int) -> None:
        """Begins the arena anew, large enough for so many entries."""
        if entries > self._arena.size:
            self._arena = np.zeros(2 * entries, np.int32)
            self._address = self._arena.ctypes.data
        self._used = 0

    def _copy(self, array: I32) -> int:
        """Appends an array to the arena; its address there. numpy takes longer to say where an array lies than to copy
        a short one."""
        begin, self._used = self._used, self._used + array.size
        self._arena[begin : self._used] = array.reshape(-1)
        return self._address + 4 * begin

    def _refuse(self, step: Step) -> NoReturn:
        check_step(self._rules, step, self._blocks)
        raise AssertionError("the library refuses a step that check_step lets pass")


def _vectors(arrays: Sequence[I32], size: int) -> bool:
    return all(a.dtype == _INT32 and a.ndim == 1 and a.size == size and a.flags.c_contiguous for a in arrays)


def _is_table(table: I32, count: int) -> bool:
    return table.dtype == _INT32 and table.ndim == 2 and len(table) == count and table.flags.c_contiguous
