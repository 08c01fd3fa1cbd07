"""The whole way: from a model to a proven, judged version of the store; what cannot work is refused before."""

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import inhouse.api
from inhouse.cli.main import main
from inhouse.compress.calibrate import CalibrationOptions, calibrate, read_texts
from inhouse.compress.finish import Writer
from inhouse.compress.journal import Journal
from inhouse.compress.matrix import fitting
from inhouse.compress.memory import PeakMemory, anonymous_bytes
from inhouse.compress.pipeline import Compressed, compress, dry_run
from inhouse.compress.recipe import parse_recipe
from inhouse.compress.runs import list_runs
from inhouse.compress.seen import find_seen, text_record
from inhouse.compress.stages import StageRun
from inhouse.compress.work import Work
from inhouse.core.errors import CapacityError, ConflictError, NotFoundError, UsageError
from inhouse.runtime.form import Form
from inhouse.runtime.packed_stored import stored_nbytes
from inhouse.store.home import Home
from inhouse.store.store import Store
from inhouse.store.stored_model import TABLE
from tests.compress.tiny_models import make

pytestmark = [pytest.mark.torch, pytest.mark.native, pytest.mark.realdata]

TEXT = (
    "Once upon a time there was a little girl who liked to play in the park with her dog. One day the dog ran away. "
    "She looked for it behind the big tree, and there it was, asleep in the sun. They went home and were happy. "
)
GATE = "The sun was hot and the boy was thirsty. He asked his mom for some water. She gave him a big cup. "


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def model(stories: Path) -> str:
    return str(stories / "hf")


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, str]:
    files = {"calibration": TEXT * 4, "gate": GATE}
    for name, text in files.items():
        (tmp_path / f"{name}.txt").write_text(text)
    return {name: str(tmp_path / f"{name}.txt") for name in files}


def _document(texts: dict[str, str], **more: Any) -> dict[str, Any]:
    return {
        "calibration": {"texts": [texts["calibration"]], "samples": 4, "length": 48},
        "stages": [{"quantize": {"method": "gptq", "format": "q4_0", "include": ["layers.0"]}}],
        "gates": {"text": texts["gate"], "protocol": "window:32"},
        **more,
    }


def _compress(model: str, texts: dict[str, str], name: str = "small", **more: Any) -> Compressed:
    resume = more.pop("resume", None)
    return compress(model, name, parse_recipe(_document(texts, **more)), resume=resume)


def test_a_version_with_its_manifest_and_a_finished_run_is_known(model: str, texts: dict[str, str]) -> None:
    done = _compress(model, texts)
    assert done.fresh
    assert not done.failed
    result = done.result
    assert result["proof"]["tensors"] == 47
    assert result["proof"]["logits_error"] < 1e-4
    assert 0 < result["gate"]["kld_mean"] < 0.1
    with Store() as store:
        version = store.catalog.resolve("small")
        folder = store.folder(version)
    assert version.summary.gate == "measured"
    manifest = json.loads((folder / TABLE).read_text())["manifest"]
    assert manifest["recipe"]["stages"][0]["method"] == "gptq"
    assert manifest["texts"][0]["source"] == texts["calibration"]
    assert manifest["units"]["0.quantize/layers.0.mlp.down.weight"]["format"] == "q4_0"
    assert "seconds" not in json.dumps(manifest)
    again = _compress(model, texts)
    assert (again.fresh, again.ref) == (False, done.ref)
    other = _compress(model, texts, name="other")
    with Store() as store:
        assert store.catalog.resolve(other.ref).digest == version.digest
    (run,) = (run for run in list_runs(Home.find()) if run.name == "small")
    assert (run.state, run.units) == ("finished", len(manifest["units"]))
    assert run.nbytes < 20_000


