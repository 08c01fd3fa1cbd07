"""The stage `kv`: the model names its cache, everything that runs it takes that cache, and exports carry the name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from inhouse.cli.main import main
from inhouse.compress.pipeline import Compressed, compress, dry_run
from inhouse.compress.recipe import parse_recipe
from inhouse.core.errors import FormatError, UnsupportedError, UsageError
from inhouse.core.settings import load_settings
from inhouse.engine.session import Session
from inhouse.load.describe import describe
from inhouse.load.export import export_model
from inhouse.load.locate import locate
from inhouse.model.families.table import resolve
from inhouse.model.spec import ModelSpec
from inhouse.store.stored_model import TABLE
from tests.compress.tiny_models import make

pytestmark = [pytest.mark.torch, pytest.mark.native, pytest.mark.realdata]

TEXT = "The sun was hot and the boy was thirsty. He asked his mom for some water. She gave him a big cup. " * 4


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "judge.txt"
    path.write_text(TEXT.strip())
    return path


def _made(stories: Path, text: Path, kv: object, name: str) -> Compressed:
    gates = {"text": str(text), "protocol": "full", "baseline": False}
    return compress(str(stories / "hf"), name, parse_recipe({"stages": [{"kv": kv}], "gates": gates}))


def _json(capsys: pytest.CaptureFixture[str], *args: str) -> Any:
    with pytest.raises(SystemExit) as ended:
        main([*args, "--json"])
    assert ended.value.code == 0
    return json.loads(capsys.readouterr().out)


def test_the_type_is_stored_taken_and_measured(
    stories: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = _made(stories, text, {"k": "int8", "v": "int4"}, "narrow")
    kind = "k=int8,v=int4"
    gate = done.result["gate"]
    assert gate["kv_dtype"] == kind
    assert gate["kld_mean"] > 1e-6, "nothing but the cache differs, and it does"
    folder = locate("narrow").path
    assert json.loads((folder / "config.json").read_text())["inhouse_kv_cache"] == {"k": "int8", "v": "int4"}
    manifest = json.loads((folder / TABLE).read_text())["manifest"]
    assert manifest["units"]["0.kv/model"] == {"kv_cache": kind}
    assert manifest["summary"] == f"kv {kind}"
    with Session.open("narrow") as session:
        assert session.model.executor.kv_dtype == kind
    with Session.open("narrow", load_settings({"kv_dtype": "f16"})) as session:
        assert session.model.executor.kv_dtype == "f16", "--kv goes before it"
    report = json.loads(Path(done.result["report"]).with_suffix(".json").read_text())
    assert report["speed"]["after"]["kv_dtype"] == kind
    assert report["speed"]["after"]["kv_token"] < report["speed"]["before"]["kv_token"]
    said = _json(capsys, "eval", "narrow", "--text", str(text), "--reference", str(stories / "hf"))
    assert said["kv_dtype"] == kind
    assert said["kld_mean"] == pytest.approx(gate["kld_mean"], rel=1e-2)
    assert _json(capsys, "show", "narrow")["kv_cache"] == kind


def test_later_stages_and_children_keep_it(stories: Path, text: Path) -> None:
    _made(stories, text, "int8", "first")
    stages = [{"prune": {"method": "structured", "layers": 1}}, {"quantize": {"method": "round", "format": "q8_0"}}]
    calibration = {"texts": [str(text)], "samples": 2, "length": 32}
    compress("first", "second", parse_recipe({"stages": stages, "calibration": calibration}))
    with Session.open("second") as session:
        assert session.model.spec.layers == 4
        assert session.model.executor.kv_dtype == "int8"


@pytest.mark.parametrize("form", ["safetensors", "gptq", "gguf"])
def test_exports_carry_it(stories: Path, text: Path, tmp_path: Path, form: str) -> None:
    _made(stories, text, "int8", "child")
    out = tmp_path / ("out.gguf" if form == "gguf" else "out")
    report = export_model("child", form, out)
    assert any("int8" in note for note in report.notes)
    described = describe(out)
    described.source.close()
    assert isinstance(described.spec, ModelSpec)
    assert described.spec.kv_cache == "int8"


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([{"kv": "int9"}], "Did you mean int[48]"),
        ([{"kv": {"k": "int8", "w": "int8"}}], "no such key"),
        ([{"kv": {"k": "f16", "v": "int4"}}], "do not go together"),
        ([{"kv": {"k": "int8", "format": "q8_0"}}], "no such key"),
        ([{"kv": 8}], "is 8, allowed"),
        ([{"kv": "int8"}, {"kv": "f16"}], "twice"),
        ([{"kv": "int8"}, {"quantize": {"method": "round", "format": "q8_0"}}], "cannot come after kv"),
        ([{"attention": {"window": 64}}, {"kv": "int4"}], "cuts in every layer"),
    ],
)
def test_refused_as_it_is_read(stages: list[object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_recipe({"stages": stages})


def test_refused_before_any_work(stories: Path, tmp_path: Path) -> None:
    slid = make("Qwen2", stories, tmp_path / "m", use_sliding_window=True, sliding_window=8, max_window_layers=0)
    with pytest.raises(UnsupportedError, match="no layer of this model"):
        dry_run(str(slid), parse_recipe({"stages": [{"kv": "int4"}]}))
    dry_run(str(slid), parse_recipe({"stages": [{"kv": "int8"}]}))


def test_a_damaged_key(stories: Path) -> None:
    config = json.loads((stories / "hf" / "config.json").read_text())
    for said in ("int8", {"k": "int8"}, {"k": "int8", "v": "f16"}, {"k": 8, "v": 8}):
        with pytest.raises(FormatError, match="inhouse_kv_cache"):
            resolve(config | {"inhouse_kv_cache": said})
