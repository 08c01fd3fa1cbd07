"""The catalog: numbering, references, aliases, lineage, removal, concurrency, damage, schema versions."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from inhouse.core.errors import ConflictError, FormatError, NotFoundError, UnsupportedError, UsageError
from inhouse.store.catalog import Catalog
from inhouse.store.version import NewVersion, StoredFile, Summary

pytestmark = pytest.mark.null


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    catalog = Catalog(tmp_path / "catalog.db")
    yield catalog
    assert catalog.check() == []
    catalog.close()


def new(name: str, content: str, parent: str | None = None) -> NewVersion:
    files = [StoredFile("config.json", "c" * 64, 10), StoredFile("model.safetensors", content * 64, 99)]
    summary = Summary("llama", "LlamaForCausalLM", 260_000, "F32", 512, 512, "MIT")
    return NewVersion(name, "safetensors", files, summary, "/from", parent, "q4" if parent else None)


def test_versions_ascend_and_equal_content_is_the_same_version(catalog: Catalog) -> None:
    first, fresh = catalog.add_version(new("m", "a"))
    assert (first.ref, fresh, first.nbytes, first.summary.context) == ("m:1", True, 109, 512)
    assert catalog.add_version(new("m", "b"))[0].ref == "m:2"
    again, fresh = catalog.add_version(new("m", "a"))
    assert (again, fresh) == (first, False)
    assert catalog.add_version(new("other", "a"))[0].digest == first.digest
    assert [v.ref for v in catalog.versions()] == ["m:1", "m:2", "other:1"]
    assert catalog.resolve("m").ref == "m:2"
    assert catalog.resolve("m:1") == first


def test_numbers_are_never_given_twice(catalog: Catalog) -> None:
    for content in "abc":
        catalog.add_version(new("m", content))
    catalog.remove("m:3")
    assert catalog.add_version(new("m", "d"))[0].ref == "m:4"
    catalog.remove("m")
    with pytest.raises(NotFoundError):
        catalog.resolve("m")
    assert catalog.add_version(new("m", "e"))[0].ref == "m:5"


def test_unknown_references_hint_at_what_was_meant(catalog: Catalog) -> None:
    catalog.add_version(new("stories260K", "a"))
    with pytest.raises(NotFoundError, match="Did you mean stories260K"):
        catalog.resolve("stories260")
    with pytest.raises(NotFoundError, match="has versions 1"):
        catalog.resolve("stories260K:7")
    with pytest.raises(NotFoundError, match="no aliases"):
        catalog.resolve("stories260K@prod")
    with pytest.raises(UsageError):
        catalog.resolve("stories260K:x:y")


def test_aliases_move_and_hold_their_version(catalog: Catalog) -> None:
    for content in "ab":
        catalog.add_version(new("m", content))
    catalog.set_alias("m@prod", "m:1")
    catalog.set_alias("chat", "m:2")
    assert catalog.resolve("m@prod").number == 1
    assert catalog.resolve("m:prod").number == 1
    assert catalog.resolve("chat").aliases == ("chat",)
    assert catalog.aliases() == {"m@prod": "m:1", "chat": "m:2"}
    catalog.set_alias("m@prod", "m")
    assert catalog.resolve("m@prod").number == 2
    with pytest.raises(ConflictError, match="stands for"):
        catalog.remove("m:2")
    catalog.set_alias("m@prod", None)
    with pytest.raises(NotFoundError):
        catalog.set_alias("m@prod", None)
    catalog.remove("m:2", force=True)
    assert catalog.aliases() == {}


def test_aliases_and_models_do_not_share_a_name(catalog: Catalog) -> None:
    catalog.add_version(new("m", "a"))
    catalog.add_version(new("n", "a"))
    with pytest.raises(ConflictError, match="there is a model"):
        catalog.set_alias("n", "m:1")
    with pytest.raises(ConflictError, match="no version of"):
        catalog.set_alias("n@prod", "m:1")
    catalog.set_alias("chat", "m:1")
    with pytest.raises(ConflictError, match="is an alias"):
        catalog.add_version(new("chat", "a"))
    with pytest.raises(ConflictError, match="taken"):
        catalog.rename("m", "chat")


def test_lineage_survives_the_parent(catalog: Catalog) -> None:
    parent, _ = catalog.add_version(new("m", "a"))
    child, _ = catalog.add_version(new("m-q4", "b", parent="m"))
    assert (child.parent, child.parent_digest, child.how) == ("m:1", parent.digest, "q4")
    assert catalog.children("m:1") == ["m-q4:1"]
    with pytest.raises(ConflictError, match="m-q4:1 was made of m:1"):
        catalog.remove("m:1")
    catalog.remove("m", force=True)
    assert catalog.resolve("m-q4").parent == "m:1"
    assert catalog.resolve("m-q4").parent_digest == parent.digest


def test_a_model_and_its_own_children_go_together(catalog: Catalog) -> None:
    catalog.add_version(new("m", "a"))
    catalog.add_version(new("m", "b", parent="m:1"))
    assert [v.ref for v in catalog.remove("m")] == ["m:1", "m:2"]


def test_rename_takes_all_along(catalog: Catalog) -> None:
    for content in "ab":
        catalog.add_version(new("m", content))
    catalog.set_alias("m@prod", "m:1")
    catalog.add_version(new("gone", "x"))
    catalog.remove("gone")
    catalog.rename("m", "gone")
    assert catalog.resolve("gone@prod").ref == "gone:1"
    with pytest.raises(NotFoundError):
        catalog.resolve("m")
    with pytest.raises(NotFoundError):
        catalog.rename("m", "n")


def test_live_blobs_are_those_of_all_versions(catalog: Catalog) -> None:
    catalog.add_version(new("m", "a"))
    catalog.add_version(new("n", "b"))
    assert catalog.live_blobs() == {"a" * 64, "b" * 64, "c" * 64}
    catalog.remove("m")
    assert catalog.live_blobs() == {"b" * 64, "c" * 64}


def test_threads_of_one_and_many_catalogs_number_without_gaps(catalog: Catalog, tmp_path: Path) -> None:
    def add(own: bool, start: int) -> None:
        used = Catalog(tmp_path / "catalog.db") if own else catalog
        for index in range(10):
            files = [StoredFile("f", f"{start + index:064x}", 1)]
            used.add_version(NewVersion("m", "gguf", files, Summary()))
        if own:
            used.close()

    threads = [threading.Thread(target=add, args=(n % 2 == 0, 100 * n)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [v.number for v in catalog.versions()] == list(range(1, 41))


def test_processes_open_and_write_at_once(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from inhouse.store.catalog import Catalog\n"
        "from inhouse.store.version import NewVersion, StoredFile, Summary\n"
        "c = Catalog(Path(sys.argv[1]))\n"
        "[c.add_version(NewVersion('m','gguf',[StoredFile('f', f'{int(sys.argv[2])*100+i:064x}', 1)], Summary()))"
        " for i in range(5)]"
    )
    path = tmp_path / "catalog.db"
    running = [subprocess.Popen([sys.executable, "-c", script, str(path), str(n)]) for n in range(3)]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    catalog = Catalog(path)
    assert [v.number for v in catalog.versions()] == list(range(1, 16))
    catalog.close()


def test_damage_and_newer_schemas_are_said(tmp_path: Path) -> None:
    (tmp_path / "garbage.db").write_bytes(b"not a database at all, but long enough" * 100)
    with pytest.raises(FormatError, match="is damaged"):
        Catalog(tmp_path / "garbage.db")
    Catalog(tmp_path / "newer.db").close()
    db = apsw.Connection(str(tmp_path / "newer.db"))
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(UnsupportedError, match="schema 99"):
        Catalog(tmp_path / "newer.db")


def test_check_sees_a_version_that_was_tampered_with(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "c.db")
    catalog.add_version(new("m", "a"))
    other = apsw.Connection(str(tmp_path / "c.db"))
    other.execute("UPDATE files SET blob = ?", ("f" * 64,))
    other.close()
    assert catalog.check() == ["m:1: its files do not hash to its digest"]
    catalog.close()
