"""Opening models: every way to name one, what is decided on the way, and what goes wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inhouse.core.errors import FormatError, NotFoundError, UnavailableError, UnsupportedError, UsageError
from inhouse.load import locate as locating
from inhouse.load.importer import import_model
from inhouse.load.model import LoadedModel, choose_kv_dtype, open_model
from inhouse.runtime.packed import Packed
from inhouse.store.home import Home
from inhouse.store.store import Store
from tests.load.checkpoints import copy_hf, greedy

pytestmark = [pytest.mark.torch, pytest.mark.realdata]


def opened(reference: str | Path, **options: Any) -> LoadedModel:
    return open_model(str(reference), executor="torch", **options)


@pytest.mark.native
@pytest.mark.parametrize("executor", ["native", "torch"])
@pytest.mark.parametrize("file", ["hf", "stories260K-F32.gguf"])
def test_greedy_text_equals_the_golden_one(stories: Path, file: str, executor: str) -> None:
    golden = json.loads((stories / "golden.json").read_text())["greedy"]
    model = open_model(str(stories / file), executor=executor, threads=1)
    assert model.executor.name.startswith(executor)
    assert model.executor.kv_dtype == "f32"
    # All of it on the native executor; the torch one, slow a token, is held to it by its own tests.
    cases, count = (golden, 200) if executor == "native" else (golden[1:2], 24)
    for case in cases:
        count = min(count, len(case["output_ids"]))
        assert model.tokenizer.encode(case["prompt"]) == case["prompt_ids"]
        assert greedy(model, case["prompt_ids"], count) == case["output_ids"][:count]
    model.close()


def test_stored_models_open_by_every_name(stories: Path) -> None:
    with Store() as store:
        import_model(stories / "hf", "stories", store=store)
        import_model(stories / "stories260K-Q8_0.gguf", "stories", store=store)
        store.catalog.set_alias("stories@prod", "stories:1")
        digests = [version.digest for version in store.catalog.versions()]
    for reference, number in (("stories", 2), ("stories:1", 1), ("stories@prod", 1), ("stories:latest", 2)):
        model = opened(reference)
        assert (model.name, model.version, model.digest) == ("stories", number, digests[number - 1])
        model.close()


def test_a_path_has_the_digest_that_the_store_would_give_it(stories: Path) -> None:
    with Store() as store:
        stored = import_model(stories / "hf", store=store).version
    for cache in ("made", "mapped"):
        model = opened(stories / "hf")
        assert (model.digest, model.version, model.report.cache) == (stored.digest, 0, cache)
        model.close()
    model = opened(stories / "hf", cache=False)
    assert (model.digest, model.report.cache) == (stored.digest, "off")
    model.close()


def test_the_cache_gives_the_same_weights(stories: Path) -> None:
    models = [opened(stories / "stories260K-Q5_0.gguf", quantize="q8", cache=cache) for cache in (False, True, True)]
    assert [model.report.cache for model in models] == ["off", "made", "mapped"]
    for name, weight in models[0].weights.items():
        for other in models[1:]:
            found = other.weights[name]
            if isinstance(weight, Packed):
                assert isinstance(found, Packed)
                assert np.array_equal(weight.data, found.data)
            else:
                assert np.array_equal(weight, np.asarray(found))
    assert models[2].mapping is not None
    for model in models:
        model.close()


def test_a_damaged_cache_is_made_anew_with_a_note(stories: Path) -> None:
    opened(stories / "hf").close()
    pack = next(Home.find().packs.glob("*.pack"))
    data = bytearray(pack.read_bytes())
    data[5000] ^= 4
    pack.write_bytes(data)
    model = opened(stories / "hf")
    assert model.report.cache == "made"
    assert any("made anew" in note for note in model.report.notes)
    model.close()
    opened(stories / "hf").close()


def test_exchanged_words_in_the_cache_cost_a_note_not_the_answer(stories: Path) -> None:
    model = opened(stories / "hf", quantize="q8")
    expected = greedy(model, [1, 403], 8)
    model.close()
    pack = next(Home.find().packs.glob("*.pack"))
    data = pack.read_bytes()
    pack.write_bytes(data[:4096] + data[4104:4112] + data[4096:4104] + data[4112:])
    model = opened(stories / "hf", quantize="q8")
    assert model.report.cache == "made"
    assert any("made anew" in note for note in model.report.notes)
    assert greedy(model, [1, 403], 8) == expected
    model.close()


def test_a_stored_model_with_a_damaged_view_opens(stories: Path) -> None:
    with Store() as store:
        view = store.folder(import_model(stories / "hf", "stories", store=store).version)
    (view / "tokenizer.json").unlink()
    opened("stories").close()
    assert (view / "tokenizer.json").read_bytes() == (stories / "hf" / "tokenizer.json").read_bytes()


def test_a_changed_model_is_packed_again(stories: Path, tmp_path: Path) -> None:
    folder = copy_hf(stories, tmp_path / "m")
    opened(folder).close()
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    model = opened(folder)
    assert model.report.cache == "made"
    model.close()


def test_a_cache_that_cannot_be_written_only_costs_a_note(stories: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    model = opened(stories / "hf", home=Home(tmp_path / "data", tmp_path / "file" / "cache"))
    assert model.report.cache == "off"
    assert "not kept" in model.report.notes[0]
    model.close()


def test_report_says_what_was_done(stories: Path) -> None:
    model = opened(stories / "hf", quantize="q4")
    assert model.report.formats == {"q6_0": 1, "q4_0": 35}
    assert 100_000 < model.report.nbytes < 400_000
    assert {"describe", "weights", "tokenizer", "executor"} <= set(model.report.seconds)
    kinds = [op.kind for op in model.programs.programs["step"].ops]
    assert "quantize_rows" in kinds
    assert "quantize_rows" not in [op.kind for op in model.plain_programs.programs["step"].ops]
    assert model.generation == {"do_sample": False}
    assert model.chat_template.is_default
    model.close()


@pytest.mark.parametrize(
    ("wish", "formats", "chosen"),
    [("auto", ["f32"], "f32"), ("auto", ["f32", "f16"], "f16"), ("auto", ["q4_0"], "f16"), ("bf16", ["f32"], "bf16")],
)
def test_kv_dtype_auto(wish: str, formats: list[str], chosen: str) -> None:
    assert choose_kv_dtype(wish, formats) == chosen


def test_context_is_limited_and_never_stretched(stories: Path) -> None:
    model = opened(stories / "hf", context=128)
    assert model.spec.context_length == model.programs.context_length == 128
    model.close()
    for context in (0, 513):
        with pytest.raises(UsageError, match=f"context of {context} was asked for, the model has 512"):
            opened(stories / "hf", context=context)


def test_wrong_wishes_are_refused(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="unknown executor"):
        open_model(str(stories / "hf"), executor="abacus")
    with pytest.raises(UsageError, match="unknown KV type"):
        opened(stories / "hf", kv_dtype="f64")
    with pytest.raises(UnsupportedError, match="runs on the CPU"):
        open_model(str(stories / "hf"), executor="native", device="cuda")
    monkeypatch.setitem(__import__("sys").modules, "inhouse.runtime.torch_executor", None)
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises((UnavailableError, ModuleNotFoundError)):
        opened(stories / "hf")


def test_unknown_models_are_named_with_a_hint(stories: Path) -> None:
    with Store() as store:
        import_model(stories / "hf", "stories", store=store)
    with pytest.raises(NotFoundError, match="Did you mean stories"):
        opened("storys")
    with pytest.raises(NotFoundError, match="no file or folder"):
        opened("./nowhere")
    with pytest.raises(UsageError, match="is no model"):
        opened("")


def test_a_damaged_store_is_said(stories: Path) -> None:
    with Store() as store:
        version = import_model(stories / "hf", "stories", store=store).version
        path = store.blobs.path(next(file.blob for file in version.files if file.path == "model.safetensors"))
        path.chmod(0o600)
        path.write_bytes(b"short")
    with pytest.raises(FormatError, match="5 bytes, 1044992 were stored"):
        opened("stories")


def test_demo_is_the_embedded_folder_unless_the_store_has_one(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded = copy_hf(stories, tmp_path / "embedded")
    monkeypatch.setattr(locating, "DEMO_FOLDER", embedded)
    model = opened("demo")
    assert (model.name, model.version) == ("demo", 0)
    model.close()
    assert not Home.find().catalog.exists(), "the demo needs no store"
    with Store() as store:
        import_model(stories / "stories260K-F16.gguf", "demo", store=store)
    model = opened("demo")
    assert (model.name, model.version) == ("demo", 1)
    model.close()


def test_a_gguf_brings_its_tokenizer_and_template(stories: Path) -> None:
    text = "Once upon a time, 你好"
    model, other = opened(stories / "stories260K-Q8_0.gguf"), opened(stories / "hf")
    assert model.tokenizer.encode(text) == other.tokenizer.encode(text)
    model.close()
    other.close()
