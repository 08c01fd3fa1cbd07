"""GGUF: equal to the reference package both ways, split files joined, every broken rule refused."""

import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as reference
import numpy as np
import pytest

from inhouse.core.errors import FormatError, InhouseError, NotFoundError, UnsupportedError, UsageError
from inhouse.core.tensors import TensorInfo
from inhouse.store.dtypes import GGML_NAMES, GGML_TYPES, GGML_UNREAD
from inhouse.store.gguf import gguf_metadata, open_gguf
from inhouse.store.gguf_values import Strings
from inhouse.store.gguf_write import write_gguf
from inhouse.store.writing import from_array, from_bytes, from_source

pytestmark = pytest.mark.null
FILES = ["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"]


def reference_metadata(path: Path) -> dict[str, Any]:
    fields = reference.GGUFReader(path).fields
    return {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}


def assert_equal_to_reference(path: Path) -> None:
    source, expected = open_gguf(path), reference.GGUFReader(path)
    assert list(source) == [tensor.name for tensor in expected.tensors]
    for tensor in expected.tensors:
        info = source.info(tensor.name)
        assert info.shape == tuple(int(dim) for dim in reversed(tensor.shape))
        assert (info.dtype, info.nbytes) == (tensor.tensor_type.name, tensor.n_bytes)
        assert source.raw(tensor.name).tobytes() == tensor.data.tobytes()
        assert not source.raw(tensor.name).flags.writeable
    wanted = reference_metadata(path)
    assert source.metadata.keys() == wanted.keys()
    for key, value in wanted.items():
        found = source.metadata[key]
        assert (list(found) if isinstance(value, list) else found) == value, key


@pytest.mark.realdata
@pytest.mark.parametrize("kind", FILES)
def test_real_files_read_as_the_reference_reads_them(stories: Path, kind: str) -> None:
    assert_equal_to_reference(stories / f"stories260K-{kind}.gguf")


@pytest.mark.realdata
@pytest.mark.parametrize("kind", FILES)
def test_real_files_written_again_are_the_same_to_the_reference(stories: Path, kind: str, tmp_path: Path) -> None:
    original, copy = stories / f"stories260K-{kind}.gguf", tmp_path / "copy.gguf"
    source = open_gguf(original)
    write_gguf(copy, source.metadata, from_source(source))
    assert_equal_to_reference(copy)
    for name in source:
        assert open_gguf(copy).raw(name).tobytes() == source.raw(name).tobytes()
    assert reference_metadata(copy) == reference_metadata(original)


def test_block_table_is_that_of_the_reference() -> None:
    for name, kind in GGML_TYPES.items():
        number = reference.GGMLQuantizationType[name]
        assert kind.number == number
        assert reference.GGML_QUANT_SIZES[number] == (kind.block, kind.nbytes)
    known = {int(number) for number in reference.GGMLQuantizationType}
    assert known <= GGML_NAMES.keys() | GGML_UNREAD.keys()


@pytest.mark.parametrize("name", sorted(GGML_TYPES))
def test_every_type_goes_through_both_ways(tmp_path: Path, name: str) -> None:
    kind = GGML_TYPES[name]
    raw = np.random.default_rng(1).integers(0, 256, 3 * 2 * kind.nbytes, np.uint8)
    write_gguf(tmp_path / "a.gguf", {"general.architecture": "x"}, [from_bytes("t", name, (3, 2 * kind.block), raw)])
    assert_equal_to_reference(tmp_path / "a.gguf")
    assert open_gguf(tmp_path / "a.gguf").raw("t").tobytes() == raw.tobytes()
    assert open_gguf(tmp_path / "a.gguf").info("t") == TensorInfo("t", name, (3, 2 * kind.block), raw.nbytes)


