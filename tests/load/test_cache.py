"""The pack cache: what is mapped equals what was packed; damage, staleness and lack of room only cost time."""

import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest

from inhouse.core.errors import CapacityError, FormatError, NotFoundError
from inhouse.load import cache
from inhouse.load.bind import Plan, bind, plan_binding
from inhouse.load.cache import Pack, PackKey, forget_packs, make_room, open_pack, pack_size, write_pack
from inhouse.load.describe import Described, describe
from inhouse.model.build import build
from inhouse.runtime.packed import Packed
from inhouse.runtime.packed_sparse import pack_columns
from inhouse.store.mapping import HUGE_BYTES, Mapping, forget_pages
from inhouse.store.writing import atomic_file

pytestmark = [pytest.mark.null, pytest.mark.realdata]
KEY = PackKey("identity", "q4")


@pytest.fixture
def model(stories: Path) -> tuple[Described, Plan]:
    described = describe(stories / "hf")
    return described, plan_binding(described.source, described.spec, described.family, build(described.spec), "q4")


@pytest.fixture
def pack(model: tuple[Described, Plan], tmp_path: Path) -> Path:
    described, plan = model
    write_pack(tmp_path, KEY, "digest", bind(described.source, plan), pack_size(plan.parts))
    return tmp_path / KEY.file_name


def reopen(pack: Path, model: tuple[Described, Plan]) -> Pack:
    return open_pack(pack.parent, KEY, model[1].parts)


def test_mapped_weights_equal_packed_ones(model: tuple[Described, Plan], pack: Path) -> None:
    opened = reopen(pack, model)
    assert opened.digest == "digest"
    for part, made in bind(model[0].source, model[1]):
        mapped = opened.weights[part.spec.name]
        if isinstance(made, Packed):
            assert isinstance(mapped, Packed)
            assert (mapped.format, mapped.shape) == (made.format, made.shape)
            assert np.array_equal(mapped.data, made.data)
            assert mapped.data.ctypes.data % 64 == 0
            assert not mapped.data.flags.writeable
        else:
            assert np.array_equal(mapped, made)  # type: ignore[arg-type]
    start, size = opened.mapping.address_ranges()[0]
    assert size == pack.stat().st_size
    assert all(start <= w.data.ctypes.data < start + size for w in opened.weights.values() if isinstance(w, Packed))


def test_every_flipped_bit_is_seen(model: tuple[Described, Plan], pack: Path) -> None:
    whole = pack.read_bytes()
    used = [spot for spot in range(0, len(whole), 809) if whole[spot]]  # padding between tensors is not checked
    assert len(used) > 200
    for spot in used:
        damaged = bytearray(whole)
        damaged[spot] ^= 1 << (spot % 8)
        pack.write_bytes(damaged)
        with pytest.raises(FormatError):
            reopen(pack, model)


def exchanged(whole: bytes, spot: int) -> bytes:
    return whole[:spot] + whole[spot + 8 : spot + 16] + whole[spot : spot + 8] + whole[spot + 16 :]


def cancelled(whole: bytes, spot: int) -> bytes:
    """The top bits of two neighbouring words flipped: their sum stays."""
    damaged = bytearray(whole)
    damaged[spot + 7] ^= 0x80
    damaged[spot + 15] ^= 0x80
    return bytes(damaged)


@pytest.mark.parametrize("damage", [exchanged, cancelled])
def test_damage_that_keeps_the_sum_is_seen(
    model: tuple[Described, Plan], pack: Path, damage: Callable[[bytes, int], bytes]
) -> None:
    whole = pack.read_bytes()
    for weight in reopen(pack, model).weights.values():
        if isinstance(weight, Packed):
            spot = whole.index(weight.data.tobytes())
            assert whole[spot : spot + 8] != whole[spot + 8 : spot + 16]
            pack.write_bytes(damage(whole, spot))
            with pytest.raises(FormatError, match="is damaged"):
                reopen(pack, model)