def test_children_know_their_parent_and_eval_refuses_what_was_seen(
    model: str, texts: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    from inhouse.load.importer import import_model

    with Store() as store:
        import_model(Path(model), "base", store=store)
    _compress("base", texts)
    again = parse_recipe({"stages": [{"quantize": {"method": "round", "format": "q8_0", "include": ["embed"]}}]})
    compress("small", "smaller", again)
    with Store() as store:
        assert store.catalog.resolve("small").parent == "base:1"
        assert store.catalog.resolve("smaller").parent == "small:1"
    for name in ("small", "smaller"):  # the child of a calibrated model has seen the text, too
        assert _status(["eval", name, "--text", texts["calibration"], "--protocol", "window:64"]) == 2
        assert "calibrated or healed on this text" in capsys.readouterr().err
    assert _status(["eval", "small", "--text", texts["gate"], "--protocol", "window:64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"perplexity", "kld_mean", "kld_p99", "top1", "tokens", "protocol"} <= found.keys()
    assert _status(["eval", "small", "--text", texts["calibration"], "--protocol", "window:64", "--force"]) == 0
    assert "flatter" in capsys.readouterr().err


def test_excerpts_are_recognised_and_stock_phrases_are_not() -> None:
    book = " ".join(
        f"In chapter {i} the hero met number {i * 7} of them. Then it rained for {i} days." for i in range(80)
    )
    record = text_record("book", book)
    assert find_seen([book[2000:3500]], [record]) is record
    assert find_seen([f"A preface. {book} An end."], [record]) is record
    assert find_seen(["Then it rained for 3 days. The end."], [record]) is None


def _status(args: list[str]) -> int:
    with pytest.raises(SystemExit) as caught:
        main(args)
    return int(caught.value.code or 0)


def test_a_failed_gate_is_stored_as_failed_and_not_promoted(
    model: str, texts: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.json"  # JSON is YAML
    document = _document(texts, stages=[{"quantize": {"method": "rtn", "format": "u2_g32", "importance": False}}])
    document["gates"]["final"] = "near-lossless"
    recipe.write_text(json.dumps(document))
    assert _status(["compress", model, "bad", "--recipe", str(recipe)]) == 1
    assert "gate FAILED" in capsys.readouterr().out
    assert _status(["alias", "bad@prod", "bad:1"]) == 4
    assert "failed its quality gate" in capsys.readouterr().err
    assert _status(["alias", "bad@prod", "bad:1", "--force"]) == 0


def test_an_unfinished_run_of_another_recipe_is_in_the_way(
    model: str, texts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle, then another recipe: refused with the difference; then --resume and --restart."""
    left, append = 4, Journal.append

    def interrupted(self: Journal, line: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        append(self, line)

    monkeypatch.setattr(Journal, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _compress(model, texts)
    monkeypatch.setattr(Journal, "append", append)
    (run,) = list_runs(Home.find())
    assert (run.state, run.units) == ("unfinished", 2)
    with pytest.raises(ConflictError, match=r"the recipe's gates.protocol was 'window:32', is 'window:16'"):
        _compress(model, texts, gates={"text": texts["gate"], "protocol": "window:16"})
    stage = {"method": "gptq", "format": "q8_0", "damping": 0.5, "include": ["layers.0"]}
    with pytest.raises(ConflictError) as found:
        _compress(model, texts, stages=[{"quantize": stage}])
    said = found.value.details["differences"]
    assert "the recipe's stages[0].quantize.format was 'q4_0', is 'q8_0'" in said
    assert any(line.startswith("the recipe's stages[0].quantize.damping was 0.0") for line in said), said
    assert len(said) == 2
    text = Path(texts["calibration"])
    text.write_text(GATE[::-1] * 8)
    with pytest.raises(ConflictError, match=f"the calibration text {text} was .*, is "):
        _compress(model, texts)
    text.write_text(TEXT * 4)
    torch.set_num_threads(2)
    with pytest.raises(ConflictError, match="the number of threads was 1, is 2"):
        _compress(model, texts)
    torch.set_num_threads(1)
    with pytest.raises(NotFoundError, match="no unfinished run"):
        _compress(model, texts, name="another", resume=True)
    assert [run.name for run in list_runs(Home.find())] == ["small"]
    done = _compress(model, texts, resume=True)
    with Store() as store:
        resumed = store.catalog.resolve(done.ref).digest
    fresh = _compress(model, texts, resume=False)
    with Store() as store:
        assert store.catalog.resolve(fresh.ref).digest == resumed


def test_a_full_disk_in_the_middle_loses_nothing(model: str, texts: dict[str, str]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    from signal import SIG_IGN, SIGXFSZ, signal

    before = signal(SIGXFSZ, SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))  # what a quota does: EFBIG in a write
        with pytest.raises(CapacityError, match="disk is full"):
            _compress(model, texts, stages=[{"quantize": {"method": "round", "format": "f32"}}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal(SIGXFSZ, before)
    stages = [{"quantize": {"method": "round", "format": "f32"}}]
    assert _compress(model, texts, stages=stages).result["gate"]["kld_mean"] < 1e-9


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"budget": {"ram": "50MB"}}, CapacityError, "does not suffice"),
        ({"calibration": {"texts": []}, "stages": [{"quantize": {"method": "gptq", "format": "q4_k"}}],
          "gates": {"text": "none.txt"}}, NotFoundError, "none.txt"),
        ({"stages": [{"quantize": {"method": "gptq", "format": "q4_0", "include": ["layers.77"]}}]},
         UsageError, "selects no weight"),
        ({"stages": [{"quantize": {"method": "gptq", "format": "nvfp4", "include": ["layers.77"]}}]},
         UsageError, "selects no weight"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_it_begins(
    model: str, texts: dict[str, str], change: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        _compress(model, texts, **change)
    with Store() as store:
        assert store.catalog.versions() == []
    assert not list_runs(Home.find()), "what was refused leaves no folder"


def test_the_gate_is_no_text_that_was_calibrated_on(model: str, texts: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="calibrated on"):
        _compress(model, texts, gates={"text": texts["calibration"]})


def test_an_empty_calibration_file(model: str, texts: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UsageError, match="is empty"):
        _compress(model, texts, calibration={"texts": [str(tmp_path / "empty.txt")]})


def test_a_dry_run_says_what_will_be(model: str, texts: dict[str, str]) -> None:
    document = _document(texts, stages=[{"quantize": {"method": "gptq", "format": "q4_0"}}])
    plan = dry_run(model, parse_recipe(document))
    assert plan["exact"]
    assert plan["ram_needed"] > 0
    assert not list_runs(Home.find())
    done = compress(model, "small", parse_recipe(document))
    assert done.result["bytes"] == plan["bytes"]
    assert plan["bits_per_weight"] == pytest.approx(done.result["bits_per_weight"])


def test_equal_inputs_give_equal_bytes_by_library_too(model: str, texts: dict[str, str]) -> None:
    one = inhouse.compress(model, "one", _document(texts))  # type: ignore[operator]
    two = inhouse.api.compress(model, "two", _document(texts), resume=False)
    with Store() as store:
        assert store.catalog.resolve(one.ref).digest == store.catalog.resolve(two.ref).digest


def test_peak_memory_counts_what_is_anonymous(tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc on this system")
    with PeakMemory() as peak:
        before = anonymous_bytes()
        held = torch.ones(64 << 18)  # 64 MiB
    assert peak.peak - before >= held.nbytes
    (tmp_path / "file").write_bytes(os.urandom(1 << 20))
    grew: Callable[[], int] = anonymous_bytes
    assert grew() > 0


def test_stages_compose_in_one_form(model: str, texts: dict[str, str], tmp_path: Path) -> None:
    """Zeros, then factors, then codes: masks are held, factors are coded themselves, and all of it runs."""
    stages = [
        {"prune": {"method": "magnitude", "include": ["mlp.up"]}},
        {"lowrank": {"method": "svd", "include": ["mlp.down"]}},
        {"quantize": {"method": "gptq", "format": "i8_g64", "include": ["mlp"]}},
    ]
    with Work.open(model, tmp_path / "work") as work:
        recipe = parse_recipe(_document(texts, stages=stages))
        calibration = calibrate(
            read_texts([texts["calibration"]]), work.tokenizer, CalibrationOptions(samples=4, length=48)
        )
        for at, stage in enumerate(recipe.stages):
            StageRun(work, stage, f"{at}.{stage.kind}", calibration, 1 << 28).run()
        up, down = "layers.2.mlp.up.weight", "layers.2.mlp.down.weight"
        mask = work.mask(up)
        assert mask is not None
        assert 0.4 < float(mask.float().mean()) < 0.6
        assert not work.value(up)[~mask].any()
        form, factored = work.form(up), work.form(down)
        assert form is not None
        assert form.main is not None
        assert factored is not None
        assert factored.main is None
        assert {packed.format for _, packed in factored.matrices()} == {"i8_g64"}
        assert work.units()["2.quantize/" + down]["record"]["format"] == "i8_g64+i8_g64"
        written = Writer(work).value(up)
        assert isinstance(written, Form)
        assert written.main is not None
        assert written.main.format == "s8_g64"
        assert written.nbytes < stored_nbytes("i8_g64", (172, 64))  # fewer bytes than the plain codes
        assert all(work.form(name) is None for name in work.matrices() if ".mlp." not in name)


def test_experts_without_tokens_are_named(stories: Path, texts: dict[str, str], tmp_path: Path) -> None:
    folder = make("Mixtral", stories, tmp_path / "moe", num_local_experts=6, num_experts_per_tok=1)
    stages = [{"quantize": {"method": "gptq", "format": "q4_1", "include": ["moe"]}}]
    with Work.open(str(folder), tmp_path / "work") as work:
        recipe = parse_recipe(_document(texts, stages=stages))
        options = CalibrationOptions(samples=1, length=6)
        calibration = calibrate(read_texts([texts["gate"]]), work.tokenizer, options)
        StageRun(work, recipe.stages[0], "0.quantize", calibration, 1 << 28).run()
        records = {unit: line["record"] for unit, line in work.units().items() if line.get("record")}
        lonely = [unit for unit, record in records.items() if record.get("tokens") == 0]
        assert lonely
        for unit in lonely:
            (said,) = records[unit]["fallbacks"]
            assert said["tensor"] == unit.split("/")[1]
            assert (said["asked"], said["done"]) == ("gptq q4_1", "rtn q4_1 without statistics")
            assert said["why"] == "no calibration token reached it"
            assert records[unit]["method"] == "rtn"
        assert work.form("layers.0.moe.router.weight") is not None  # `include` names what is kept by default


def test_super_blocks_that_do_not_fit_become_groups(model: str, tmp_path: Path) -> None:
    assert fitting("q4_k", (64, 256)) == ("q4_k", "")
    fmt, note = fitting("q4_k", (64, 172))
    assert (fmt, "multiples of 256" in note) == ("q4_1", True)
    with Work.open(model, tmp_path / "work") as work:
        stage = parse_recipe({"stages": [{"quantize": {"method": "rtn", "format": "q4_k", "importance": False}}]})
        StageRun(work, stage.stages[0], "0.quantize", None, 1 << 28).run()
        assert {form.main.format for name in work.matrices() if (form := work.form(name)) and form.main} == {"q4_1"}
        said = [line["record"]["fallbacks"][0] for line in work.units().values() if line.get("record")]
        assert {one["tensor"] for one in said} == set(work.matrices())
        assert {(one["asked"], one["done"]) for one in said} == {("rtn q4_k", "rtn q4_1")}
