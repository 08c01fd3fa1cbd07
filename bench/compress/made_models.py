"""Models made of stories260K that have what it lacks, so that methods for such models have something to work on."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from bench.compress.teacher_text import model_folder

from inhouse.store.safetensors import write_safetensors
from inhouse.store.source import materialise, open_source
from inhouse.store.writing import from_array

EXPERTS = 4
NOISE = 0.02  # of the experts' own, relative to the spread of the weights
TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json")

Arrays = dict[str, npt.NDArray[np.float32]]


def untied(folder: Path) -> Path:
    """stories260K with the head written out: the same logits, and an embedding that only looks tokens up."""
    config, arrays = _read()
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
    return _write(folder, config | {"tie_word_embeddings": False}, arrays)


def upcycled(folder: Path) -> Path:
    """stories260K as a Mixtral: each FFN becomes EXPERTS near copies of itself, two of which a router of noise chooses
    (sparse upcycling, Komatsuzaki et al. 2022, arXiv 2212.05055)."""
    config, arrays = _read()
    random, out = np.random.default_rng(0), dict[str, npt.NDArray[np.float32]]()
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    for name, value in arrays.items():
        layer, _, part = name.partition(".mlp.")
        if not part:
            out[name] = value
            continue
        for expert in range(EXPERTS):
            own = random.standard_normal(value.shape).astype(np.float32) * value.std() * NOISE
            out[f"{layer}.block_sparse_moe.experts.{expert}.{names[part.split('.')[0]]}.weight"] = value + own
        gate = random.standard_normal((EXPERTS, config["hidden_size"])).astype(np.float32) * 0.02
        out[f"{layer}.block_sparse_moe.gate.weight"] = gate
    changed = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2, "sliding_window": None,
    }  # fmt: skip
    kept = {key: value for key, value in config.items() if key not in ("attention_bias", "mlp_bias")}
    return _write(folder, kept | changed, out)


def _read() -> tuple[dict[str, Any], Arrays]:
    source = open_source(model_folder())
    try:
        arrays = {name: np.array(materialise(source, name), np.float32) for name in source}
    finally:
        source.close()
    return json.loads((model_folder() / "config.json").read_text()), arrays


def _write(folder: Path, config: dict[str, Any], arrays: Arrays) -> Path:
    folder.mkdir(parents=True)
    for name in TOKENIZER:
        if (model_folder() / name).exists():
            shutil.copyfile(model_folder() / name, folder / name)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(
        folder / "model.safetensors", [from_array(name, value) for name, value in arrays.items()], {"format": "pt"}
    )
    return folder
