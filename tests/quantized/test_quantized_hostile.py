"""Damaged and hostile quantised checkpoints: refused by name, before anything is computed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from inhouse.core.errors import FormatError, InhouseError, UnsupportedError
from inhouse.load.bind import bind, plan_binding
from inhouse.load.describe import describe
from inhouse.model.build import build
from tests.quantized.folders import Tensors, write_folder
from tests.quantized.schemes import CASES

pytestmark = [pytest.mark.torch, pytest.mark.realdata]
Q = "model.layers.0.self_attn.q_proj"


def opened(folder: Path) -> None:
    """As loading does: header, plan, every weight."""
    described = describe(folder)
    try:
        plan = plan_binding(described.source, described.spec, described.family, build(described.spec))
        for _ in bind(described.source, plan, threads=1):
            continue
    finally:
        described.source.close()


def damaged(stories: Path, folder: Path, name: str, edit: Callable[[Tensors], Any]) -> Path:
    case = CASES[name]()
    write_folder(stories, folder, case.config, case.writer, skip=case.skip)
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors")
    return folder


def put(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def edit(state: Tensors) -> None:
        state[f"{Q}.{key}"] = change(state[f"{Q}.{key}"])

    return edit


def drop(key: str) -> Callable[[Tensors], None]:
    def edit(state: Tensors) -> None:
        del state[f"{Q}.{key}"]

    return edit


def nan(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.clone().reshape(-1)
    flat[0] = torch.nan
    return flat.reshape(tensor.shape)


FAULTS: list[tuple[str, Callable[[Tensors], Any], str]] = [
    ("gptq-4bit-g32-asym", drop("scales"), "has no scales"),
    ("gptq-4bit-g32-asym", drop("qzeros"), "has no qzeros"),
    ("gptq-4bit-g32-asym", put("qzeros", lambda t: t[:, :-1]), "do not fit"),
    ("gptq-4bit-g32-asym", put("scales", lambda t: t[:-1]), "do not fit"),
    ("gptq-4bit-g32-asym", put("qweight", lambda t: t[:-1]), "does not hold"),
    ("gptq-4bit-g32-asym", put("qweight", lambda t: t.to(torch.int64)), "expected I32"),
    ("gptq-4bit-g32-asym", put("g_idx", lambda t: t + 1), "g_idx goes from"),
    ("gptq-4bit-g32-asym", put("g_idx", lambda t: t - 1), "g_idx goes from -1"),
    ("gptq-4bit-g32-asym", put("g_idx", lambda t: torch.zeros_like(t)), "does not give every group"),
    ("gptq-4bit-g32-asym", put("scales", nan), "NaN"),
    ("awq-gemm-g32", drop("qzeros"), "has no qzeros"),
    ("awq-gemm-g32", put("scales", lambda t: t.T), "do not fit"),
    ("awq-gemv-row", put("qzeros", lambda t: t[:-1]), "do not fit"),
    ("ct-4bit-g64-asym", drop("weight_shape"), "has no weight_shape"),
    ("ct-4bit-g64-asym", drop("weight_scale"), "has no weight_scale"),
    ("ct-4bit-g64-asym", put("weight_shape", lambda t: t * 2), "does not hold"),
    ("ct-4bit-g64-asym", put("weight_shape", lambda t: -t), "does not hold"),
    ("ct-4bit-g64-asym", put("weight_zero_point", lambda t: t[:-1]), "does not fit"),
    ("ct-4bit-act", put("weight_g_idx", lambda t: t + 7), "g_idx goes from"),
    ("ct-w8a8", put("weight_scale", lambda t: t[:-1]), "does not fit"),
    ("ct-fp8-channel", put("weight_scale", lambda t: t[:-1]), "fits neither"),
    ("ct-fp8-channel", put("weight", lambda t: nan(t.float()).to(torch.float8_e4m3fn)), "NaN"),
    ("fp8-block", put("weight_scale_inv", lambda t: t[:-1]), "fits neither"),
    ("ct-nvfp4", put("weight_scale", lambda t: t[:, :-1]), "does not fit"),
    ("ct-nvfp4", put("weight_global_scale", lambda t: t.repeat(2)), "not one number"),
    ("bnb-nf4-nested", drop("weight.nested_absmax"), "has no weight.nested_absmax"),
    ("bnb-nf4", put("weight.absmax", lambda t: t[:-1]), "absmax does not have"),
    ("bnb-nf4", put("weight", lambda t: t[:-1]), "does not hold"),
    ("bnb-int8", put("SCB", lambda t: t[:-1]), "SCB does not have"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "edit", "words"), FAULTS, ids=[f"{n}-{w}" for n, _, w in FAULTS])
def test_damage_is_a_format_error(
    stories: Path, tmp_path: Path, name: str, edit: Callable[[Tensors], Any], words: str
) -> None:
    with pytest.raises(FormatError, match=words):
        opened(damaged(stories, tmp_path / "model", name, edit))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("bits", 5, "bits = '5'"), ("bits", "4", "whole number"), ("checkpoint_format", "marlin", "marlin"),
        ("rotation", "hadamard", "rotation"), ("surprise", 1, "unknown key .surprise."),
        ("sym", "yes", "true or false"),
        ("quant_method", "quip", "quant_method = 'quip'"), ("quant_method", 7, "quant_method = '7'"),
        ("pack_dtype", "int64", "pack_dtype"),
    ],
)  # fmt: skip
def test_what_the_config_asks_and_is_not_done_is_named(
    stories: Path, tmp_path: Path, key: str, value: object, words: str
) -> None:
    case = CASES["gptq-4bit-g32-asym"]()
    write_folder(stories, tmp_path / "model", case.config | {key: value}, case.writer)
    with pytest.raises((UnsupportedError, FormatError), match=words):
        describe(tmp_path / "model")


def test_a_linear_twice_is_refused(stories: Path, tmp_path: Path) -> None:
    def edit(state: Tensors) -> None:
        state[f"{Q}.weight"] = torch.zeros(64, 64)

    with pytest.raises(FormatError, match="twice"):
        opened(damaged(stories, tmp_path / "model", "gptq-4bit-g32-asym", edit))


def test_random_damage_never_crashes(stories: Path, tmp_path: Path) -> None:
    """Bytes of the header's numbers and of small tensors changed at random: an answer or an error of ours."""
    rng = np.random.default_rng(0)
    for name in ("gptq-4bit-g32-act", "ct-4bit-act", "bnb-nf4-nested"):
        case = CASES[name]()
        folder = tmp_path / name
        write_folder(stories, folder, case.config, case.writer, skip=case.skip)
        whole = load_file(folder / "model.safetensors")
        keys = [key for key in whole if key.startswith(Q)]
        for _ in range(12):
            key = keys[int(rng.integers(len(keys)))]
            raw = whole[key].contiguous().view(-1).view(torch.uint8).numpy().copy()
            raw[rng.integers(raw.size, size=3)] = rng.integers(0, 256, 3)
            state = whole | {key: torch.from_numpy(raw).view(whole[key].dtype).reshape(whole[key].shape)}
            save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
            try:
                opened(folder)
            except InhouseError:
                continue


def test_older_files_beside_a_model_say_the_same(stories: Path, tmp_path: Path) -> None:
    case = CASES["gptq-4bit-g32-asym"]()
    folder = tmp_path / "model"
    write_folder(stories, folder, case.config, case.writer)
    config = json.loads((folder / "config.json").read_text())
    said = {key: value for key, value in config.pop("quantization_config").items() if key != "quant_method"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(said))
    opened(folder)
