"""What formats of about 4.5 and 8.5 bits keep of a float model: KL divergence on the same weights and text, ours beside
those of other engines. Keeps bench/quality.json, from which tools/benchmarks.py writes its table.

    python tools/quality.py --realdata FOLDER [--models FOLDER_OF_HF_FOLDERS] [--only REGEX] [--missing]

A peer's format is simulated: its matrices are rounded as it rounds them, kept as floats, and run with float
activations and an f32 cache, so its figure is a lower bound of that engine's. Ours are run as served, 8-bit activations
and the cache's type included; the types of the cache alone stand beside, on float weights.
"""

import argparse
import gzip
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

import inhouse.demo
from inhouse.compress.evaluate import evaluate
from inhouse.core.settings import load_settings
from inhouse.engine.session import Session
from inhouse.runtime.packed import quantize

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "bench" / "quality.json"
Array = np.ndarray[Any, np.dtype[np.float32]]
Rounding = Callable[[Array], Array]


def gguf_type(name: str) -> Rounding:
    """Rounding of a GGUF block type by the gguf package."""
    kind = gguf.GGMLQuantizationType[name]

    def rounded(w: Array) -> Array:
        if w.shape[1] % gguf.GGML_QUANT_SIZES[kind][0]:
            return w.astype(np.float16).astype(np.float32)  # as llama.cpp falls back, here to F16
        out: Array = gguf.quants.dequantize(gguf.quants.quantize(w, kind), kind)
        return out

    return rounded


def signed_int4(group: int) -> Rounding:
    """Symmetric int4 in groups along the inputs (the row, where it is shorter): the element of largest magnitude
    becomes -8, scales are f16 (OpenVINO's INT4_SYM)."""

    def rounded(w: Array) -> Array:
        size = group if w.shape[1] % group == 0 else w.shape[1]
        grouped = w.reshape(w.shape[0], -1, size)
        at = np.abs(grouped).argmax(axis=2)[..., None]
        scale = (np.take_along_axis(grouped, at, 2) / -8).astype(np.float16).astype(np.float32)
        codes = np.clip(np.round(np.divide(grouped, scale, out=np.zeros_like(grouped), where=scale != 0)), -8, 7)
        out: Array = (codes * scale).reshape(w.shape)
        return out

    return rounded


def int8_rows(w: Array) -> Array:
    """Symmetric int8 with a scale a row."""
    scale = np.abs(w).max(axis=1, keepdims=True) / 127
    out: Array = np.round(np.divide(w, scale, out=np.zeros_like(w), where=scale != 0)) * scale
    return out


def our_q4(w: Array) -> Array:
    """Our own q4, its values."""
    return quantize(w, "q4").dequantize()


# name -> (whose, rounding of the layers' matrices, of embedding and head, bits of both)
SIMULATED: dict[str, tuple[str, Rounding, Rounding, float, float]] = {
    "Q4_0, head Q8_0": ("llama.cpp", gguf_type("Q4_0"), gguf_type("Q8_0"), 4.5, 8.5),
    "int4 sym g128, head int8": ("OpenVINO", signed_int4(128), int8_rows, 4.125, 8.0),
    "int4 g32, head int4 g32": ("onnxruntime", signed_int4(32), signed_int4(32), 4.5, 4.5),
    "q4, head q4 (weights alone)": ("ours, not served", our_q4, our_q4, 4.5, 4.5),
    "Q8_0": ("llama.cpp", gguf_type("Q8_0"), gguf_type("Q8_0"), 8.5, 8.5),
    "int8 per channel": ("OpenVINO", int8_rows, int8_rows, 8.0, 8.0),
}
# name -> (wish, KV type, bits of the layers' matrices, of embedding and head)
OURS: dict[str, tuple[str, str, float, float]] = {
    "q4 (weights alone)": ("q4", "f32", 4.5, 6.5),
    "q8 (weights alone)": ("q8", "f32", 8.5, 8.5),
    "q4 as served, KV f16": ("q4", "f16", 4.5, 6.5),
    "q4 as served, KV bf16": ("q4", "bf16", 4.5, 6.5),
    "q4 as served, KV int8": ("q4", "int8", 4.5, 6.5),
    "q8 as served, KV f16": ("q8", "f16", 8.5, 8.5),
    "float weights, KV f16": ("", "f16", 16.0, 16.0),
    "float weights, KV bf16": ("", "bf16", 16.0, 16.0),
    "float weights, KV int8": ("", "int8", 16.0, 16.0),
    "float weights, KV int4": ("", "int4", 16.0, 16.0),
}


