"""The difference of two models as a LoRA adapter: W_new - W_old, cut to a rank matrix by matrix (truncated SVD, Eckart
and Young 1936), written as a PEFT folder that PEFT and our own loader open.

Knows matrices under their checkpoint names; the caller derives which those are.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from inhouse.compress.spectrum import cut, decompose
from inhouse.core.errors import UsageError
from inhouse.core.tensors import TensorInfo
from inhouse.store.safetensors import write_safetensors
from inhouse.store.writing import TensorData, atomic_file


@dataclass(frozen=True, slots=True)
class Extracted:
    """One module's part of the adapter."""

    module: str  # the matrix's name in the checkpoint, without ".weight"
    a: Tensor  # f32 [rank, in]
    b: Tensor  # f32 [out, rank]
    error: float  # what the rank leaves of the difference: ||D - b a|| / ||D||


def extract(
    module: str, old: Tensor, new: Tensor, rank: int, gram: Tensor | None = None, least: float = 0.0
) -> Extracted | None:
    """The best pair of that rank for new - old, both [out, in]; None where they are equal, or differ by no more than
    `least` times the old matrix's norm. With `gram` (E[x x^T]) the best in the output rather than the weights.

    Raises UsageError for shapes that differ.
    """
    if old.shape != new.shape or old.dim() != 2:
        raise UsageError(f"{module}: {list(old.shape)} and {list(new.shape)} are no two matrices alike", param=module)
    gap = new.double() - old.double()
    size = float(gap.norm())
    if size <= least * float(old.double().norm()):
        return None
    taken = decompose(gap, "svd" if gram is None else "whitened", gram=gram)
    a, b = cut(taken, min(rank, taken.right.shape[0]), allow_larger=True)
    return Extracted(module, a, b, float((gap - b.double() @ a.double()).norm()) / size)


def write_peft(folder: Path, pairs: Iterable[Extracted], *, base: str = "", prefix: str = "base_model.model.") -> int:
    """Writes `adapter_config.json` and `adapter_model.safetensors`; how many modules the adapter changes.

    Each module has its own rank (`rank_pattern`), lora_alpha equals the rank, so that the product is added as it is.
    Raises UsageError if there is nothing to write.
    """
    found = sorted(pairs, key=lambda pair: pair.module)
    if not found:
        raise UsageError("the two models do not differ in any linear layer", remedy="Name the tuned model second")
    folder.mkdir(parents=True, exist_ok=True)
    ranks = {pair.module: int(pair.a.shape[0]) for pair in found}
    most = max(ranks.values())
    pattern = {re.escape(module): rank for module, rank in ranks.items() if rank != most}
    tensors = [
        _tensor(f"{prefix}{pair.module}.lora_{side}.weight", value)
        for pair in found
        for side, value in (("A", pair.a), ("B", pair.b))
    ]
    write_safetensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = _config(base, most, pattern, sorted(ranks))
    with atomic_file(folder / "adapter_config.json") as file:
        file.write(json.dumps(config, indent=2, sort_keys=True).encode())
    return len(found)


def _config(base: str, rank: int, pattern: Mapping[str, int], modules: list[str]) -> dict[str, object]:
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": rank, "lora_alpha": rank, "rank_pattern": dict(pattern), "alpha_pattern": dict(pattern),
        "target_modules": modules, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "use_rslora": False,
        "use_dora": False, "modules_to_save": None, "init_lora_weights": True,
    }  # fmt: skip


def _tensor(name: str, value: Tensor) -> TensorData:
    array = np.ascontiguousarray(value.float().numpy())
    info = TensorInfo(name, "F32", tuple(array.shape), array.nbytes)
    return TensorData(info, lambda: array.reshape(-1).view(np.uint8))