def reference_file(path: Path, alignment: int | None = None, per_file: int = 0) -> Path:
    writer = reference.GGUFWriter(path, "llama", split_max_tensors=per_file)
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_uint8("u8", 255)
    writer.add_int8("i8", -128)
    writer.add_uint16("u16", 65535)
    writer.add_int16("i16", -32768)
    writer.add_uint32("u32", (1 << 32) - 1)
    writer.add_int32("i32", -(1 << 31))
    writer.add_uint64("u64", (1 << 64) - 1)
    writer.add_int64("i64", -(1 << 63))
    writer.add_float32("f32", 0.1)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_string("text", "ünïcode\n")
    writer.add_array("ints", [1, -2, 3])
    writer.add_array("floats", [0.5, -1.5])
    writer.add_array("bools", [True, False])
    writer.add_array("strings", ["a", "", "bcd", "é"])
    for index in range(5):
        writer.add_tensor(f"t{index}", np.full((index + 1, 3), index, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("alignment", [None, 8, 256])
def test_every_value_type_reads_as_the_reference_wrote_it(tmp_path: Path, alignment: int | None) -> None:
    path = reference_file(tmp_path / "all.gguf", alignment)
    assert_equal_to_reference(path)
    metadata = gguf_metadata(path)
    assert (metadata["u64"], metadata["i64"], metadata["f64"]) == ((1 << 64) - 1, -(1 << 63), 0.1)
    assert metadata["yes"] is True
    assert metadata["ints"].dtype == np.int32
    assert not metadata["ints"].flags.writeable


def test_every_value_type_is_written_as_the_reference_reads_it(tmp_path: Path) -> None:
    scalars: list[np.generic] = [
        np.uint8(1),
        np.int8(-1),
        np.uint16(2),
        np.int16(-2),
        np.uint32(3),
        np.int32(-3),
        np.uint64(4),
    ]
    scalars += [np.int64(-4), np.float32(0.5), np.float64(0.1), np.bool_(True)]
    values: dict[str, Any] = {f"s.{value.dtype.name}": value for value in scalars}
    values |= {f"a.{value.dtype.name}": np.array([value, value]) for value in scalars}
    values |= {"true": True, "int": 7, "negative": -7, "wide": 1 << 40, "negative wide": -(1 << 40), "float": 0.25}
    values |= {"text": "ü", "strings": ["a", "bü"], "ints": [1, 2], "floats": [0.5], "mixed": [1, 0.5], "bools": [True]}
    values |= {"u": (1 << 64) - 1, "none": [], "long": [1 << 40]}
    write_gguf(tmp_path / "a.gguf", values, [from_array("t", np.ones((2, 3), np.float32))])
    assert_equal_to_reference(tmp_path / "a.gguf")
    found = reference.GGUFReader(tmp_path / "a.gguf").fields
    for value in scalars:
        expected = {"float32": "FLOAT32", "float64": "FLOAT64", "bool": "BOOL"}.get(
            value.dtype.name, value.dtype.name.upper()
        )
        assert found[f"s.{value.dtype.name}"].types[0].name == expected
        assert found[f"a.{value.dtype.name}"].types[1].name == expected
    assert [found[key].types[0].name for key in ("int", "negative", "wide", "negative wide", "u")] == [
        "UINT32",
        "INT32",
        "UINT64",
        "INT64",
        "UINT64",
    ]


def test_arrays_of_arrays(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", {"nest": [[1, 2], [3]], "deep": [[["x"], ["y", "z"]]]}, [])
    metadata = gguf_metadata(tmp_path / "a.gguf")
    assert [list(inner) for inner in metadata["nest"]] == [[1, 2], [3]]
    assert [[list(strings) for strings in inner] for inner in metadata["deep"]] == [[["x"], ["y", "z"]]]
    with pytest.raises(UsageError, match="no GGUF value type"):
        write_gguf(tmp_path / "b.gguf", {"deep": [[[["x"]]]]}, [])


@pytest.mark.parametrize(
    ("metadata", "cause"),
    [
        ({"a": None}, "NoneType has no GGUF"),
        ({"a": 1 << 64}, "does not fit"),
        ({"a": np.float16(1)}, "float16 has no GGUF"),
        ({"a": np.ones((2, 2))}, "2-d array"),
        ({"a": ["x", 1]}, "mixed kinds"),
        ({"general.alignment": 24}, "not a power of two"),
    ],
)
def test_values_that_gguf_does_not_have(tmp_path: Path, metadata: dict[str, Any], cause: str) -> None:
    with pytest.raises(UsageError, match=cause):
        write_gguf(tmp_path / "a.gguf", metadata, [])
    assert not list(tmp_path.iterdir())


def test_tensors_that_gguf_does_not_have(tmp_path: Path) -> None:
    one = from_array("t", np.ones((2, 3), np.float32))
    wrong = [
        ([one, one], "given twice"),
        ([from_array("t", np.ones((1, 1, 1, 1, 1), np.float32))], "GGUF has no F32 of shape"),
        ([from_array("t", np.ones(2, np.uint32))], "GGUF has no U32"),
        ([from_bytes("t", "Q4_0", (2, 16), np.zeros(18, np.uint8))], "do not match"),
        ([from_bytes("t", "F32", (2, 16), np.zeros(18, np.uint8))], "do not match"),
    ]
    for tensors, cause in wrong:
        with pytest.raises(UsageError, match=cause):
            write_gguf(tmp_path / "a.gguf", {}, tensors)


# Lazy strings.


def vocabulary(count: int) -> list[str]:
    return [f"▁token{index}é" if index % 3 else f"t{index}" for index in range(count)]


def test_a_vocabulary_of_150_000_opens_within_100_ms_of_cpu(tmp_path: Path) -> None:
    tokens = vocabulary(150_000)
    write_gguf(tmp_path / "v.gguf", {"tokens": tokens, "merges": tokens, "scores": np.zeros(150_000, np.float32)}, [])
    seconds = []
    for _ in range(5):
        began = time.process_time()
        found = gguf_metadata(tmp_path / "v.gguf")["tokens"]
        seconds.append(time.process_time() - began)
    assert min(seconds) < 0.1
    assert list(found) == tokens


def test_lazy_strings_behave_as_a_list(tmp_path: Path) -> None:
    tokens = vocabulary(1000)
    write_gguf(tmp_path / "v.gguf", {"tokens": tokens}, [])
    found = gguf_metadata(tmp_path / "v.gguf")["tokens"]
    assert isinstance(found, Strings)
    assert (len(found), found[0], found[-1], found[500]) == (1000, tokens[0], tokens[-1], tokens[500])
    assert found[10:20:3] == tokens[10:20:3]
    assert found == tokens
    assert found != tokens[:-1]
    assert found != [*tokens[:-1], "x"]
    assert "t0" in found
    assert found.index(tokens[7]) == 7
    assert repr(found) == "Strings(1000)"
    with pytest.raises(IndexError):
        found[1000]


def test_a_string_that_is_not_utf8_is_an_error_when_read_and_its_bytes_remain(tmp_path: Path) -> None:
    write_gguf(tmp_path / "v.gguf", {"tokens": ["good", "b?d"]}, [])
    data = (tmp_path / "v.gguf").read_bytes().replace(b"b?d", b"b\xffd")
    (tmp_path / "v.gguf").write_bytes(data)
    found = gguf_metadata(tmp_path / "v.gguf")["tokens"]
    assert found[0] == "good"
    assert found.bytes_at(1) == b"b\xffd"
    with pytest.raises(FormatError, match="string 1 of an array is not UTF-8"):
        found[1]
    with pytest.raises(FormatError, match="not UTF-8"):
        list(found)


# Split files.


def split(folder: Path) -> list[Path]:
    reference_file(folder / "m.gguf", per_file=2)
    return sorted(folder.iterdir())


@pytest.mark.parametrize("opened", [0, 1, 2])
def test_a_split_model_is_one_source_whichever_file_is_opened(tmp_path: Path, opened: int) -> None:
    paths = split(tmp_path)
    assert [path.name for path in paths] == [f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    source = open_gguf(paths[opened])
    assert list(source) == ["t0", "t1", "t2", "t3", "t4"]
    assert source.paths == tuple(paths)
    assert (source.metadata["text"], source.metadata["split.no"]) == ("ünïcode\n", 0)
    for index, name in enumerate(source):
        assert (source.raw(name).view(np.float32) == index).all()
        assert source.info(name).shape == (index + 1, 3)


def test_a_split_model_with_a_file_missing_is_refused(tmp_path: Path) -> None:
    paths = split(tmp_path)
    paths[1].unlink()
    with pytest.raises(NotFoundError, match=r"m-00002-of-00003\.gguf, one of 3 files"):
        open_gguf(paths[0])


def test_a_split_model_with_files_exchanged_is_refused(tmp_path: Path) -> None:
    paths = split(tmp_path)
    paths[1].write_bytes(paths[2].read_bytes())
    with pytest.raises(FormatError, match="not number 1 of 3"):
        open_gguf(paths[0])
    paths[0].rename(tmp_path / "other.gguf")
    with pytest.raises(FormatError, match="its name says 1"):
        open_gguf(tmp_path / "other.gguf")


def test_split_counts_must_agree(tmp_path: Path) -> None:
    def part(number: int, tensor: str, total: int) -> None:
        keys = {"split.no": np.uint16(number), "split.count": np.uint16(2), "split.tensors.count": np.int32(total)}
        path = tmp_path / f"m-0000{number + 1}-of-00002.gguf"
        write_gguf(path, keys, [from_array(tensor, np.ones(2, np.float32))])

    part(0, "a", 3)
    part(1, "b", 3)
    with pytest.raises(FormatError, match="hold 2 tensors, split.tensors.count is 3"):
        open_gguf(tmp_path / "m-00001-of-00002.gguf")
    part(0, "a", 2)
    part(1, "a", 2)
    with pytest.raises(FormatError, match="'a' a second time"):
        open_gguf(tmp_path / "m-00001-of-00002.gguf")


# Broken files, built by hand so that each breaks one rule.


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def tensor(name: str = "t", dims: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def build(
    tensors: list[bytes], pairs: list[bytes], data: int = 16, version: int = 3, counts: tuple[int, int] | None = None
) -> bytes:
    n_tensors, n_pairs = counts or (len(tensors), len(pairs))
    header = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_pairs) + b"".join(pairs) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + bytes(data)


@pytest.mark.parametrize("version", [2, 3])
def test_a_minimal_file_of_either_version_is_read(tmp_path: Path, version: int) -> None:
    (tmp_path / "x").write_bytes(build([tensor()], [], version=version))
    assert open_gguf(tmp_path / "x").info("t") == TensorInfo("t", "F32", (4,), 16)
    (tmp_path / "x").write_bytes(build([tensor(dims=())], [], data=4))
    assert open_gguf(tmp_path / "x").info("t") == TensorInfo("t", "F32", (), 4)


HUGE = 1 << 62
ARRAY = struct.Struct("<IQ").pack
BROKEN: list[tuple[str, bytes, type[InhouseError]]] = [
    ("begins with", b"", FormatError),
    ("begins with", b"GGML" + bytes(64), FormatError),
    ("the version takes 4 bytes", b"GGUF", FormatError),
    ("version 1,", build([], [], version=1), UnsupportedError),
    ("version 4,", build([], [], version=4), UnsupportedError),
    ("big-endian", build([], [], version=0x03000000), UnsupportedError),
    ("tensors, the limit", build([], [], counts=(HUGE, 0)), FormatError),
    ("key-value pairs, the limit", build([], [], counts=(0, HUGE)), FormatError),
    ("10 tensors of at least", build([], [], counts=(10, 0)), FormatError),
    ("10 key-value pairs of at least", build([], [], counts=(0, 10)), FormatError),
    ("a key of", build([], [struct.pack("<Q", HUGE) + bytes(16)]), FormatError),
    ("key '' is empty", build([], [pair("", 0, b"\1\0")]), FormatError),
    ("a key is not UTF-8", build([], [text(b"\xff") + struct.pack("<IQ", 0, 1)]), FormatError),
    ("'k' is empty or given twice", build([], [pair("k", 0, b"\1"), pair("k", 0, b"\1")]), FormatError),
    ("unknown value type 13", build([], [pair("k", 13, bytes(8))]), FormatError),
    ("bool of value 2", build([], [pair("k", 7, b"\2")]), FormatError),
    ("bool of value 3", build([], [pair("k", 9, ARRAY(7, 2) + b"\1\3")]), FormatError),
    ("'k' of", build([], [pair("k", 8, struct.pack("<Q", HUGE))]), FormatError),
    ("'k' takes 200", build([], [pair("k", 8, struct.pack("<Q", 200))]), FormatError),
    ("'k' is not UTF-8", build([], [pair("k", 8, text(b"\xff"))]), FormatError),
    ("strings in 'k' of at least", build([], [pair("k", 9, ARRAY(8, HUGE))]), FormatError),
    ("values in 'k' of at least", build([], [pair("k", 9, ARRAY(4, HUGE))]), FormatError),
    ("go beyond the file", build([], [pair("k", 9, ARRAY(8, 1) + struct.pack("<Q", (1 << 64) - 1))]), FormatError),
    ("go beyond the file", build([], [pair("k", 9, ARRAY(8, 2) + struct.pack("<Q", 80) + bytes(40))]), FormatError),
    ("unknown value type 99", build([], [pair("k", 9, ARRAY(99, 1))]), FormatError),
    ("deeper than 4", build([], [pair("k", 9, ARRAY(9, 1) * 60 + ARRAY(0, 0))]), FormatError),
    ("arrays in 'k' of at least", build([], [pair("k", 9, ARRAY(9, HUGE))]), FormatError),
    ("not a power of two", build([], [pair("general.alignment", 4, struct.pack("<I", 0))]), FormatError),
    ("not a power of two", build([], [pair("general.alignment", 4, struct.pack("<I", 48))]), FormatError),
    ("not a power of two", build([], [pair("general.alignment", 8, text("32"))]), FormatError),
    ("not a power of two", build([], [pair("general.alignment", 7, b"\1")]), FormatError),
    ("split.count is not", build([], [pair("split.count", 8, text("2"))]), FormatError),
    ("split.count is not", build([], [pair("split.count", 4, struct.pack("<I", 100_000))]), FormatError),
    ("one of 2 files", build([], [pair("split.count", 2, struct.pack("<H", 2))]), FormatError),
    ("name '' is empty", build([tensor("")], []), FormatError),
    ("'t' is empty or given twice", build([tensor(), tensor(offset=32)], [], data=64), FormatError),
    ("5 dimensions", build([tensor(dims=(1, 1, 1, 1, 1))], []), FormatError),
    ("dimension beyond", build([tensor(dims=(1 << 63,))], []), FormatError),
    ("the file has", build([tensor(dims=(HUGE, HUGE, HUGE, HUGE))], []), FormatError),
    ("the file has", build([tensor(dims=(5,))], []), FormatError),
    ("the file has", build([tensor(offset=32)], []), FormatError),
    ("the file has", build([tensor(offset=(1 << 64) - 32)], []), FormatError),
    ("no multiple of 32", build([tensor(offset=8)], [], data=64), FormatError),
    ("no multiple of the 32 of Q4_0", build([tensor(dims=(48,), kind=2)], [], data=64), FormatError),
    ("type IQ2_XXS, which is not read", build([tensor(dims=(256,), kind=16)], [], data=99), UnsupportedError),
    ("unknown type number 99", build([tensor(kind=99)], []), UnsupportedError),
    ("'t' and 'u' overlap", build([tensor(), tensor("u")], []), FormatError),
]


@pytest.mark.parametrize(("cause", "data", "kind"), BROKEN)
def test_refused(tmp_path: Path, cause: str, data: bytes, kind: type[InhouseError]) -> None:
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(kind, match=cause):
        open_gguf(tmp_path / "bad.gguf")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = reference_file(tmp_path / "all.gguf").read_bytes()
    data_end = max(entry.data_offset + entry.n_bytes for entry in reference.GGUFReader(tmp_path / "all.gguf").tensors)
    for size in range(0, data_end, 3):
        (tmp_path / "cut").write_bytes(whole[:size])
        with pytest.raises(FormatError):
            open_gguf(tmp_path / "cut")


def test_a_hostile_count_takes_no_memory(tmp_path: Path, peak_bytes: Callable[[Callable[[], object]], int]) -> None:
    for payload in (ARRAY(8, HUGE), ARRAY(4, HUGE), ARRAY(9, HUGE)):
        (tmp_path / "bad").write_bytes(build([], [pair("k", 9, payload)]))

        def refused() -> None:
            with pytest.raises(FormatError):
                open_gguf(tmp_path / "bad")

        assert peak_bytes(refused) < 1 << 20
