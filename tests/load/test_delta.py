"""Deltas between versions: exact, small where the change is small, and refused whole when anything is not as it was."""

import errno
import hashlib
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inhouse.core.errors import CapacityError, FormatError, InhouseError, NotFoundError, UnsupportedError, UsageError
from inhouse.load import delta
from inhouse.load.importer import import_model
from inhouse.store import delta_codec as codec
from inhouse.store import delta_entropy as entropy
from inhouse.store.delta import Delta, FileSet, make_delta
from inhouse.store.safetensors import write_safetensors
from inhouse.store.store import Store
from inhouse.store.writing import from_bytes, named_target
from tests.load import delta_v1
from tests.load.checkpoints import Arrays, change, copy_hf

U8 = npt.NDArray[np.uint8]


@pytest.fixture
def store() -> Iterator[Store]:
    with Store() as opened:
        yield opened


def tiny_runs_too(new: U8, base: U8, width: int, dtype: str) -> bool:
    """The sparse way, on a run long enough that few of its elements have changed."""
    wide_new, wide_base = (np.concatenate([np.zeros(4000 * width, np.uint8), part]) for part in (new, base))
    payload = codec._encode(codec.SPARSE, wide_new, wide_base, width, dtype)
    return codec.decode(codec.SPARSE, payload, wide_new.size, wide_base, width, dtype).tobytes() == wide_new.tobytes()


