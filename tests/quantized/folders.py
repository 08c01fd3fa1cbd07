"""stories260K as a quantised checkpoint of any scheme, and the float weights that it means."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

from tests.quantized.packers import F32

Tensors = dict[str, torch.Tensor]
# (weight [out, in], linear's name) -> (tensors of the module, the values they mean)
Writer = Callable[[F32, str], tuple[Tensors, F32]]


def write_folder(
    stories: Path,
    target: Path,
    config: dict[str, Any],
    writer: Writer,
    *,
    dtype: torch.dtype = torch.float16,
    skip: tuple[str, ...] = ("lm_head", "embed_tokens"),
) -> dict[str, F32]:
    """Every linear but those in `skip` goes through `writer`, the rest is kept as `dtype`; returns what all mean."""
    target.mkdir(parents=True)
    for file in (stories / "hf").iterdir():
        if file.suffix != ".safetensors":
            shutil.copyfile(file, target / file.name)
    said = json.loads((target / "config.json").read_text()) | {"quantization_config": config}
    (target / "config.json").write_text(json.dumps(said))
    state: Tensors = {}
    meant: dict[str, F32] = {}
    for name, tensor in load_file(stories / "hf" / "model.safetensors").items():
        if tensor.dim() == 2 and not any(part in name for part in skip):
            prefix = name.removesuffix(".weight")
            tensors, meant[name] = writer(tensor.float().numpy(), prefix)
            state |= {f"{prefix}.{suffix}": value for suffix, value in tensors.items()}
        else:
            state[name] = tensor.to(dtype)
            meant[name] = state[name].float().numpy()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, target / "model.safetensors")
    return meant


def tensors(arrays: dict[str, npt.NDArray[np.generic]], scale: str = "f16") -> Tensors:
    """Arrays of a packer as torch tensors, scales in their own type."""
    kinds = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
    out = {}
    for name, array in arrays.items():
        tensor = torch.from_numpy(np.array(array))
        out[name] = tensor.to(kinds[scale]) if tensor.is_floating_point() else tensor
    return out
