"""A pickle machine that can build tensors records and plain values, and nothing else.

It runs no code of the file and resolves no import: a global is a word looked up in the table below, and a call
is one of six pure functions of this page. Any other global, opcode or call is an error on sight, used or not.
Knows pickle protocols 2 to 5 as torch.save writes them; does not know files nor where storages lie.
Source: CPython's pickletools (the opcodes), torch.serialization (what torch.save writes).
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from inhouse.core.errors import FormatError, UnsupportedError
from inhouse.store.dtypes import PLAIN_BYTES

MAX_PICKLE_BYTES = 256 << 20
MAX_OPS = 5_000_000  # about 60 a tensor; each op may cost 100 bytes, so half a GiB at most
MAX_MARKS = 64
MAX_INT_BYTES = 16
MAX_RANK = 64

DTYPES: Mapping[str, str] = MappingProxyType(
    {
        "bool": "BOOL",
        "uint8": "U8",
        "int8": "I8",
        "float8_e5m2": "F8_E5M2",
        "float8_e4m3fn": "F8_E4M3",
        "float8_e8m0fnu": "F8_E8M0",
        "int16": "I16",
        "uint16": "U16",
        "float16": "F16",
        "bfloat16": "BF16",
        "int32": "I32",
        "uint32": "U32",
        "float32": "F32",
        "complex64": "C64",
        "float64": "F64",
        "int64": "I64",
        "uint64": "U64",
    }
)
_STORAGES = MappingProxyType(
    {
        "BoolStorage": "BOOL",
        "ByteStorage": "U8",
        "CharStorage": "I8",
        "ShortStorage": "I16",
        "HalfStorage": "F16",
        "BFloat16Storage": "BF16",
        "IntStorage": "I32",
        "FloatStorage": "F32",
        "DoubleStorage": "F64",
        "LongStorage": "I64",
        "ComplexFloatStorage": "C64",
    }
)


@dataclass(frozen=True, slots=True)
class Symbol:
    """A global of the pickle, as a word; never the thing itself."""

    kind: str  # "call", "storage" or "dtype"
    name: str


@dataclass(frozen=True, slots=True)
class Storage:
    """Bytes that the file keeps under `key`: `nbytes` in all, of which a view takes `length` from `begin`."""

    key: str
    dtype: str
    nbytes: int
    begin: int
    length: int


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A tensor over a storage; `offset` and `stride` count elements of `dtype`."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _symbols() -> dict[tuple[str, str], Symbol]:
    table = {
        ("collections", "OrderedDict"): Symbol("call", "ordered_dict"),
        ("torch", "Size"): Symbol("call", "size"),
        ("torch._utils", "_rebuild_tensor"): Symbol("call", "tensor"),
        ("torch._utils", "_rebuild_tensor_v2"): Symbol("call", "tensor_v2"),
        ("torch._utils", "_rebuild_tensor_v3"): Symbol("call", "tensor_v3"),
        ("torch._utils", "_rebuild_parameter"): Symbol("call", "parameter"),
        ("torch.storage", "UntypedStorage"): Symbol("storage", "U8"),
    }
    table |= {("torch", name): Symbol("storage", dtype) for name, dtype in _STORAGES.items()}
    return table | {("torch", name): Symbol("dtype", dtype) for name, dtype in DTYPES.items()}


_GLOBALS = MappingProxyType(_symbols())


class Unpickler:
    """Reads one pickle from `data` at `start`; `at` is then just behind it. One object, one `load`."""

    def __init__(self, data: memoryview, start: int, file: str) -> None:
        self.at = start
        self.storages: dict[str, Storage] = {}
        self._data = data
        self._end = min(data.nbytes, start + MAX_PICKLE_BYTES)
        self._file = file
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """The pickled value: None, bool, int, float, str, bytes, tuple, list, dict, Symbol, TensorRecord.

        Raises FormatError for anything else, for damage and for hostile sizes.
        """
        for _ in range(MAX_OPS):
            code = self._u8()
            if code == 0x2E:  # STOP
                if len(self._stack) != 1 or self._marks:
                    raise self.error("the pickle ends with an unfinished value")
                return self._stack[0]
            step = _OPS.get(code)
            if step is None:
                raise self.error(f"pickle opcode 0x{code:02x} builds something other than tensors")
            step(self)
        raise self.error(f"a pickle of more than {MAX_OPS} operations")

    def error(self, cause: str) -> FormatError:
        return FormatError(
            f"{self._file}: {cause} (byte {self.at})",
            remedy="Only tensors are read from pickles; save the model as safetensors.",
        )

    # Bytes of the pickle.

    def take(self, nbytes: int) -> bytes:
        if nbytes > self._end - self.at:
            raise self.error(f"the pickle is cut short: {nbytes} bytes wanted, {self._end - self.at} left")
        begin = self.at
        self.at += nbytes
        return bytes(self._data[begin : self.at])

    def number(self, nbytes: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(nbytes), "little", signed=signed)

    def _u8(self) -> int:
        return self.take(1)[0]

    def text(self, nbytes: int) -> str:
        try:
            return self.take(nbytes).decode("utf-8")
        except UnicodeDecodeError:
            raise self.error("a pickled string is not UTF-8") from None

    def line(self) -> str:
        window = bytes(self._data[self.at : min(self._end, self.at + 256)])
        length = window.find(b"\n")
        if length < 0:
            raise self.error("a name in the pickle has no end within 256 bytes")
        text = self.text(length)
        self.at += 1
        return text

    # The stack: values above the last mark belong to the construct being built.

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        self._need(1)
        return self._stack.pop()

    def top(self) -> Any:
        self._need(1)
        return self._stack[-1]

    def _need(self, count: int) -> None:
        floor = self._marks[-1] if self._marks else 0
        if len(self._stack) - floor < count:
            raise self.error("the pickle takes more values than it made")

    def pop_many(self, count: int) -> tuple[Any, ...]:
        self._need(count)
        values = tuple(self._stack[len(self._stack) - count :])
        del self._stack[len(self._stack) - count :]
        return values

    def mark(self) -> None:
        if len(self._marks) >= MAX_MARKS:
            raise self.error(f"a pickle nested deeper than {MAX_MARKS}")
        self._marks.append(len(self._stack))

    def pop_mark(self) -> list[Any]:
        if not self._marks:
            raise self.error("the pickle closes a group that it never opened")
        floor = self._marks.pop()
        values = self._stack[floor:]
        del self._stack[floor:]
        return values

    def put(self, index: int) -> None:
        self._memo[index] = self.top()

    def memoize(self) -> None:
        self._memo[len(self._memo)] = self.top()

    def get(self, index: int) -> None:
        if index not in self._memo:
            raise self.error(f"the pickle recalls value {index}, which it never stored")
        self.push(self._memo[index])

    # Containers.

    def append(self, values: list[Any]) -> None:
        target = self.top()
        if type(target) is not list:
            raise self.error("the pickle appends to something that is not a list")
        target.extend(values)

    def set_items(self, values: list[Any]) -> None:
        target = self.top()
        if type(target) is not dict or len(values) % 2:
            raise self.error("the pickle sets items of something that is not a dict")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) is not str and not (type(key) is int and 0 <= key < 1 << 32):
                raise self.error("the pickle has a dict key that is neither a string nor a small number")
            target[key] = value

    def build(self) -> None:
        """State set on an object: torch keeps module versions as `_metadata` on a state dict, nothing else."""
        state = self.pop()
        if type(self.top()) is not dict or type(state) is not dict or state.keys() != {"_metadata"}:
            raise self.error("the pickle sets the state of an object")

    # Words and calls.

    def find_global(self, module: Any, name: Any) -> None:
        symbol = _GLOBALS.get((module, name)) if type(module) is str and type(name) is str else None
        if symbol is None:
            raise self.error(f"the pickle asks for {str(module)[:80]}.{str(name)[:80]}, which is not a tensor")
        self.push(symbol)

    def reduce(self) -> None:
        function, arguments = self.pop_many(2)
        if type(function) is not Symbol or function.kind != "call" or type(arguments) is not tuple:
            raise self.error("the pickle calls something that does not build a tensor")
        self.push(_CALLS[function.name](self, arguments))

    def persistent(self) -> None:
        """('storage', type, key, place, elements) and, in the legacy form, None or (key, offset, elements)."""
        saved = self.pop()
        if type(saved) is not tuple or len(saved) not in (5, 6) or saved[0] != "storage":
            raise self.error("the pickle refers to something that is not a storage")
        kind, key, _place, count = saved[1:5]
        if type(kind) is not Symbol or kind.kind != "storage" or type(key) is not str or not _is_size(count):
            raise self.error("the pickle describes a storage wrongly")
        itemsize = PLAIN_BYTES[kind.name]
        nbytes = count * itemsize
        begin, length = 0, nbytes
        if len(saved) == 6 and saved[5] is not None:
            view = saved[5]
            if type(view) is not tuple or len(view) != 3 or not _is_size(view[1]) or not _is_size(view[2]):
                raise self.error("the pickle describes the view of a storage wrongly")
            begin, length = view[1] * itemsize, view[2] * itemsize
        if begin + length > nbytes:
            raise self.error(f"the view of storage {key[:40]!r} goes beyond its {nbytes} bytes")
        storage = Storage(key, kind.name, nbytes, begin, length)
        if self.storages.setdefault(key, storage).nbytes != nbytes:
            raise self.error(f"storage {key[:40]!r} is given two sizes")
        self.push(storage)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _are_sizes(value: Any) -> bool:
    return type(value) is tuple and len(value) <= MAX_RANK and all(_is_size(item) for item in value)


def _tensor(machine: Unpickler, arguments: tuple[Any, ...], dtype: str | None = None) -> TensorRecord:
    if len(arguments) < 4:
        raise machine.error("a tensor is built from too few values")
    storage, offset, shape, stride = arguments[:4]
    if type(storage) is not Storage or not _is_size(offset) or not _are_sizes(shape) or not _are_sizes(stride):
        raise machine.error("a tensor is built from the wrong values")
    dtype = dtype or storage.dtype
    if len(shape) != len(stride):
        raise machine.error(f"a tensor has {len(shape)} sizes and {len(stride)} strides")
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if 0 not in shape and (last + 1) * PLAIN_BYTES[dtype] > storage.length:
        raise machine.error(f"a tensor of shape {shape} goes beyond its storage of {storage.length} bytes")
    return TensorRecord(storage, dtype, offset, shape, stride)


def _tensor_v2(machine: Unpickler, arguments: tuple[Any, ...]) -> TensorRecord:
    # (.., requires_grad, backward_hooks[, metadata]); hooks are always empty in a file, and are never run.
    if len(arguments) > 6 and arguments[6]:
        raise UnsupportedError("a tensor of the pickle is lazily conjugated or negated, which is not read")
    return _tensor(machine, arguments)


def _tensor_v3(machine: Unpickler, arguments: tuple[Any, ...]) -> TensorRecord:
    if len(arguments) < 7 or type(arguments[6]) is not Symbol or arguments[6].kind != "dtype":
        raise machine.error("a tensor is built without its dtype")
    if len(arguments) > 7 and arguments[7]:
        raise UnsupportedError("a tensor of the pickle is lazily conjugated or negated, which is not read")
    return _tensor(machine, arguments, arguments[6].name)


def _parameter(machine: Unpickler, arguments: tuple[Any, ...]) -> TensorRecord:
    if len(arguments) != 3 or type(arguments[0]) is not TensorRecord:
        raise machine.error("a parameter is built from something that is not a tensor")
    return arguments[0]


def _size(machine: Unpickler, arguments: tuple[Any, ...]) -> tuple[int, ...]:
    if len(arguments) != 1 or not _are_sizes(arguments[0]):
        raise machine.error("a size is built from something that is not sizes")
    sizes: tuple[int, ...] = arguments[0]
    return sizes


def _ordered_dict(machine: Unpickler, arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if arguments:
        raise machine.error("an OrderedDict is built from values")
    return {}


_CALLS: Mapping[str, Callable[[Unpickler, tuple[Any, ...]], Any]] = MappingProxyType(
    {
        "tensor": _tensor,
        "tensor_v2": _tensor_v2,
        "tensor_v3": _tensor_v3,
        "parameter": _parameter,
        "size": _size,
        "ordered_dict": _ordered_dict,
    }
)


def _check_protocol(machine: Unpickler) -> None:
    protocol = machine.number(1)
    if not 2 <= protocol <= 5:
        raise machine.error(f"pickle protocol {protocol}, protocols 2 to 5 are read")


def _long(machine: Unpickler) -> None:
    nbytes = machine.number(1)
    if nbytes > MAX_INT_BYTES:
        raise machine.error(f"a number of {nbytes} bytes in the pickle")
    machine.push(machine.number(nbytes, signed=True))


def _stack_global(machine: Unpickler) -> None:
    module, name = machine.pop_many(2)
    machine.find_global(module, name)


# Opcode -> what it does; the names are those of pickletools.
_OPS: Mapping[int, Callable[[Unpickler], Any]] = MappingProxyType(
    {
        0x80: _check_protocol,  # PROTO
        0x95: lambda m: m.take(8),  # FRAME: a hint for reading ahead
        0x28: Unpickler.mark,  # MARK
        0x30: Unpickler.pop,  # POP
        0x31: Unpickler.pop_mark,  # POP_MARK
        0x4E: lambda m: m.push(None),  # NONE
        0x88: lambda m: m.push(True),  # NEWTRUE
        0x89: lambda m: m.push(False),  # NEWFALSE
        0x4A: lambda m: m.push(m.number(4, signed=True)),  # BININT
        0x4B: lambda m: m.push(m.number(1)),  # BININT1
        0x4D: lambda m: m.push(m.number(2)),  # BININT2
        0x8A: _long,  # LONG1
        0x47: lambda m: m.push(struct.unpack(">d", m.take(8))[0]),  # BINFLOAT
        0x8C: lambda m: m.push(m.text(m.number(1))),  # SHORT_BINUNICODE
        0x58: lambda m: m.push(m.text(m.number(4))),  # BINUNICODE
        0x8D: lambda m: m.push(m.text(m.number(8))),  # BINUNICODE8
        0x55: lambda m: m.push(m.text(m.number(1))),  # SHORT_BINSTRING
        0x54: lambda m: m.push(m.text(m.number(4))),  # BINSTRING
        0x43: lambda m: m.push(m.take(m.number(1))),  # SHORT_BINBYTES
        0x42: lambda m: m.push(m.take(m.number(4))),  # BINBYTES
        0x29: lambda m: m.push(()),  # EMPTY_TUPLE
        0x74: lambda m: m.push(tuple(m.pop_mark())),  # TUPLE
        0x85: lambda m: m.push(m.pop_many(1)),  # TUPLE1
        0x86: lambda m: m.push(m.pop_many(2)),  # TUPLE2
        0x87: lambda m: m.push(m.pop_many(3)),  # TUPLE3
        0x5D: lambda m: m.push([]),  # EMPTY_LIST
        0x61: lambda m: m.append([m.pop()]),  # APPEND
        0x65: lambda m: m.append(m.pop_mark()),  # APPENDS
        0x7D: lambda m: m.push({}),  # EMPTY_DICT
        0x73: lambda m: m.set_items(list(m.pop_many(2))),  # SETITEM
        0x75: lambda m: m.set_items(m.pop_mark()),  # SETITEMS
        0x71: lambda m: m.put(m.number(1)),  # BINPUT
        0x72: lambda m: m.put(m.number(4)),  # LONG_BINPUT
        0x94: Unpickler.memoize,  # MEMOIZE
        0x68: lambda m: m.get(m.number(1)),  # BINGET
        0x6A: lambda m: m.get(m.number(4)),  # LONG_BINGET
        0x63: lambda m: m.find_global(m.line(), m.line()),  # GLOBAL
        0x93: _stack_global,  # STACK_GLOBAL
        0x52: Unpickler.reduce,  # REDUCE
        0x62: Unpickler.build,  # BUILD
        0x51: Unpickler.persistent,  # BINPERSID
    }
)