def bf16(values: npt.NDArray[np.float32]) -> U8:
    """Rounded to bf16, as bytes."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).view(np.uint8)


def widened(raw: U8) -> npt.NDArray[np.float32]:
    return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def bf16_model(path: Path, tensors: dict[str, npt.NDArray[np.float32]]) -> FileSet:
    """A file of bf16 tensors as the files of a version."""
    write_safetensors(path, [from_bytes(name, "BF16", x.shape, bf16(x.reshape(-1))) for name, x in tensors.items()])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return FileSet(f"version-{digest}", {"model.safetensors": (path, digest)})


@given(
    st.sampled_from([("BF16", 2), ("F16", 2), ("F32", 4), ("F64", 8), ("U8", 1), ("I16", 2), ("I64", 8)]),
    st.integers(1, 60),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["any", "near", "equal"]),
)
def test_every_run_comes_back(kind: tuple[str, int], count: int, seed: int, relation: str) -> None:
    dtype, width = kind
    draw = np.random.default_rng(seed)
    base = draw.integers(0, 256, count * width).astype(np.uint8)
    new = base.copy() if relation != "any" else draw.integers(0, 256, base.size).astype(np.uint8)
    if relation == "near":
        new[draw.integers(new.size)] ^= 1
        assert tiny_runs_too(new, base, width, dtype)
    for older in (base, None):
        way, payload = codec.encode(new, older, width, dtype)
        assert codec.decode(way, payload, new.size, older, width, dtype).tobytes() == new.tobytes()


def test_one_percent_of_the_values_take_two_percent_of_the_file(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    old = draw.standard_normal((1024, 2048)).astype(np.float32) * 0.02
    new = old.copy()
    at = draw.random(new.shape) < 0.01
    new[at] = draw.standard_normal(int(at.sum())).astype(np.float32) * 0.02
    base, child = bf16_model(tmp_path / "a", {"w": old}), bf16_model(tmp_path / "b", {"w": new})
    made = make_delta(base, child, tmp_path / "d", {})
    assert made.share <= 0.02
    assert not made.lossy
    again(base, child, tmp_path)


def test_a_light_fine_tune_takes_a_sixth_of_raw_bf16(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    tensors = {str(i): draw.standard_normal((1024, 1024)).astype(np.float32) * 0.02 for i in range(2)}
    tuned = {n: w * (1 + 1e-3 * draw.standard_normal(w.shape)).astype(np.float32) for n, w in tensors.items()}
    base, child = bf16_model(tmp_path / "a", tensors), bf16_model(tmp_path / "b", tuned)
    assert make_delta(base, child, tmp_path / "d", {}).share <= 0.16
    again(base, child, tmp_path)


def test_a_light_fine_tune_by_an_optimiser_takes_a_tenth(tmp_path: Path) -> None:
    """Adam moves small weights as far as large ones: counted in last bits, differences are as wide as exponents say.
    No coding of one difference after the other, knowing the exponents, can do better than their entropy."""
    draw = np.random.default_rng(5)
    old = widened(bf16(draw.standard_normal(1 << 19).astype(np.float32) * 0.1)).reshape(512, 1024)
    new = old + (1e-4 * draw.uniform(-1.5, 1.5, old.shape)).astype(np.float32)
    base, child = bf16_model(tmp_path / "a", {"w": old}), bf16_model(tmp_path / "b", {"w": new})
    made = make_delta(base, child, tmp_path / "d", {})
    assert made.ways == {codec.CODED: old.size * 2} | {"same": made.new_nbytes - old.size * 2}
    exponents, change = bf16(old.reshape(-1)).view(np.uint16) >> 7 & 0xFF, _steps(bf16(old), bf16(new))
    least = sum(_entropy(change[exponents == e]) for e in np.unique(exponents)) / 8
    assert least < made.nbytes < 1.03 * least + 2000
    assert made.share < 0.10
    again(base, child, tmp_path)


def _steps(old: U8, new: U8) -> npt.NDArray[np.int64]:
    """How many bf16 numbers one is from the other, by the order of floats."""
    one, other = (
        np.where(bits < 0x8000, bits, 0x7FFF - bits)
        for bits in (raw.reshape(-1).view(np.uint16).astype(np.int64) for raw in (old, new))
    )
    return other - one


def _entropy(values: npt.NDArray[np.int64]) -> float:
    """Bits of all of them."""
    counts = np.unique(values, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


@given(st.integers(1, 5000), st.integers(0, 2**32 - 1), st.sampled_from([0.1, 1.0, 40.0, 20000.0]))
@settings(max_examples=25, deadline=None)
def test_coded_values_come_back(count: int, seed: int, spread: float) -> None:
    draw = np.random.default_rng(seed)
    values = np.minimum(np.abs(draw.standard_normal(count) * spread), 65535).astype(np.uint16)
    values[draw.integers(count)] = draw.choice([0, 15, 16, 31, 32, 65535])
    contexts = draw.integers(0, draw.integers(1, 17), count).astype(np.uint8)
    assert np.array_equal(entropy.decode(entropy.encode(values, contexts), contexts), values)


def test_coded_values_cost_their_entropy() -> None:
    """Shannon's bound for values drawn independently in two contexts; the rest is what the counts have to learn."""
    draw = np.random.default_rng(6)
    contexts = draw.integers(0, 2, 200_000).astype(np.uint8)
    values = np.where(contexts == 1, draw.geometric(0.9, contexts.size), draw.integers(0, 8, contexts.size))
    least = sum(_entropy(values[contexts == one]) for one in (0, 1)) / 8
    assert least < len(entropy.encode(values.astype(np.uint16), contexts)) < 1.02 * least


def test_hostile_codes_end_in_an_error_or_in_as_many_values() -> None:
    """Payloads are hashed in a delta; whoever writes the hash as well gets no crash and no memory for it."""
    draw = np.random.default_rng(7)
    contexts = draw.integers(0, 9, 400).astype(np.uint8)
    good = entropy.encode(draw.integers(0, 20, 400).astype(np.uint16), contexts)
    refused = 0
    for turn in range(200):
        bad = bytearray(good)
        at = turn if turn < 40 else int(draw.integers(len(bad)))
        bad[at] ^= 1 << int(draw.integers(8))
        cut = bytes(bad[: draw.integers(len(bad))]) if turn % 5 == 4 else bytes(bad)
        try:
            assert entropy.decode(cut, contexts).size == 400
        except FormatError:
            refused += 1
    assert refused > 140, "a turned bit puts the rest out of step, but for the low bits of large values"
    for payload in (b"", bytes(7), bytes(8), b"\xff" * 8, b"\xff" * 4000):
        with pytest.raises(FormatError):
            entropy.decode(payload, contexts)


