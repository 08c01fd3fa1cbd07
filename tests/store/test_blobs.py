"""Contents by digest: what is put comes back, damage is seen and mended, sweeping takes only what is dead."""

import hashlib
import os
from pathlib import Path

import pytest

from inhouse.core.errors import CapacityError, FormatError, NotFoundError
from inhouse.store.blobs import Blobs, How

pytestmark = pytest.mark.null
DATA = os.urandom(3_000_000)
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    for name in ("blobs", "tmp"):
        (tmp_path / name).mkdir()
    return Blobs(tmp_path / "blobs", tmp_path / "tmp")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.bin"
    path.write_bytes(DATA)
    return path


@pytest.mark.parametrize("how", ["copy", "link", "move"])
def test_put_keeps_the_bytes_under_their_sha256(blobs: Blobs, source: Path, tmp_path: Path, how: How) -> None:
    seen: list[tuple[str, int, int]] = []
    blob = blobs.put_file(source, how=how, progress=lambda *report: seen.append(report))
    assert (blob.digest, blob.size, blob.new) == (DIGEST, len(DATA), True)
    assert blobs.path(DIGEST).read_bytes() == DATA
    assert list(blobs) == [DIGEST]
    assert source.exists() is (how != "move")
    assert seen[-1][1:] == (len(DATA), len(DATA))
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("how", ["copy", "link", "move"])
def test_the_same_content_is_kept_once(blobs: Blobs, source: Path, how: How) -> None:
    blobs.put_bytes(DATA)
    inode = blobs.path(DIGEST).stat().st_ino
    assert blobs.put_file(source, how=how).new is False
    assert blobs.path(DIGEST).stat().st_ino == inode
    assert source.exists() is (how != "move")


def test_blobs_are_read_only(blobs: Blobs, source: Path) -> None:
    assert blobs.path(blobs.put_file(source).digest).stat().st_mode & 0o777 == 0o400


def test_wrong_digest_is_refused_and_leaves_nothing(blobs: Blobs, source: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="was expected"):
        blobs.put_file(source, expect="0" * 64)
    assert list(blobs) == []
    assert list((tmp_path / "tmp").iterdir()) == []
    with pytest.raises(FormatError, match="was expected"):
        blobs.put_file(source, how="move", expect="0" * 64)
    assert source.exists()


def test_verify_finds_truncation_and_a_flipped_bit_and_put_mends_them(blobs: Blobs, source: Path) -> None:
    path = blobs.path(blobs.put_file(source).digest)
    blobs.verify(DIGEST, size=len(DATA))
    path.chmod(0o600)
    path.write_bytes(DATA[:-1])
    with pytest.raises(FormatError, match="2999999 bytes on disk, 3000000 were stored"):
        blobs.verify(DIGEST, size=len(DATA))
    flipped = bytearray(DATA)
    flipped[1_234_567] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(FormatError, match="hashes to"):
        blobs.verify(DIGEST, size=len(DATA))
    blobs.put_file(source)
    blobs.verify(DIGEST, size=len(DATA))


def test_missing_things_have_clear_errors(blobs: Blobs, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        blobs.verify(DIGEST)
    with pytest.raises(NotFoundError):
        blobs.put_file(tmp_path / "absent")
    with pytest.raises(FormatError, match="not a regular file"):
        blobs.put_file(tmp_path)
    with pytest.raises(FormatError, match="no(t a| ).*sha256"):
        blobs.path("../../etc/passwd")


def test_a_source_that_changes_is_refused(blobs: Blobs, source: Path) -> None:
    def change(stage: str, done: int, total: int) -> None:
        with open(source, "ab") as file:
            file.write(b"x")

    with pytest.raises(FormatError, match="changed while it was read"):
        blobs.put_file(source, progress=change)
    assert list(blobs) == []


def test_sweep_spares_the_living_and_the_young(blobs: Blobs, tmp_path: Path) -> None:
    living, dead = blobs.put_bytes(b"living"), blobs.put_bytes(b"dead!")
    (tmp_path / "tmp" / "leftover").write_bytes(b"123")
    (tmp_path / "tmp" / "folder").mkdir()
    swept = blobs.sweep({living.digest}, grace_s=3600)
    assert (swept.blobs, swept.leftovers) == (0, 2)
    swept = blobs.sweep({living.digest}, grace_s=0)
    assert (swept.blobs, swept.nbytes) == (1, 5)
    assert dead.digest not in blobs
    assert set(blobs) == {living.digest}


def test_space_is_checked_with_both_numbers(blobs: Blobs) -> None:
    blobs.check_space(1000)
    with pytest.raises(CapacityError, match=r"\d+ bytes are to be stored, \d+ are free") as caught:
        blobs.check_space(1 << 60)
    assert caught.value.details["needed"] == 1 << 60
