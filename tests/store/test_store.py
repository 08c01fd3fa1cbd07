"""The store as a whole: adding, viewing, removing, damage, and kill -9 at every step and at random moments."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from inhouse.core.errors import CapacityError, ConflictError, FormatError, NotFoundError, UnavailableError
from inhouse.store.blobs import hash_file
from inhouse.store.store import Store, check_inner_path
from inhouse.store.version import NewVersion, StoredFile, Summary
from tests.store.tables import dump

pytestmark = pytest.mark.null
NEW = NewVersion("m", "gguf", [], Summary())


@pytest.fixture
def store() -> Iterator[Store]:
    with Store() as store:
        yield store


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.gguf").write_bytes(os.urandom(1 << 20))
    (folder / "empty.txt").touch()
    return folder


def sources(folder: Path) -> list[tuple[str, Path]]:
    return [(path.name, path) for path in sorted(folder.iterdir())]


def listing(store: Store) -> list[str]:
    data = store.home.data
    files = [str(path.relative_to(data)) for path in data.rglob("*") if not path.name.startswith("catalog.db")]
    return [*sorted(files), dump(store)]


def test_a_version_is_seen_under_its_own_names(store: Store, source: Path) -> None:
    nested = [*sources(source), ("chat/one/tool.jinja", source / "config.json")]
    added = store.add(NEW, nested)
    view = store.folder(added.version)
    assert (view / "model.gguf").read_bytes() == (source / "model.gguf").read_bytes()
    assert (view / "chat/one/tool.jinja").read_text() == "{}"
    assert (view / "empty.txt").stat().st_size == 0
    assert store.folder(store.catalog.resolve("m")) == view
    assert store.check(deep=True) == []
    assert store.add(NEW, nested).new is False


def test_removing_frees_what_only_that_version_used(store: Store, source: Path) -> None:
    first = store.add(NEW, sources(source)).version
    (source / "model.gguf").write_bytes(b"another")
    second = store.add(NEW, sources(source)).version
    view = store.folder(first)
    removed, swept = store.remove("m:1")
    assert [version.ref for version in removed] == ["m:1"]
    assert swept is not None
    assert (swept.blobs, swept.nbytes) == (1, 1 << 20)
    assert not view.exists()
    assert store.check(deep=True) == []
    assert (store.folder(second) / "model.gguf").read_bytes() == b"another"


def test_a_child_shares_its_parents_files(store: Store, source: Path) -> None:
    parent = store.add(NEW, sources(source)).version
    shared = [file for file in parent.files if file.path == "config.json"]
    new = NewVersion("m", "gguf", shared, Summary(), parent="m:1", how="q4")
    (source / "model.gguf").write_bytes(b"smaller")
    child = store.add(new, [("model.gguf", source / "model.gguf")]).version
    assert child.parent == "m:1"
    assert (store.folder(child) / "config.json").read_text() == "{}"
    with pytest.raises(ConflictError):
        store.remove("m:1")


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../../x", "a//b", ".hidden", "a\\b", "a\nb", "x" * 600])
def test_paths_that_leave_the_model_are_refused(store: Store, source: Path, path: str) -> None:
    before = listing(store)
    with pytest.raises(FormatError, match="cannot be the path"):
        store.add(NEW, [(path, source / "config.json")])
    assert listing(store) == before


def test_a_failed_add_leaves_the_store_as_it_was(store: Store, source: Path) -> None:
    store.add(NEW, sources(source))
    before = listing(store)
    (source / "model.gguf").write_bytes(b"new content")
    with pytest.raises(NotFoundError):
        store.add(NEW, [("model.gguf", source / "model.gguf"), ("gone", source / "gone")], how="link")
    with pytest.raises(NotFoundError, match="no model"):
        store.add(NewVersion("n", "gguf", [], Summary(), parent="nothing"), sources(source))
    assert listing(store) == before


def test_a_blob_cut_short_later_is_found(store: Store, source: Path) -> None:
    version = store.add(NEW, sources(source)).version
    blob = next(file.blob for file in version.files if file.path == "model.gguf")
    path = store.blobs.path(blob)
    path.chmod(0o600)
    os.truncate(path, 1000)
    with pytest.raises(FormatError, match="1000 bytes, 1048576 were stored"):
        store.folder(version)
    assert "model.gguf does not have" in store.check()[0]
    with pytest.raises(FormatError):
        store.verify(version)
    store.add(NEW, sources(source))
    store.verify(version)


def _lose(view: Path) -> None:
    (view / "config.json").unlink()


def _retarget(view: Path) -> None:
    target = os.readlink(view / "model.gguf")
    (view / "config.json").unlink()
    (view / "config.json").symlink_to(target)


def _dangle(view: Path) -> None:
    (view / "chat/tool.jinja").unlink()
    (view / "chat/tool.jinja").symlink_to("../nothing")


def _replace(view: Path) -> None:
    (view / "config.json").unlink()
    (view / "config.json").write_text("{}")


def _add(view: Path) -> None:
    (view / "tokenizer.json").write_text("{}")


def _fold(view: Path) -> None:
    (view / "config.json").unlink()
    (view / "config.json").mkdir()


def _empty(view: Path) -> None:
    shutil.rmtree(view)
    view.mkdir()


def _file(view: Path) -> None:
    shutil.rmtree(view)
    view.write_text("")


def _elsewhere(view: Path) -> None:
    view.rename(view.parent.parent / "moved")
    view.symlink_to("../moved")


@pytest.mark.parametrize("damage", [_lose, _retarget, _dangle, _replace, _add, _fold, _empty, _file, _elsewhere])
def test_a_damaged_view_is_found_and_made_anew(store: Store, source: Path, damage: Callable[[Path], None]) -> None:
    files = [*sources(source), ("chat/tool.jinja", source / "model.gguf")]
    version = store.add(NEW, files).version
    assert store.check() == []  # a view that was never asked for is no fault
    view = store.folder(version)
    damage(view)
    assert ["m:1: its folder in views is damaged" in problem for problem in store.check()] == [True]
    assert store.folder(version) == view
    for path, original in files:
        assert (view / path).is_symlink()
        assert (view / path).resolve().parent == store.home.blobs.resolve()
        assert (view / path).read_bytes() == original.read_bytes()
    assert len([path for path in view.rglob("*") if not path.is_dir()]) == len(files)
    assert store.check(deep=True) == []
    assert list(store.home.tmp.iterdir()) == []


def test_a_whole_view_is_left_alone(store: Store, source: Path) -> None:
    version = store.add(NEW, sources(source)).version
    before = store.folder(version).stat().st_ino
    assert store.folder(version).stat().st_ino == before


def test_a_view_that_cannot_be_made_is_an_error_that_says_so(store: Store, source: Path) -> None:
    version = store.add(NEW, sources(source)).version
    store.home.views.rmdir()
    store.home.views.write_text("")
    with pytest.raises(UnavailableError, match="cannot be made"):
        store.folder(version)
    assert list(store.home.tmp.iterdir()) == []


def test_a_sweep_waits_for_those_who_add(store: Store) -> None:
    with store.adding():
        store.blobs.put_bytes(b"not yet named")
        with pytest.raises(CapacityError):
            store.sweep(grace_s=0, timeout_s=0)
    assert store.sweep(grace_s=3600).blobs == 0
    assert store.sweep(grace_s=0).blobs == 1


def test_adding_and_removing_in_threads_keeps_the_store_whole(store: Store, source: Path, tmp_path: Path) -> None:
    def work(number: int) -> None:
        own = tmp_path / f"own{number}"
        for round_ in range(6):
            own.write_bytes(bytes([number]) * (1000 + round_ % 2))
            name = f"m{number % 2}"
            version = store.add(NewVersion(name, "gguf", [], Summary()), [*sources(source), ("w", own)]).version
            if round_ % 2:
                store.remove(version.ref)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.check(deep=True) == []
    store.sweep(grace_s=0)
    assert set(store.blobs) == store.catalog.live_blobs()


def run_driver(home: Path, source: Path, action: str) -> list[dict[str, Any]]:
    driver = Path(__file__).with_name("kill_driver.py")
    done = subprocess.run(
        [sys.executable, str(driver), str(home), str(source), action], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("action", ["add", "remove"])
def test_kill_9_at_every_step_leaves_the_store_whole(tmp_path: Path, source: Path, action: str) -> None:
    states = run_driver(tmp_path / "home", source, action)
    assert len(states) > 20, "the driver must have found many steps to die at"
    for state in states:
        assert state["problems"] == state["leftovers"] == state["unswept"] == state["missing"] == [], state
        assert state["versions"] in ([], [["m:1", 3]]) or state["versions"][0][1] == 3, state
    ended = states[-1]
    assert ended["step"] is None
    assert len(ended["versions"]) == (1 if action == "add" else 0)


def test_kill_9_at_random_moments_leaves_the_store_whole(store: Store, source: Path) -> None:
    script = (
        "import sys, itertools; from pathlib import Path\n"
        "from inhouse.store.store import Store\n"
        "from inhouse.store.version import NewVersion, Summary\n"
        "store = Store(); source = Path(sys.argv[1]); print('go', flush=True)\n"
        "for n in itertools.count():\n"
        "    (source / 'own').write_bytes(str(n).encode() * 50000)\n"
        "    new = NewVersion('m', 'gguf', [], Summary())\n"
        "    v = store.add(new, [(p.name, p) for p in sorted(source.iterdir())]).version\n"
        "    store.folder(v)\n"
        "    n % 3 or store.remove(v.ref)\n"
    )
    random.seed(1)
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", script, str(source)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(random.uniform(0.0, 0.25))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert store.check(deep=True) == []
        assert all(len(version.files) == 4 for version in store.catalog.versions())
    store.sweep(grace_s=0)
    assert set(store.blobs) == store.catalog.live_blobs()
    assert list(store.home.tmp.iterdir()) == []
    assert len(store.catalog.versions()) > 0


def test_inner_paths_that_are_fine() -> None:
    for path in ("config.json", "model-00001-of-00002.safetensors", "a/b/c.jinja", "模型.gguf"):
        assert check_inner_path(path) == path


def test_version_files_carry_their_hash(store: Store, source: Path) -> None:
    version = store.add(NEW, sources(source)).version
    assert StoredFile("config.json", hash_file(source / "config.json"), 2) in version.files
