"""What a model was calibrated on is known after an export and an import, and of a merge of such models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from inhouse.compress.merge import Ingredient, merge_models
from inhouse.compress.methods.merging import MergeOptions
from inhouse.compress.pipeline import compress
from inhouse.compress.recipe import parse_recipe
from inhouse.compress.seen import refuse_seen
from inhouse.core.errors import UsageError
from inhouse.load import seen_texts
from inhouse.load.export import export_model
from inhouse.load.importer import import_model
from inhouse.store.store import Store
from tests.compress.tiny_models import make

pytestmark = [pytest.mark.torch, pytest.mark.native, pytest.mark.realdata]

TEXT = (
    "Once upon a time there was a little girl who liked to play. One day the dog ran away. She looked for it behind "
    "the big tree. There it was, asleep in the sun. They went home and were happy. The end came. It was a good end. "
)


@pytest.fixture
def calibrated(stories: Path, tmp_path: Path) -> str:
    """A version whose parent, not itself, was calibrated on TEXT."""
    torch.set_num_threads(1)
    text = tmp_path / "private" / "told.txt"
    text.parent.mkdir()
    text.write_text(TEXT)
    model = make("Llama", stories, tmp_path / "m")
    stages = [{"quantize": {"method": "rtn", "format": "q8_0"}}]
    calibration = {"texts": [str(text)], "samples": 2, "length": 32}
    compress(str(model), "parent", parse_recipe({"stages": stages, "calibration": calibration}))
    return compress(
        "parent", "child", parse_recipe({"stages": [{"quantize": {"method": "round", "format": "f32"}}]})
    ).ref


@pytest.mark.parametrize("form", ["safetensors", "gptq", "gguf"])
def test_exported_and_imported(calibrated: str, tmp_path: Path, form: str) -> None:
    out = tmp_path / ("out.gguf" if form == "gguf" else "out")
    report = export_model(calibrated, form, out)
    assert any("calibrated or healed" in note for note in report.notes)
    files = [out] if out.is_file() else [file for file in out.rglob("*") if file.is_file()]
    assert not any(str(tmp_path).encode() in file.read_bytes() for file in files), "no path of this machine goes along"
    with Store() as store:
        ref = import_model(out, "brought", store=store).version.ref
        assert store.catalog.resolve(ref).parent is None
    excerpt = ". ".join(TEXT.split(". ")[1:7])  # a part of it, not the whole
    for asked in (ref, str(out)):
        for text in (TEXT, excerpt):
            with pytest.raises(UsageError, match=r"calibrated or healed on this text \(told.txt\)"):
                refuse_seen(asked, [text])
        assert refuse_seen(asked, ["Something else. It is new. Nobody saw it. Not one of them. Truly."]) is None


def test_a_merge_has_seen_what_its_models_have(calibrated: str, stories: Path, tmp_path: Path) -> None:
    export_model(calibrated, "safetensors", tmp_path / "floats", wish="f32")
    plain = str(make("Llama", stories, tmp_path / "plain"))
    with Store() as store:
        models = [Ingredient(str(tmp_path / "floats"), 0.5)]
        merged = merge_models(plain, models, "merged", MergeOptions("task_arithmetic"), store=store).version.ref
    with pytest.raises(UsageError, match="calibrated or healed"):
        refuse_seen(merged, [TEXT])


def test_a_string_too_long_keeps_every_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen_texts, "seen_by", lambda reference, home: [(reference, [_record(i) for i in range(9)])])
    whole = json.loads(seen_texts.seen_text(["m"]))
    assert all(len(record["windows"]) == 64 * 16 for record in whole)
    monkeypatch.setattr(seen_texts, "MOST_BYTES", 5000)
    short = seen_texts.seen_text(["m"])
    assert len(short) <= 5000
    assert [record["sha256"] for record in json.loads(short)] == [record["sha256"] for record in whole]


def _record(i: int) -> dict[str, Any]:
    return {
        "source": f"{i}.txt",
        "sha256": f"{i:064d}",
        "characters": 9,
        "windows": [f"{i:08d}{j:08d}" for j in range(64)],
    }


@pytest.mark.parametrize("said", ["[", "{}", '[{"source": 1}]', '[{"windows": 5}]', "[5]"])
def test_a_damaged_key_is_no_crash(stories: Path, tmp_path: Path, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Source:
        format, metadata = "gguf", {"inhouse.seen": said}

        def close(self) -> None: ...

    monkeypatch.setattr(seen_texts, "open_source", lambda path: Source())
    assert seen_texts.records_of(tmp_path / "x.gguf") == []