def test_deltas_of_the_first_form_apply(tmp_path: Path) -> None:
    """The file was made by the release that had no coded steps; bases are made anew, of numbers no library decides."""
    base, new = delta_v1.versions(tmp_path)
    opened = Delta(delta_v1.FILE)
    opened.verify()
    (tmp_path / "out").mkdir()
    for name, path in opened.apply(base, tmp_path / "out"):
        assert path.read_bytes() == new.paths[name].read_bytes()
    assert {step[0] for entry in opened.files for step in entry["steps"]} >= {"diff", "xor", "sparse", "plain", "patch"}


def test_a_form_of_another_time_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(8)
    values = draw.standard_normal(8192).astype(np.float32)
    tuned = values + draw.standard_normal(8192).astype(np.float32) * np.float32(0.003)
    base, child = bf16_model(tmp_path / "a", {"w": values}), bf16_model(tmp_path / "b", {"w": tuned})
    assert codec.CODED in make_delta(base, child, tmp_path / "d", {}).ways
    monkeypatch.setattr("inhouse.store.delta.VERSIONS", (1,))
    with pytest.raises(UnsupportedError, match="of the form 2, 1 are read") as caught:
        Delta(tmp_path / "d")
    assert caught.value.remedy


def again(base: FileSet, child: FileSet, folder: Path) -> None:
    """Applies folder/d and compares every byte."""
    out = folder / "out"
    out.mkdir()
    opened = Delta(folder / "d")
    opened.verify()
    for name, path in opened.apply(base, out):
        assert path.read_bytes() == child.paths[name].read_bytes()


def test_tensors_that_moved_or_changed_shape(tmp_path: Path) -> None:
    draw = np.random.default_rng(2)
    a, b, c = (draw.standard_normal((64, 96)).astype(np.float32) for _ in range(3))
    base = bf16_model(tmp_path / "a", {"a": a, "b": b, "gone": c})
    child = bf16_model(tmp_path / "b", {"b": b, "new": c, "a": a[:32], "zz": draw.standard_normal((5, 7), np.float32)})
    made = make_delta(base, child, tmp_path / "d", {})
    assert made.ways["same"] >= b.size * 2
    again(base, child, tmp_path)


