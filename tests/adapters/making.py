"""Adapters for tests: PEFT folders written by PEFT itself, GGUF adapters by the gguf package."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file


def peft_folder(base: Path, folder: Path, seed: int = 0, std: float = 0.3, **config: Any) -> Any:
    """A PEFT adapter with random values on both sides (std of the B side), saved by PEFT; gives the PEFT model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    original = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between PEFT and transformers
        model = get_peft_model(original, LoraConfig(task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, std)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder))
    return model.eval()


def gguf_file(folder: Path, path: Path, names: Mapping[str, str], heads: Mapping[str, int], alpha: float) -> None:
    """The PEFT adapter of `folder` as a GGUF of type adapter, q and k outputs with rotary pairs side by side.

    Args:
        names: module's last name -> GGUF tensor stem ("q_proj" -> "attn_q").
        heads: GGUF stem -> heads whose rows are to be permuted.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        parts = name.split(".")
        layer, stem, side = parts[parts.index("layers") + 1], names[parts[-3]], parts[-2][-1].lower()
        values = tensor.numpy()
        if side == "b" and stem in heads:
            count = heads[stem]
            values = values.reshape(count, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(f"blk.{layer}.{stem}.weight.lora_{side}", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
