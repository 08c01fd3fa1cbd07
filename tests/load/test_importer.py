"""Importing: the real files come in, everything wrong is named, and a refused file leaves the store as it was."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from inhouse.core.errors import CapacityError, FormatError, InhouseError, NotFoundError, UnsupportedError
from inhouse.load.importer import import_model
from inhouse.store.store import Store
from tests.load.checkpoints import Arrays, change, copy_hf
from tests.store.tables import dump

pytestmark = [pytest.mark.null, pytest.mark.realdata]
NOT_MODELS = ("catalog.db", "catalog.db-wal", "catalog.db-shm", "lock")
GGUF = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


@pytest.fixture
def store() -> Iterator[Store]:
    with Store() as store:
        yield store


@pytest.fixture
def folder(stories: Path, tmp_path: Path) -> Path:
    return copy_hf(stories, tmp_path / "stories")


def snapshot(store: Store) -> list[str]:
    data = store.home.data
    files = [str(path.relative_to(data)) for path in data.rglob("*") if path.name not in NOT_MODELS]
    return [*sorted(files), dump(store)]


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_hf_folder_comes_in_whole(store: Store, stories: Path) -> None:
    reports: list[tuple[str, int, int]] = []
    imported = import_model(stories / "hf", "stories", store=store, progress=lambda *report: reports.append(report))
    version = imported.version
    assert (version.ref, version.format, imported.new, imported.left_out) == ("stories:1", "safetensors", True, ())
    assert version.summary.parameters == 260_032
    assert (version.summary.family, version.summary.dtype, version.summary.context) == ("llama", "F32", 512)
    assert {file.path for file in version.files} == {path.name for path in (stories / "hf").iterdir()}
    assert any("no chat template" in note for note in imported.notes)
    assert {stage for stage, _, _ in reports} >= {"verify weights", "store model.safetensors"}
    assert all(0 < done <= total for _, done, total in reports)
    assert store.check(deep=True) == []


@pytest.mark.parametrize("kind", GGUF)
def test_every_gguf_comes_in(store: Store, stories: Path, kind: str) -> None:
    version = import_model(stories / f"stories260K-{kind}.gguf", store=store).version
    assert version.ref == f"stories260K-{kind}:1"
    assert (version.format, version.summary.dtype, version.summary.licence) == ("gguf", kind, "mit")


def test_the_same_content_is_the_same_version(store: Store, folder: Path) -> None:
    first = import_model(folder, store=store)
    before = snapshot(store)
    again = import_model(folder, store=store)
    assert (again.version, again.new) == (first.version, False)
    assert snapshot(store) == before
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    assert import_model(folder, store=store).version.number == 2


def test_what_is_left_out_is_said(store: Store, folder: Path) -> None:
    (folder / "modeling_custom.py").write_text("raise SystemExit")
    (folder / "onnx").mkdir()
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n# Stories\n")
    imported = import_model(folder, store=store)
    assert imported.left_out == ("modeling_custom.py", "onnx")
    assert imported.version.summary.licence == "mit"


def _remove(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink()


def _nan(arrays: Arrays) -> None:
    arrays["model.layers.2.mlp.gate_proj.weight"][7, 3] = np.nan


def _infinity(arrays: Arrays) -> None:
    arrays["model.norm.weight"][5] = np.inf


BROKEN: dict[str, tuple[Callable[[Path], object], type[InhouseError], str]] = {
    "missing tensor": (
        lambda f: change(f, lambda a: a.__delitem__("model.layers.4.self_attn.o_proj.weight")),
        FormatError,
        r"lacks 1 tensor: model\.layers\.4\.self_attn\.o_proj\.weight",
    ),
    "extra tensor": (
        lambda f: change(f, lambda a: a.update({"model.surprise": np.ones(3, np.float32)})),
        FormatError,
        r"model\.surprise",
    ),
    "shape": (
        lambda f: change(f, lambda a: a.update({"model.norm.weight": np.ones(63, np.float32)})),
        FormatError,
        r"\[63\], \[64\] was expected",
    ),
    "nan": (lambda f: change(f, _nan), FormatError, r"model\.layers\.2\.mlp\.gate_proj\.weight.*NaN"),
    "infinity": (lambda f: change(f, _infinity), FormatError, r"model\.norm\.weight.*NaN or infinite at element 5"),
    "cut weights": (lambda f: os.truncate(f / "model.safetensors", 500_000), FormatError, "500000"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), NotFoundError, "no weights"),
    "no config": (lambda f: (f / "config.json").unlink(), NotFoundError, r"config\.json"),
    "config is no json": (lambda f: (f / "config.json").write_text("{"), FormatError, r"config\.json"),
    "other layers": (lambda f: edit_json(f / "config.json", num_hidden_layers=6), FormatError, r"model\.layers\.5"),
    "other width": (lambda f: edit_json(f / "config.json", intermediate_size=173), FormatError, "172"),
    "unknown family": (
        lambda f: edit_json(f / "config.json", architectures=["NovelForCausalLM"]),
        UnsupportedError,
        "NovelForCausalLM",
    ),
    "no tokenizer": (
        lambda f: _remove(f, "tokenizer.json", "tokenizer.model"),
        NotFoundError,
        "no tokenizer",
    ),
    "cut tokenizer": (lambda f: os.truncate(f / "tokenizer.json", 5000), FormatError, r"tokenizer\.json"),
    "tokenizer of another model": (
        lambda f: edit_json(
            f / "tokenizer.json",
            added_tokens=[
                *json.loads((f / "tokenizer.json").read_text())["added_tokens"],
                {"id": 600, "content": "<beyond>", "special": True, "single_word": False, "lstrip": False,
                 "rstrip": False, "normalized": False},
            ],
        ),
        FormatError,
        r"ids up to 600|600",
    ),
    "generation_config": (
        lambda f: (f / "generation_config.json").write_text('{"temperature": "hot"}'),
        FormatError,
        "temperature",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_named_and_changes_nothing(store: Store, folder: Path, case: str) -> None:
    import_model(folder, "good", store=store)
    before = snapshot(store)
    breakage, error, message = BROKEN[case]
    breakage(folder)
    with pytest.raises(error, match=message):
        import_model(folder, "bad", store=store)
    assert snapshot(store) == before


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_truncated_ggufs_change_nothing(store: Store, stories: Path, tmp_path: Path, share: float) -> None:
    path = tmp_path / "cut.gguf"
    shutil.copyfile(stories / "stories260K-Q4_0.gguf", path)
    os.truncate(path, int(path.stat().st_size * share))
    before = snapshot(store)
    with pytest.raises(FormatError):
        import_model(path, store=store)
    assert snapshot(store) == before


def test_a_model_that_changes_while_imported_is_refused(store: Store, folder: Path) -> None:
    def change_config(stage: str, done: int, total: int) -> None:
        if stage == "store model.safetensors":
            (folder / "config.json").write_text((folder / "config.json").read_text() + " ")

    before = snapshot(store)
    with pytest.raises(FormatError, match="changed while it was imported"):
        import_model(folder, store=store, progress=change_config)
    assert snapshot(store) == before


def test_a_full_disk_is_said_with_numbers(store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(store)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(CapacityError, match=r"\d{7} bytes are to be stored, 1000 are free"):
        import_model(folder, store=store)
    assert snapshot(store) == before


@pytest.mark.parametrize("name", ["../up", "a:b", "", "a@b"])
def test_bad_names_are_refused_first(store: Store, folder: Path, name: str) -> None:
    with pytest.raises(InhouseError, match="model name"):
        import_model(folder, name, store=store)


def test_linked_and_moved_imports(store: Store, folder: Path, stories: Path, tmp_path: Path) -> None:
    linked = import_model(folder, store=store, how="link").version
    blob = next(file.blob for file in linked.files if file.path == "model.safetensors")
    assert store.blobs.path(blob).stat().st_ino == (folder / "model.safetensors").stat().st_ino
    with Store() as other:
        other.remove("stories")
    moved = copy_hf(stories, tmp_path / "moved")
    assert import_model(moved, store=store, how="move").version.name == "moved"
    assert not (moved / "model.safetensors").exists()
    assert store.check(deep=True) == []
