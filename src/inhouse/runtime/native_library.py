"""C signatures of libinhouse's model functions, and its statuses as our errors. Knows no Programs."""

import ctypes
from ctypes import POINTER, c_char_p, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

from inhouse.core.errors import CapacityError, ExecutorError, InhouseError, UnsupportedError, UsageError
from inhouse.runtime.library import last_error, library_path, load_library


class CWeight(ctypes.Structure):
    """`ih_weight`."""

    _fields_ = [
        ("format", c_int32),
        ("reserved", c_int32),
        ("out", c_int64),
        ("in_", c_int64),
        ("data", c_void_p),
        ("bytes", c_int64),
    ]


class CStep(ctypes.Structure):
    """`ih_step`."""

    _fields_ = [
        ("rows", c_int64),
        ("sequences", c_int64),
        ("sampled", c_int64),
        ("tokens", c_void_p),
        ("positions", c_void_p),
        ("sequence_of", c_void_p),
        ("lengths", c_void_p),
        ("sampled_rows", c_void_p),
        ("tables", POINTER(c_void_p)),
        ("table_widths", POINTER(c_int64)),
        ("types", c_void_p),
        ("prefixes", c_void_p),
        ("encoder_lengths", c_void_p),
        ("adapters", c_void_p),
    ]


class CStepGroup(ctypes.Structure):
    """`ih_step_group`."""

    _fields_ = [
        ("index", c_int32),
        ("cross", c_int32),
        ("window", c_int64),
        ("blocks", c_int64),
        ("sink", c_int64),
        ("stride", c_int64),
    ]


class CStepRules(ctypes.Structure):
    """`ih_step_rules`."""

    _fields_ = [
        ("vocab_size", c_int64),
        ("context_length", c_int64),
        ("types", c_int64),
        ("group_count", c_int64),
        ("groups", POINTER(CStepGroup)),
    ]


class CAdapterPair(ctypes.Structure):
    """`ih_adapter_pair`."""

    _fields_ = [("weight", c_int32), ("reserved", c_int32), ("a", CWeight), ("b", CWeight)]


class COutput(ctypes.Structure):
    """`ih_output`."""

    _fields_ = [("data", c_void_p), ("rows", c_int64), ("width", c_int64)]


_SIGNATURES = {
    "ih_isa_name": (c_char_p, [c_char_p]),
    "ih_isa_available": (c_char_p, [c_int32]),
    "ih_default_threads": (c_int32, []),
    "ih_model_create": (
        c_void_p,
        [c_void_p, c_int64, POINTER(CWeight), c_int64, c_char_p, c_int32, c_int32, POINTER(c_int32)],
    ),
    "ih_model_destroy": (None, [c_void_p]),
    "ih_model_bytes": (c_int64, [c_void_p]),
    "ih_op_times": (c_int32, [c_void_p, c_int32, c_void_p, c_int64]),
    "ih_reserve": (c_int32, [c_void_p, c_int64, c_int64, c_int64]),
    "ih_state_allocate": (c_int32, [c_void_p, POINTER(c_int64)]),
    "ih_block_bytes": (c_int64, [c_void_p, c_int32]),
    "ih_copy_blocks": (c_int32, [c_void_p, c_int32, c_void_p, c_void_p, c_int64]),
    "ih_read_blocks": (c_int32, [c_void_p, c_int32, c_void_p, c_int64, c_void_p]),
    "ih_write_blocks": (c_int32, [c_void_p, c_int32, c_void_p, c_int64, c_void_p]),
    "ih_set_adapter": (c_int32, [c_void_p, c_int32, POINTER(CAdapterPair), c_int64]),
    "ih_step_fits": (c_int32, [POINTER(CStepRules), POINTER(CStep)]),
    "ih_run": (c_int32, [c_void_p, c_int32, POINTER(CStep), POINTER(COutput)]),
    "ih_guard_add": (c_int64, [c_void_p, c_int64]),
    "ih_guard_damaged": (c_int32, [c_int64]),
    "ih_guard_remove": (None, [c_int64]),
}

_ERRORS: dict[int, type[InhouseError]] = {1: UsageError, 2: UnsupportedError, 3: CapacityError, 4: ExecutorError}
_REMEDIES = {
    3: "Ask for less context or fewer sequences, or free memory",
    4: "The model file changed or was truncated under us: restore it and load the model again",
}


@cache
def _declared(path: Path) -> ctypes.CDLL:
    lib = load_library(path)
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(lib, name)
        function.restype = result
        function.argtypes = arguments
    return lib


def library() -> ctypes.CDLL:
    """The native library with its model functions declared; raises UnavailableError as `load_library` does."""
    return _declared(library_path())


def check(lib: ctypes.CDLL, status: int) -> None:
    """Raises the error that a status stands for; 0 is none."""
    if status:
        raise _ERRORS.get(status, ExecutorError)(last_error(lib), remedy=_REMEDIES.get(status, ""))


def available_levels() -> list[str]:
    """Instruction set levels that this machine can run, lowest first."""
    lib, levels = library(), list[str]()
    while (name := lib.ih_isa_available(len(levels))) is not None:
        levels.append(name.decode())
    return levels


def default_threads() -> int:
    """Threads of a step where none are asked for: $INHOUSE_THREADS, else the CPUs this process may use."""
    return int(library().ih_default_threads())
