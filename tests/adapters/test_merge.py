"""Merging: equal to PEFT's own merge, proven by logits, refused where they drift."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import T5Config, T5ForConditionalGeneration

from inhouse.compress.lora_merge import merge_adapter
from inhouse.core.errors import FormatError, UnsupportedError
from inhouse.store.store import Store
from tests.adapters.making import peft_folder
from tests.cli.program import here

pytestmark = [pytest.mark.native, pytest.mark.torch]

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_merged_tensors_equal_pefts(stories: Path, tmp_path: Path) -> None:
    model = peft_folder(stories / "hf", tmp_path / "a", r=4, lora_alpha=10, target_modules=ALL)
    with Store() as store:
        merged = merge_adapter(str(stories / "hf"), tmp_path / "a", "merged", store=store)
        assert merged.kld_mean < 1e-6
        assert merged.top1 > 0.99  # a near tie may part
        assert merged.tensors == 5 * len(ALL)
        folder = store.folder(merged.imported.version)
        ours = load_file(folder / "model.safetensors")
    for name, theirs in model.merge_and_unload().state_dict().items():
        if name in ours:
            assert np.abs(ours[name] - theirs.numpy()).max() <= 1e-5 * np.abs(theirs.numpy()).max(), name


def test_the_command_and_its_refusals(stories: Path, tmp_path: Path) -> None:
    peft_folder(stories / "hf", tmp_path / "a", r=2, lora_alpha=4, target_modules=["q_proj"])
    ended = here("merge", "kind", "--base", str(stories / "hf"), "--adapter", str(tmp_path / "a"), "--json")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["tensors_changed"] == 5
    strict = here("merge", "other", "--base", str(stories / "hf"), "--adapter", str(tmp_path / "a"), "--max-kld", "-1")
    assert strict.returncode != 0
    assert "drift" in strict.stderr or "nats a token" in strict.stderr
    listed = here("list", "--json")
    assert "other" not in listed.stdout
    with Store() as store, pytest.raises(UnsupportedError, match="safetensors"):
        merge_adapter(str(stories / "stories260K-Q4_0.gguf"), tmp_path / "a", "x", store=store)
    with Store() as store, pytest.raises(FormatError, match="nats"):
        merge_adapter(str(stories / "hf"), tmp_path / "a", "x", store=store, max_kld=-1.0)


def test_encoder_decoders_are_refused_by_name(tmp_path: Path) -> None:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    config = T5Config.from_dict({"vocab_size": 32, "decoder_start_token_id": 0, **sizes})
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    with Store() as store, pytest.raises(UnsupportedError, match="the base is of the family t5"):
        merge_adapter(str(tmp_path / "t5"), tmp_path / "a", "x", store=store)