def is_table(name: str) -> bool:
    """Whether a tensor is an embedding or the head."""
    return "embed" in name or "lm_head" in name


def simulate(folder: Path, target: Path, layers: Rounding, tables: Rounding) -> None:
    """A copy of an HF folder with its matrices rounded."""
    target.mkdir(parents=True)
    for file in folder.iterdir():
        if file.suffix != ".safetensors" and file.is_file():
            shutil.copy(file, target / file.name)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if tensor.ndim == 2:
                rounding = tables if is_table(name) else layers
                tensors[name] = torch.from_numpy(rounding(tensor.float().numpy()).copy())
            else:
                tensors[name] = tensor.float()
        save_file(tensors, target / file.name, {"format": "pt"})


def bits(folder: Path, layers: float, tables: float, block: int = 0) -> float:
    """Bits a weight over all matrices; a layer's whose inputs are no multiple of `block` stay F16."""
    total = weighted = 0.0
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if tensor.ndim == 2:
                total += tensor.numel()
                fits = not block or tensor.shape[1] % block == 0
                weighted += tensor.numel() * (tables if is_table(name) else layers if fits else 16.0)
    return weighted / total


def compare(folder: Path, reference: Session, text: str, protocol: str, **settings: Any) -> dict[str, float]:
    """Divergence of a model from the reference."""
    with Session.open(str(folder), load_settings({"max_sequences": 1, **settings}, environ={})) as session:
        found = evaluate(session, text, protocol, reference)
    return {"kld_mean": found.kld_mean or 0.0, "kld_p99": found.kld_p99 or 0.0, "top1": found.top1 or 0.0}


def rows(name: str, folder: Path, text: str, protocol: str, have: Container[str]) -> Iterator[dict[str, Any]]:
    """Every format on one model but those that it has."""
    plain = load_settings({"max_sequences": 1, "kv_dtype": "f32"}, environ={})
    with tempfile.TemporaryDirectory() as scratch, Session.open(str(folder), plain) as reference:
        for form, (wish, kv_dtype, low, high) in OURS.items():
            if form not in have:
                activations = "float" if "alone" in form else "int8"
                given = {"quantize": wish, "kv_dtype": kv_dtype, "activations": activations}
                found = compare(folder, reference, text, protocol, **given)
                yield {"model": name, "format": form, "whose": "ours", "bits": bits(folder, low, high), **found}
        for form, (whose, layers, tables, low, high) in SIMULATED.items():
            if form in have:
                continue
            target = Path(scratch) / "rounded"
            simulate(folder, target, layers, tables)
            found = compare(target, reference, text, protocol, kv_dtype="f32")
            size = bits(folder, low, high, 32 if whose == "llama.cpp" else 0)
            yield {"model": name, "format": form, "whose": whose, "bits": size, **found}
            shutil.rmtree(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--realdata", type=Path, required=True)
    parser.add_argument("--models", type=Path, help="folder of larger HF folders, each scored on 256 tokens")
    parser.add_argument("--only", default=".", help="regular expression: models to do; rows of others are kept")
    parser.add_argument("--missing", action="store_true", help="only what is not kept yet")
    given = parser.parse_args()
    text = gzip.decompress((given.realdata / "text" / "tinystories_sample_2MiB.txt.gz").read_bytes()).decode()
    wished = {
        "stories260K": (given.realdata / "models" / "stories260k" / "hf", text, "stories"),
        "demo": (Path(inhouse.demo.__path__[0]), text[:20_000], "window:256"),
    }
    for folder in sorted(given.models.iterdir()) if given.models else []:
        if (folder / "config.json").exists() and any(folder.glob("*.safetensors")):
            wished[f"{folder.name} (random)"] = (folder, text[:1100], "window:256")
    kept = json.loads(OUT.read_text())["rows"] if OUT.exists() else []
    for name, (folder, scored, protocol) in wished.items():
        if re.search(given.only, name):
            kept = [row for row in kept if row["model"] != name or given.missing]
            have = {row["format"] for row in kept if row["model"] == name}
            for row in rows(name, folder, scored, protocol, have):
                print(row, flush=True)
                kept.append(row)
                write({"command": "python tools/quality.py", "rows": kept})


def write(report: dict[str, Any]) -> None:
    """Keeps what is measured so far, whole or not at all."""
    scratch = OUT.with_suffix(".new")
    scratch.write_text(json.dumps(report, indent=1) + "\n")
    scratch.replace(OUT)


if __name__ == "__main__":
    main()
