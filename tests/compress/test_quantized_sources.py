"""Checkpoints that others have quantised, as what is compressed: decoded to what they mean, to the last bit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from inhouse.compress.pipeline import compress
from inhouse.compress.recipe import parse_recipe
from inhouse.compress.shorts import short_recipe
from inhouse.compress.work import Work
from inhouse.core.errors import FormatError
from inhouse.load.describe import describe
from inhouse.runtime.packed_formats import FORMATS
from inhouse.store.store import Store
from inhouse.store.stored_source import StoredSource
from tests.quantized.folders import Tensors, write_folder
from tests.quantized.packers import F32
from tests.quantized.schemes import CASES

pytestmark = [pytest.mark.torch, pytest.mark.native, pytest.mark.realdata]

BLOCK = 128
DEEPSEEK = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}


def blocks_of_128(weights: F32, name: str) -> tuple[Tensors, F32]:
    """As DeepSeek-V3's checkpoints are: e4m3, and for each block of 128 x 128 the number that it is multiplied by."""
    tensor = torch.from_numpy(weights)
    rows, columns = (-(-n // BLOCK) for n in weights.shape)
    scale = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            part = tensor[BLOCK * i : BLOCK * (i + 1), BLOCK * j : BLOCK * (j + 1)]
            scale[i, j] = part.abs().max() / 448
    spread = scale.repeat_interleave(BLOCK, 0)[: len(tensor)].repeat_interleave(BLOCK, 1)[:, : tensor.shape[1]]
    codes = (tensor / spread).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scale}, (codes.float() * spread).numpy()


def deepseek(stories: Path, folder: Path) -> dict[str, F32]:
    return write_folder(stories, folder, DEEPSEEK, blocks_of_128, dtype=torch.bfloat16)


NAMES = {"mlp.up_proj": "mlp.up", "mlp.down_proj": "mlp.down", "self_attn.q_proj": "attn.q"}


def test_fp8_blocks_are_read_exactly_and_compress(stories: Path, tmp_path: Path) -> None:
    """172 rows and columns: blocks that end early. Compressing to fp8 rounds what they mean to a scale a row."""
    meant = deepseek(stories, tmp_path / "m")
    with Work.open(str(tmp_path / "m"), tmp_path / "run") as work:
        for theirs, ours in NAMES.items():
            for layer in range(5):
                value = work.value(f"layers.{layer}.{ours}.weight").numpy()
                assert np.array_equal(value, meant[f"model.layers.{layer}.{theirs}.weight"])
    done = compress(str(tmp_path / "m"), "small", parse_recipe(short_recipe("fp8")))
    assert any("35 matrices of the source are quantised already" in note for note in done.result["notes"])
    with Store() as store:
        source = describe(store.folder(store.catalog.resolve(done.ref))).source
    assert isinstance(source, StoredSource)
    for theirs, ours in NAMES.items():
        wanted = torch.from_numpy(meant[f"model.layers.0.{theirs}.weight"])
        packed = source.packed(f"layers.0.{ours}.weight")
        assert FORMATS[packed.format].table == "e4m3"
        scale = wanted.abs().amax(1, keepdim=True) / 448
        theirs_too = (wanted / scale).to(torch.float8_e4m3fn).float() * scale  # torch's own rounding
        assert (torch.from_numpy(packed.dequantize()) - wanted).norm() <= 1.02 * (theirs_too - wanted).norm()
    source.close()


@pytest.mark.parametrize("case", ["gptq-4bit-g32-act", "bnb-nf4"])
def test_codes_of_other_programs_are_decoded_first(stories: Path, tmp_path: Path, case: str) -> None:
    made = CASES[case]()
    meant = write_folder(stories, tmp_path / "m", made.config, made.writer, skip=made.skip)
    with Work.open(str(tmp_path / "m"), tmp_path / "run") as work:
        assert np.array_equal(work.value("layers.1.mlp.up.weight").numpy(), meant["model.layers.1.mlp.up_proj.weight"])
    recipe = parse_recipe({"stages": [{"quantize": {"method": "round", "format": "q8_0"}}]})
    done = compress(str(tmp_path / "m"), "small", recipe)
    assert done.result["proof"]["logits_error"] < 1e-4


def test_a_scale_that_is_no_number_is_named(stories: Path, tmp_path: Path) -> None:
    deepseek(stories, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.2.mlp.up_proj.weight_scale_inv"
    tensors[name][1, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(FormatError, match=name) as caught:
        compress(str(tmp_path / "m"), "small", parse_recipe(short_recipe("fp8")))
    assert "damaged" in str(caught.value.remedy)
