"""Recipes: what is unknown is refused with the nearest right word and its path; the order of stages holds."""

from pathlib import Path
from typing import Any

import pytest

from inhouse.compress.recipe import ANYWHERE, ORDER, load_recipe, matches, parse_recipe
from inhouse.compress.shorts import SHORTS, short_recipe
from inhouse.compress.table import METHODS
from inhouse.core.errors import UsageError

pytestmark = pytest.mark.torch


def _stages(*stages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"stages": list(stages), **more}


Q4 = {"quantize": {"method": "gptq", "format": "q4_0"}}


@pytest.mark.parametrize(
    ("document", "path", "hint"),
    [
        (_stages(Q4, calibrations={}), "calibrations", "Did you mean calibration?"),
        (_stages({"quantise": {}}), "stages[0].quantise", "Did you mean quantize?"),
        (_stages({"quantize": {"method": "gtpq"}}), "stages[0].quantize", "Did you mean gptq?"),
        (
            _stages({"quantize": {"method": "gptq", "formt": "q4_0"}}),
            "stages[0].quantize.formt",
            "Did you mean format?",
        ),
        (_stages({"quantize": {"method": "gptq", "act_ordr": True}}), "stages[0].quantize.act_ordr", "act_order"),
        (_stages({"quantize": {"method": "gptq", "format": "q4_00"}}), "stages[0].quantize.format", "q4_0"),
        (_stages(Q4, calibration={"sampels": 3}), "calibration.sampels", "Did you mean samples?"),
        (_stages(Q4, budget={"rom": "3GB"}), "budget.rom", "Did you mean ram?"),
        (_stages(Q4, gates={"final": "god"}), "gates.final is", "Did you mean good?"),
    ],
)
def test_unknown_words_are_named_with_the_nearest(document: dict[str, Any], path: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_recipe(document)
    assert caught.value.message.startswith(path)
    assert hint in caught.value.remedy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"act_order": "yes"}, "act_order is 'yes', expected bool"),
        ({"block": 1.5}, "block is 1.5, expected int"),
        ({"search": "best"}, "allowed minmax, mse, wls"),
        ({"include": 3}, "include is 3, expected a list"),
        ({"exclude": "re:("}, "no regular expression"),
    ],
)
def test_values_of_the_wrong_kind(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match="stages") as caught:
        parse_recipe(_stages({"quantize": {"method": "gptq", "format": "q4_0", **options}}))
    assert message in caught.value.message


@pytest.mark.parametrize("stages", [[], "quantize", [{"quantize": {}, "prune": {}}], [3], None])
def test_stages_must_be_a_list_of_single_stages(stages: Any) -> None:
    with pytest.raises(UsageError, match="stages"):
        parse_recipe({"stages": stages})


def test_the_order_of_stages_is_held_with_its_reason() -> None:
    low = {"lowrank": {"method": "svd"}}
    parse_recipe(_stages(low, Q4))
    with pytest.raises(UsageError, match="lowrank cannot come after quantize: factors are made of floats"):
        parse_recipe(_stages(Q4, low))


def test_overrides_take_over_what_they_do_not_say() -> None:
    recipe = parse_recipe(
        _stages({
            "quantize": {
                "method": "gptq", "format": "q4_0", "damping": 0.02, "exclude": ["re:.*attn.o.*"],
                "overrides": {"mlp.down": {"format": "q6_0"}, "re:layers.1..*": {"method": "rtn"}},
            }
        })
    )  # fmt: skip
    stage = recipe.stages[0]
    assert stage.selects("layers.0.attn.q.weight")
    assert not stage.selects("layers.0.attn.o.weight")
    method, fmt, options = stage.choice("layers.0.mlp.down.weight")
    assert (method, fmt, options.damping) == ("gptq", "q6_0", 0.02)
    assert stage.choice("layers.1.mlp.up.weight")[:2] == ("rtn", "q4_0")
    assert stage.choice("layers.0.mlp.up.weight")[1] == "q4_0"


def test_patterns_are_whole_parts_or_regular_expressions() -> None:
    assert matches("mlp.down", "layers.3.mlp.down.weight")
    assert matches("layers.3", "layers.3.mlp.down.weight")
    assert not matches("layers.3", "layers.30.mlp.down.weight")
    assert matches("re:.*down.*", "layers.3.mlp.down.weight")
    assert not matches("re:down", "layers.3.mlp.down.weight")


def test_the_hash_is_of_what_decides_the_result() -> None:
    base = parse_recipe(_stages(Q4)).hash
    assert parse_recipe(_stages(Q4, budget={"ram": "3GB", "threads": 1})).hash == base
    assert parse_recipe(_stages({"quantize": {"format": "q4_0", "method": "gptq", "block": 128}})).hash == base
    assert parse_recipe(_stages({"quantize": {"method": "gptq", "format": "q4_0", "block": 64}})).hash != base
    assert parse_recipe(_stages(Q4, calibration={"seed": 1})).hash != base
    assert parse_recipe(_stages(Q4, gates={"final": "good"})).hash != base


def test_sizes() -> None:
    assert parse_recipe(_stages(Q4, budget={"ram": "1.5GiB"})).ram == 3 << 29
    assert parse_recipe(_stages(Q4, budget={"ram": 12345})).ram == 12345
    for wrong in ("", "3 potatoes", "-3GB", -1, True, 0):
        with pytest.raises(UsageError, match=r"budget.ram: .* is no size"):
            parse_recipe(_stages(Q4, budget={"ram": wrong}))


def test_yaml_files(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("stages:\n  - quantize: {method: gptq, format: q4_0, damping: 1e-2}\n")
    assert parse_recipe(load_recipe(path)).stages[0].options.damping == 0.01
    path.write_text("- quantize\n")
    with pytest.raises(UsageError, match="not a mapping"):
        load_recipe(path)
    path.write_text("stages: [\n")
    with pytest.raises(UsageError, match="cannot read the recipe"):
        load_recipe(path)


@pytest.mark.parametrize("name", SHORTS)
def test_short_names_are_recipes(name: str) -> None:
    recipe = parse_recipe(short_recipe(name, ["a.txt"]))
    assert recipe.stages[0].kind == "quantize"
    assert recipe.calibration.files == {"": ("a.txt",)}


def test_an_unknown_short_name() -> None:
    with pytest.raises(UsageError) as caught:
        short_recipe("q44")
    assert "q4" in caught.value.remedy


@pytest.mark.parametrize("row", METHODS.values(), ids=lambda row: row.name)
def test_rows_of_the_table_are_well_formed(row: Any) -> None:
    from inhouse.compress.method import NEEDS, SCOPES

    assert row.scope in SCOPES
    assert (row.place or row.family) in {*ORDER, *ANYWHERE}
    assert row.paper
    assert row.summary
    assert not row.fallback or METHODS[row.fallback].scope == "matrix"
    made = row.options(**row.defaults)
    assert row.need(made) in NEEDS
    assert hash(str(made))
