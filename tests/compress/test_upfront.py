"""What a recipe cannot do is refused before any work; what it does less than it says is noted."""

import dataclasses
import io
import math
import typing
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch

from inhouse.cli.main import main
from inhouse.cli.output import ProgressBar
from inhouse.compress.auto import AutoOptions, _budget
from inhouse.compress.calibrate import CalibrationOptions, calibrate, read_texts
from inhouse.compress.fallbacks import grouped, of_records
from inhouse.compress.merge import parse_ingredient
from inhouse.compress.methods.merging import MergeOptions, check_sum
from inhouse.compress.pipeline import dry_run
from inhouse.compress.recipe import load_recipe, parse_recipe
from inhouse.compress.runs import RunState
from inhouse.compress.stages import StageRun
from inhouse.compress.table import METHODS
from inhouse.compress.units import units_of
from inhouse.compress.values import Range
from inhouse.compress.work import Work
from inhouse.core.errors import FormatError, InhouseError, NotFoundError, UsageError
from tests.load.checkpoints import change, copy_hf

pytestmark = [pytest.mark.torch]


def _refused(document: dict[str, Any]) -> UsageError:
    with pytest.raises(UsageError) as caught:
        parse_recipe(document)
    assert caught.value.remedy
    return caught.value


def _quantize(**more: Any) -> dict[str, Any]:
    return {"stages": [{"quantize": {"method": "gptq", "format": "q4_0", **more}}]}


@pytest.mark.parametrize(
    ("document", "key"),
    [
        (_quantize(damping=-1), "stages[0].quantize.damping"),
        (_quantize(damping=math.nan), "stages[0].quantize.damping"),
        (_quantize(damping="nan"), "stages[0].quantize.damping"),
        (_quantize(block=0), "stages[0].quantize.block"),
        (_quantize(overrides={"mlp": {"damping": math.inf}}), "stages[0].quantize.overrides.mlp.damping"),
        ({**_quantize(), "gates": {"max_kld": math.nan}}, "gates.max_kld"),
        ({**_quantize(), "gates": {"max_rise": -0.1}}, "gates.max_rise"),
        ({**_quantize(), "gates": {"final": "goood"}}, "gates.final"),
        ({**_quantize(), "calibration": {"samples": 0}}, "calibration.samples"),
        ({**_quantize(), "calibration": {"mix": {"a": math.inf}}}, "calibration.mix.a"),
        ({**_quantize(), "budget": {"ram": math.inf}}, "budget.ram"),
        ({"stages": [{"finetune": {"rate": "inf"}}]}, "stages[0].finetune.rate"),
        ({"stages": [{"quantize": {"method": "signround", "format": "q4_0", "clip": [1]}}]}, "stages[0].quantize.clip"),
        ({"stages": [{"quantize": {"method": "auto", "drift": {"ridge": -1}}}]}, "stages[0].quantize.drift.ridge"),
        ({"stages": [{"prune": {"method": "structured"}}]}, "stages[0].prune"),
        ({"stages": [{"smooth": {"method": "hadamard", "stream": False, "heads": False}}]}, "stages[0].smooth"),
        ({"stages": [{"distill": {"response": 0}}]}, "stages[0].distill"),
        ({"stages": [{"merge": {"method": "linear"}}]}, "stages[0].merge"),
    ],
)
def test_numbers_and_stages_that_do_nothing_are_refused_by_key(document: dict[str, Any], key: str) -> None:
    error = _refused(document)
    assert error.message.startswith(key)
    assert error.param == key


def test_every_number_of_every_method_has_a_range() -> None:
    def lacking(kind: type) -> list[str]:
        found = []
        for name, hint in typing.get_type_hints(kind, include_extras=True).items():
            if isinstance(hint, type) and dataclasses.is_dataclass(hint):
                found += lacking(hint)
            parts = [hint, *typing.get_args(hint)] if typing.get_origin(hint) is not Annotated else [hint]
            if str in parts:  # `2:4` or a share: read by sparsity.parse_pattern
                continue
            found += [f"{kind.__name__}.{name}" for part in parts if part in (int, float)]
            ranges = [m for part in parts if typing.get_origin(part) is Annotated for m in typing.get_args(part)[1:]]
            assert all(isinstance(one, Range) for one in ranges)
        return found

    kinds = {row.options for row in METHODS.values()} | {CalibrationOptions}
    assert [name for kind in kinds for name in lacking(kind)] == []


def test_a_mistyped_key_comes_before_one_that_is_needed() -> None:
    error = _refused({"stages": [{"quantize": {"metod": "gptq", "format": "q4_0"}}]})
    assert error.message == "stages[0].quantize.metod: there is no such key"
    assert error.remedy == "Did you mean method?"
    assert "expected" not in _refused(_quantize(overrides={"mlp": {"include": ["x"]}})).message


