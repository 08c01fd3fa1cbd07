"""Recipes on the embedded demo model, whose tokenizer has no BOS (as Qwen's and GPT-2's), and what reviews found."""

from pathlib import Path

import pytest

from inhouse.compress import pipeline
from inhouse.compress.recipe import load_recipe, parse_recipe
from inhouse.core.errors import UsageError
from inhouse.store.store import Store


def test_the_demo_model_by_a_short_recipe() -> None:
    done = pipeline.compress(
        "demo", "small", parse_recipe({"stages": [{"quantize": {"method": "round", "format": "q8_0"}}]})
    )
    gate = done.result["gate"]
    assert gate["text"] == "text that the parent wrote"
    assert 0 < gate["kld_mean"] < 0.01
    assert done.result["bits_per_weight"] < 9


def test_factors_of_an_embedding_are_coded_as_far_as_they_can_be() -> None:
    stages = [
        {"lowrank": {"method": "svd", "ratio": 0.2, "include": ["embed.weight"]}},
        {"quantize": {"method": "rtn", "format": "q8_0", "importance": False, "include": ["embed.weight"]}},
    ]
    done = pipeline.compress("demo", "thin", parse_recipe({"stages": stages}))
    (said,) = done.result["fallbacks"]
    assert said["tensor"] == "embed.weight (factor a)"
    assert (said["asked"], said["done"]) == ("rtn q8_0", "stays bf16")


def test_a_width_that_removes_nothing_is_refused() -> None:
    stages = [{"prune": {"method": "structured", "hidden": 0.01}}]
    with pytest.raises(UsageError, match="nothing would"):
        pipeline.compress("demo", "same", parse_recipe({"stages": stages, "calibration": {"samples": 4, "length": 64}}))


def test_a_failed_version_is_not_what_the_name_means_and_its_child_has_failed_too() -> None:
    rounded = {"quantize": {"method": "round", "format": "q8_0"}}
    coarse = {"quantize": {"method": "rtn", "format": "u2_g32", "importance": False}}
    pipeline.compress("demo", "m", parse_recipe({"stages": [rounded]}))
    failed = pipeline.compress("demo", "m", parse_recipe({"stages": [coarse], "gates": {"final": "near-lossless"}}))
    assert failed.failed
    assert failed.ref == "m:2"
    with Store() as store:
        assert store.catalog.resolve("m").ref == "m:1"
    child = pipeline.compress("m:2", "n", parse_recipe({"stages": [rounded], "gates": {"max_kld": 5.0}}))
    assert child.failed
    assert "its parent m:2 failed its own gate" in child.result["gate"]["reasons"]


def test_keys_that_stand_twice_and_overrides_of_nothing_are_told(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("stages: [{quantize: {method: rtn, format: q8_0}}]\nstages: []\n")
    with pytest.raises(UsageError, match="'stages' stands twice"):
        load_recipe(file)
    stage = {"method": "round", "format": "q8_0", "overrides": {"nope.weight": {"format": "q4_0"}}}
    done = pipeline.compress("demo", "o", parse_recipe({"stages": [{"quantize": stage}]}))
    assert any("'nope.weight' matches no weight" in note for note in done.result["notes"])