def test_lossy_deltas_are_small_near_and_checked(tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    old = draw.standard_normal((512, 1024)).astype(np.float32) * 0.02
    new = old + draw.standard_normal(old.shape).astype(np.float32) * 2e-3
    base, child = bf16_model(tmp_path / "a", {"w": old}), bf16_model(tmp_path / "b", {"w": new})
    made = make_delta(base, child, tmp_path / "d", {}, lossy=True)
    assert made.lossy
    assert 1 / 17 < made.share < 0.075
    out = tmp_path / "out"
    out.mkdir()
    ((_, path),) = Delta(tmp_path / "d").apply(base, out)
    raw, size = path.read_bytes(), old.size * 2
    found = widened(np.frombuffer(raw[-size:], np.uint8)).reshape(old.shape)
    change_ = new - old
    scale = np.abs(change_).mean(axis=1, keepdims=True)
    wanted = np.where(change_ > 0, scale, -scale)
    assert np.abs(found - old - wanted).mean() < 2e-4  # bf16 rounding of base and sum


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    draw = np.random.default_rng(4)
    old = draw.standard_normal((40, 64)).astype(np.float32)
    base, child = bf16_model(tmp_path / "a", {"w": old}), bf16_model(tmp_path / "b", {"w": old * 1.01})
    make_delta(base, child, tmp_path / "d", {})
    whole = (tmp_path / "d").read_bytes()
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << (at % 8)
        (tmp_path / "e").write_bytes(damaged)
        with pytest.raises(InhouseError):
            Delta(tmp_path / "e").verify()
    for length in range(0, len(whole), 97):
        (tmp_path / "e").write_bytes(whole[:length])
        with pytest.raises(InhouseError):
            Delta(tmp_path / "e").verify()


def test_from_version_to_version_of_the_store(stories: Path, tmp_path: Path, store: Store) -> None:
    import_model(stories / "hf", "m", store=store)
    edited = change(copy_hf(stories, tmp_path / "new"), _nudge)
    second = import_model(edited, "m", store=store).version
    file = tmp_path / "m.delta"
    made = delta.make("m:1", "m:2", file, store=store)
    assert made.share < 0.3
    store.remove("m:2")
    result = delta.apply("m:1", file, "m", store=store).version
    assert (result.digest, result.parent, result.how) == (second.digest, "m:1", "delta m.delta")
    with pytest.raises(FormatError, match="changes the version"):
        delta.apply(result.ref, file, "m", store=store)
    before = [version.ref for version in store.catalog.versions()]
    _damage(store, "m:1")
    with pytest.raises(FormatError):
        delta.apply("m:1", file, "again", store=store)
    assert [version.ref for version in store.catalog.versions()] == before
    assert not list(store.home.tmp.glob("delta-*"))
    with pytest.raises(NotFoundError):
        delta.apply("m:1", tmp_path / "none", "x", store=store)


def _nudge(arrays: Arrays) -> None:
    for name in arrays:
        if "mlp" in name:
            arrays[name] = arrays[name] * np.float32(1.0001)


def _damage(store: Store, ref: str) -> None:
    """Flips a byte of the version's weights on disk."""
    version = store.catalog.resolve(ref)
    path = store.blobs.path(max(version.files, key=lambda file: file.size).blob)
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_gguf_files(stories: Path, tmp_path: Path, store: Store) -> None:
    first = import_model(stories / "stories260K-Q8_0.gguf", "g", store=store).version
    other = tmp_path / "other.gguf"
    shutil.copyfile(stories / "stories260K-Q8_0.gguf", other)
    data = bytearray(other.read_bytes())
    for at in random.Random(0).sample(range(len(data) - 100_000, len(data)), 300):
        if at % 34 > 1:  # codes, not scales
            data[at] ^= 1
    other.write_bytes(data)
    made = delta.make("g", str(other), tmp_path / "d", store=store)
    assert made.share < 0.02
    result = delta.apply("g:1", tmp_path / "d", "g", store=store).version
    assert (result.number, result.parent_digest) == (2, first.digest)
    assert store.blobs.path(result.files[0].blob).read_bytes() == bytes(data)


def test_no_room_is_said_before_anything_is_written(
    stories: Path, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_model(stories / "hf", "m", store=store)
    delta.make("m:1", "m:1", tmp_path / "d", store=store)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CapacityError):
        delta.apply("m:1", tmp_path / "d", "n", store=store)
    assert not list(store.home.tmp.glob("delta-*"))


def test_a_target_that_cannot_be_written_is_an_error_with_cause_and_remedy(tmp_path: Path) -> None:
    values = np.ones((4, 8), np.float32)
    base, child = bf16_model(tmp_path / "a", {"w": values}), bf16_model(tmp_path / "b", {"w": 2 * values})
    for path in (Path("/proc/x.delta"), tmp_path / ("n" * 300)):
        with pytest.raises(UsageError, match="cannot be written: ") as caught:
            make_delta(base, child, path, {})
        assert caught.value.remedy
    with pytest.raises(CapacityError, match="No space left"), named_target(tmp_path / "full"):
        raise OSError(errno.ENOSPC, "No space left on device")