def test_the_format_of_awq_is_its_option() -> None:
    stage = parse_recipe({"stages": [{"smooth": {"method": "awq", "format": "q4_0"}}]}).stages[0]
    assert stage.options.format == "q4_0"


def test_an_empty_recipe_file(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("# nothing\n")
    with pytest.raises(UsageError, match="is empty") as caught:
        load_recipe(tmp_path / "r.yaml")
    assert "stages" in caught.value.remedy


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf", "1e39"])
def test_weights_of_a_merge_must_be_finite(weight: str) -> None:
    with pytest.raises(UsageError, match="not finite") as caught:
        parse_ingredient(f"ed:{weight}")
    assert caught.value.remedy


def test_an_overflow_blames_the_weights() -> None:
    with pytest.raises(UsageError, match="with the weights 1e\\+30, 2") as caught:
        check_sum("a", torch.tensor([float("inf")]), [1e30, 2.0])
    assert "smaller weights" in caught.value.remedy


def test_options_of_a_merge() -> None:
    with pytest.raises(UsageError, match="^density is 0") as caught:
        MergeOptions("ties", density=0.0)
    assert "above 0 and at most 1" in caught.value.remedy
    with pytest.raises(UsageError) as near:
        MergeOptions("tis")
    assert near.value.remedy == "Did you mean ties?"


# On a model.

Q4: dict[str, Any] = {"quantize": {"method": "round", "format": "q4_0"}}
Q8: dict[str, Any] = {"quantize": {"method": "round", "format": "q8_0"}}


def _plan(stories: Path, stages: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return dry_run(str(stories / "hf"), parse_recipe({"stages": stages, **more}))


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([Q4, Q8], r"stages\[1\] \(quantize round q8_0\) takes all 36 weights of stages\[0\] \(quantize round q4_0\)"),
        (
            [{"prune": {"method": "magnitude", "sparsity": share}} for share in (0.5, 0.2)],
            r"stages\[1\] \(prune magnitude 0.2\) adds no zeros to those of stages\[0\] \(prune magnitude 0.5\)",
        ),
        ([{"qat": {}}], "there is none: no stage quantizes"),
    ],
)
def test_stages_of_which_nothing_would_be_left(stories: Path, stages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        _plan(stories, stages)
    assert caught.value.remedy


@pytest.mark.realdata
def test_what_a_later_stage_replaces_and_patterns_that_match_nothing_are_told(stories: Path) -> None:
    again = {"quantize": {**Q8["quantize"], "include": ["mlp.down", "mlp.dwn"], "exclude": ["nosuchthing"]}}
    notes = _plan(stories, [Q4, again])["notes"]
    assert any("replaces what stages[0] (quantize round q4_0) made of 5 of its 36 weights" in one for one in notes)
    assert any("stages[1].quantize.include: 'mlp.dwn' matches no weight (nearest: mlp.down" in one for one in notes)
    assert any("stages[1].quantize.exclude: 'nosuchthing' matches no weight" in one for one in notes)


@pytest.mark.realdata
def test_files_of_the_gate_are_read_first(stories: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("no question at all\n")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"questions": str(tmp_path / "one.txt")}, "is no question"),
        ({"text": str(tmp_path / "none.txt")}, "there is no gate text"),
        ({"protocol": "windw:4"}, "unknown protocol"),
    ]
    for gates, message in cases:
        with pytest.raises((UsageError, NotFoundError), match=message) as caught:
            _plan(stories, [Q4], gates=gates)
        assert isinstance(caught.value, InhouseError)
        assert caught.value.remedy