@pytest.fixture
def large(pack: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pack that counts as large; its time is older than any tick of the clock."""
    monkeypatch.setattr(cache, "VERIFY_BYTES", 0)
    os.utime(pack, (5, 7))
    return pack


def test_a_large_pack_is_compared_once_for_each_file(
    model: tuple[Described, Plan], large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[int] = []

    def checksum(raw: npt.NDArray[np.uint8]) -> int:
        compared.append(raw.nbytes)
        return zlib.crc32(raw.data)

    monkeypatch.setattr(cache, "_checksum", checksum)
    count = len(reopen(large, model).weights)
    assert len(compared) == count
    reopen(large, model)
    assert len(compared) == count
    os.utime(large, (5, 9))
    reopen(large, model)
    assert len(compared) == 2 * count
    shutil.copy2(large, large.with_name("copy"))
    os.replace(large.with_name("copy"), large)  # another inode, the same time and size
    reopen(large, model)
    assert len(compared) == 3 * count
    reopen(large, model)
    assert len(compared) == 3 * count


def test_a_large_pack_that_changed_is_compared_again(model: tuple[Described, Plan], large: Path) -> None:
    weights = reopen(large, model).weights
    whole = large.read_bytes()
    spot = whole.index(next(w for w in weights.values() if isinstance(w, Packed)).data.tobytes())
    large.write_bytes(exchanged(whole, spot))
    for _ in range(2):
        with pytest.raises(FormatError, match="is damaged"):
            reopen(large, model)


def test_a_large_pack_damaged_before_its_first_opening_is_never_marked(
    model: tuple[Described, Plan], large: Path
) -> None:
    damaged = bytearray(large.read_bytes())
    damaged[cache.PAGE] ^= 1
    large.write_bytes(damaged)
    with pytest.raises(FormatError, match="is damaged"):
        reopen(large, model)
    assert [path.name for path in large.parent.iterdir()] == [large.name]


def test_a_large_pack_opens_where_no_mark_can_be_made(model: tuple[Described, Plan], large: Path) -> None:
    (large.parent / f"{large.name}.verified").mkdir()
    assert reopen(large, model).digest == "digest"
    assert len(list(large.parent.iterdir())) == 2


def test_marks_go_with_their_packs(model: tuple[Described, Plan], large: Path) -> None:
    reopen(large, model)
    assert len(list(large.parent.iterdir())) == 2
    forget_packs(large.parent, KEY.identity)
    assert list(large.parent.iterdir()) == []
    write_pack(large.parent, KEY, "digest", bind(model[0].source, model[1]), pack_size(model[1].parts))
    reopen(large, model)
    make_room(large.parent, 0)
    assert list(large.parent.iterdir()) == []


def test_packs_of_an_older_form_are_not_opened_and_are_forgotten(model: tuple[Described, Plan], pack: Path) -> None:
    older = PackKey(KEY.identity, KEY.quantize, pack=1)
    os.rename(pack, pack.parent / older.file_name)
    with pytest.raises(NotFoundError):
        reopen(pack, model)
    assert forget_packs(pack.parent, KEY.identity) > 0
    assert list(pack.parent.iterdir()) == []


@pytest.mark.parametrize("length", [0, 10, 4095, 5000, -1])
def test_a_cut_pack_is_refused(model: tuple[Described, Plan], pack: Path, length: int) -> None:
    os.truncate(pack, length if length >= 0 else pack.stat().st_size - 1)
    with pytest.raises(FormatError):
        reopen(pack, model)


def test_a_pack_of_other_weights_is_refused(model: tuple[Described, Plan], pack: Path, stories: Path) -> None:
    shutil.copyfile(pack, pack.parent / PackKey("other", "q4").file_name)
    with pytest.raises(FormatError, match="something else"):
        open_pack(pack.parent, PackKey("other", "q4"), model[1].parts)
    with pytest.raises(NotFoundError):
        open_pack(pack.parent, PackKey("third", ""), model[1].parts)
    with pytest.raises(FormatError, match="47 weights"):
        open_pack(pack.parent, KEY, model[1].parts[:-1])
    described = describe(stories / "stories260K-F32.gguf")
    other = plan_binding(described.source, described.spec, described.family, build(described.spec))
    with pytest.raises(FormatError):
        open_pack(pack.parent, KEY, other.parts)


def test_a_failed_write_leaves_nothing(model: tuple[Described, Plan], tmp_path: Path) -> None:
    described, plan = model

    def stops() -> object:
        for index, item in enumerate(bind(described.source, plan)):
            if index == 5:
                raise FormatError("a weight cannot be packed")
            yield item

    with pytest.raises(FormatError):
        write_pack(tmp_path, KEY, "digest", stops(), 10)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_no_room_is_said_before_anything_is_written(model: tuple[Described, Plan], tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match="does not fit"):
        write_pack(tmp_path, KEY, "digest", iter(()), 1 << 60)
    assert list(tmp_path.iterdir()) == []


def test_on_a_full_disk_unused_packs_give_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unused = tmp_path / "unused.pack"
    unused.write_bytes(bytes(4096))
    full = SimpleNamespace(total=100 << 30, free=1 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(CapacityError, match="4096 of other packs"):
        write_pack(tmp_path, KEY, "digest", iter(()), 4097)
    assert unused.exists()
    write_pack(tmp_path, KEY, "digest", iter(()), 4000)
    assert [path.name for path in tmp_path.glob("*.pack")] == [KEY.file_name]


def test_a_large_pack_forgets_its_pages_and_reads_the_same(tmp_path: Path) -> None:
    raw = np.random.default_rng(1).integers(0, 256, HUGE_BYTES + 4097, dtype=np.uint8)
    path = tmp_path / "large"
    with atomic_file(path) as file:
        file.write(raw.data)
    forget_pages(path)
    assert np.array_equal(Mapping(path).data, raw)
    with pytest.raises(FileNotFoundError):
        forget_pages(tmp_path / "none")


def test_the_longest_unused_go_first(tmp_path: Path) -> None:
    for age, name in enumerate(("new", "old", "oldest")):
        path = tmp_path / f"{name}.pack"
        path.write_bytes(bytes(100))
        os.utime(path, (1_000_000 - age, 5))
    leftover = tmp_path / ".x.pack.123.tmp"
    leftover.write_bytes(b"")
    os.utime(leftover, (5, 5))
    assert make_room(tmp_path, 250) == ["oldest.pack", leftover.name]
    assert make_room(tmp_path, 100) == ["old.pack"]
    assert [path.name for path in tmp_path.iterdir()] == ["new.pack"]


def test_opening_marks_as_used_and_keeps_the_identity(model: tuple[Described, Plan], pack: Path) -> None:
    os.utime(pack, (5, 7))
    opened = reopen(pack, model)
    assert pack.stat().st_atime > 1e9
    assert pack.stat().st_mtime == 7
    opened.mapping.check_unchanged()


def test_packs_of_a_model_that_is_gone_are_forgotten(pack: Path) -> None:
    size = pack.stat().st_size
    assert forget_packs(pack.parent, "other") == 0
    assert forget_packs(pack.parent, KEY.identity) == size
    assert not pack.exists()


def test_size_is_known_before_packing(model: tuple[Described, Plan], pack: Path) -> None:
    footer = pack.stat().st_size - pack_size(model[1].parts)
    assert 0 < footer < cache.PAGE + 10_000


def test_matrices_whose_bytes_depend_on_what_they_hold(tmp_path: Path, model: tuple[Described, Plan]) -> None:
    """A sparse matrix lies in a pack with the bytes that it has; a length beyond the format's most is refused."""
    part = next(p for p in model[1].parts if len(p.spec.shape) == 2)
    shape = (part.spec.shape[0], part.spec.shape[1])
    values = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    sparse = pack_columns(np.where(np.abs(values) > 1, values, np.float32(0)))
    parts = [replace(part, format="csr_bf16")]
    write_pack(tmp_path, KEY, "digest", [(parts[0], sparse)], pack_size(parts))
    mapped = open_pack(tmp_path, KEY, parts).weights[part.spec.name]
    assert isinstance(mapped, Packed)
    assert np.array_equal(mapped.data, sparse.data)
    with pytest.raises(FormatError, match="at most"):
        open_pack(tmp_path, KEY, [replace(part, spec=replace(part.spec, shape=(1, 2)), format="csr_bf16")])