@pytest.mark.realdata
def test_a_length_beyond_the_context_is_told(stories: Path, tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("Once upon a time there was a girl. " * 40)
    stages = [{"quantize": {"method": "gptq", "format": "q4_0"}}]
    calibration = {"texts": [str(tmp_path / "c.txt")], "samples": 2, "length": 100_000}
    plan = _plan(stories, stages, calibration=calibration)
    assert any("calibration.length 100000 is beyond the model's context" in one for one in plan["calibration"]["notes"])


# What was not done as asked.


@pytest.mark.realdata
def test_every_fallback_names_its_tensor_and_groups_are_counted(stories: Path, tmp_path: Path) -> None:
    stage = parse_recipe({"stages": [{"quantize": {"method": "round", "format": "q2_k"}}]}).stages[0]
    with Work.open(str(stories / "hf"), tmp_path) as work:
        StageRun(work, stage, "0.quantize", None, 1 << 28).run()
        records = {unit: line["record"] for unit, line in work.units().items() if line.get("record")}
        found = of_records(records)
        assert {one["tensor"] for one in found} == set(work.matrices())
        assert {(one["asked"], one["done"]) for one in found} == {("round q2_k", "round u2_g32")}
        assert {form.main.format for name in work.matrices() if (form := work.form(name)) and form.main} == {"u2_g32"}
        told = grouped(found)
        assert sum(int(one.split(" was asked for ")[1].split(" ")[0]) for one in told) == len(found)
        assert all("and" in one and "more" in one for one in told if len(found) > 3 * len(told))


@pytest.mark.realdata
def test_a_stage_none_of_whose_weights_got_the_method_is_an_error(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inhouse.compress.feedback.inverse_factor", lambda hessian, damping: None)
    document = {"stages": [{"quantize": {"method": "gptq", "format": "q4_0", "include": ["layers.0.attn"]}}]}
    (tmp_path / "c.txt").write_text("Once upon a time there was a girl. " * 20)
    with Work.open(str(stories / "hf"), tmp_path / "run") as work:
        options = CalibrationOptions(samples=1, length=16)
        calibration = calibrate(read_texts([tmp_path / "c.txt"]), work.tokenizer, options)
        run = StageRun(work, parse_recipe(document).stages[0], "0.quantize", calibration, 1 << 28)
        with pytest.raises(UsageError, match="no weight was done by gptq.*layers.0.attn.*does not factor") as caught:
            run.run()
        assert "Name the method that was used" in caught.value.remedy


@pytest.mark.realdata
def test_what_a_method_refuses_names_the_weight(stories: Path, tmp_path: Path) -> None:
    stage = parse_recipe({"stages": [{"quantize": {"method": "round", "format": "vq2_row"}}]}).stages[0]
    with Work.open(str(stories / "hf"), tmp_path) as work:
        with pytest.raises(UsageError, match=r"^embed.weight \(round vq2_row\): ") as caught:
            StageRun(work, stage, "0.quantize", None, 1 << 28).run()
        assert caught.value.remedy


def test_progress_counts_what_it_says() -> None:
    stream = io.StringIO()
    units = units_of(parse_recipe({"stages": [Q4, {"repair": {"method": "eora"}}]}))
    bar = ProgressBar(stream, units=units)
    lines = {stage: bar_line(bar, stage) for stage in ("evaluating", "quantize round", "verify weights")}
    assert "5 of 10 tokens" in lines["evaluating"]
    assert "5 of 10 weights" in lines["quantize round"]
    assert "5 B of 10 B" in lines["verify weights"]


def bar_line(bar: ProgressBar, stage: str) -> str:
    bar(stage, 5, 10)
    return bar._line(5, 10, 0.0)


def test_the_list_of_runs_reads_well(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    state = RunState("small", "unfinished", "stories", "quantize gptq q4_0", 12, 3_400_000, "2026-01-01T00:00:00Z")
    monkeypatch.setattr("inhouse.compress.runs.list_runs", lambda home: [state])
    with pytest.raises(SystemExit) as ended:
        main(["compress", "--runs"])
    assert not ended.value.code
    head, line = capsys.readouterr().out.splitlines()
    assert "ON DISK" in head
    assert "NBYTES" not in head
    assert "3.2 MiB" in line
    assert "3400000" not in line


@pytest.mark.realdata
@pytest.mark.parametrize(("options", "asked"), [({"bytes": 100}, "bytes: 100 "), ({"bits": 0.5}, "bits: 0.5 \\(")])
def test_a_budget_that_cannot_be_met_speaks_in_the_units_it_was_given_in(
    stories: Path, tmp_path: Path, options: dict[str, Any], asked: str
) -> None:
    recipe = parse_recipe({"stages": [{"quantize": {"method": "auto", **options}}]})
    with Work.open(str(stories / "hf"), tmp_path) as work:
        names = [name for name in work.matrices() if work.value(name).ndim == 2]
        vectors = sum(4 * math.prod(work.shape(name)) for name in work.names() if name not in names)
        with pytest.raises(UsageError, match=f"^{asked}.*cannot be reached.* {vectors} bytes: ") as caught:
            _budget(work, recipe.stages[0].options, names)
        assert "-" not in caught.value.message
        least = int(caught.value.remedy.split("bytes: ")[1].split()[0])
        assert _budget(work, AutoOptions(bytes=least), names) == least - vectors


@pytest.mark.realdata
def test_weights_that_are_not_finite_are_named(stories: Path, tmp_path: Path) -> None:
    folder = copy_hf(stories, tmp_path / "nan")
    name = "model.layers.1.mlp.up_proj.weight"

    def spoil(arrays: dict[str, Any]) -> None:
        arrays[name] = arrays[name].copy()
        arrays[name][0, 0] = np.nan

    change(folder, spoil)
    with pytest.raises(FormatError, match=name) as caught:
        dry_run(str(folder), parse_recipe({"stages": [Q4]}))
    assert caught.value.remedy
    assert "--quantize" not in str(caught.value)
