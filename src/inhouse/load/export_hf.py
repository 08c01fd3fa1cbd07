"""A model as a Hugging Face folder: floats in safetensors, or GPTQ, AWQ and compressed-tensors.

Linears of four or eight bits whose codes fit the form keep them; others are rounded anew from their values, which the
report lists. Vectors, the embedding and the head stay floats. Layouts: facts of the formats' own packers (AutoGPTQ,
AutoAWQ, compressed-tensors).
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from inhouse.core.errors import UnsupportedError
from inhouse.core.progress import Progress
from inhouse.core.tensors import TensorInfo
from inhouse.load.describe import Described, read_tokenizer
from inhouse.load.export_coded import CODED_WISHES, coded_form
from inhouse.load.export_report import ExportReport, Written
from inhouse.load.export_targets import Target, Weights, as_bytes, make_targets, narrowed
from inhouse.load.packing import Part
from inhouse.load.seen_texts import safetensors_metadata
from inhouse.model.families.config_out import derive_target, hf_config
from inhouse.model.families.sparse_attention import KEY
from inhouse.model.spec import ModelSpec
from inhouse.model.tokens.write import hf_tokenizer
from inhouse.runtime.packed_layout import U8
from inhouse.store.safetensors import write_safetensors
from inhouse.store.source import side_files
from inhouse.store.writing import TensorData

HF_FORMS = ("safetensors", "gptq", "awq", "compressed-tensors")
_FLOATS = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
_TORCH = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_SKIP = ("config.json", "inhouse.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json")


def hf_wishes(form: str) -> tuple[str, ...]:
    """What `--type` may be."""
    return tuple(_FLOATS) if form == "safetensors" else CODED_WISHES[form]


def export_hf(
    described: Described,
    parts: Sequence[Part],
    weights: Weights,
    folder: Path,
    form: str,
    wish: str,
    progress: Progress,
    seen: str = "",
) -> ExportReport:
    """Writes model.safetensors, config.json and the tokenizer's files into an empty folder. `seen`: what
    `seen_texts.seen_text` gives."""
    spec = described.spec
    assert isinstance(spec, ModelSpec)
    report = ExportReport(folder, form)
    targets = make_targets(parts, derive_target(described.family, spec, gguf=False))
    linears = [target for target in targets if _is_linear(target)]
    coded = coded_form(form, wish, linears, weights) if form != "safetensors" else None
    total, done = sum(int(np.prod(t.shape)) for t in targets), 0
    tensors: list[TensorData] = []
    kinds: list[str] = []
    floats: list[str] = []  # modules of linears that stay floats
    for target in targets:
        done += int(np.prod(target.shape))
        at = (done, total)
        refused = coded.refuses(target) if coded is not None and _is_linear(target) else ""
        if coded is not None and _is_linear(target) and not refused:
            made, row = coded.tensors(target, weights, partial(progress, "export", *at))
            tensors += made
            report.tensors.append(row)
            continue
        kind = float_kind(target, _FLOATS.get(wish, ""))
        kinds.append(kind)
        tensors.append(_float_tensor(target, kind, weights, progress, at))
        report.tensors.append(float_row(target, kind, refused, weights.changed(target)))
        if target.kind == "linear":
            floats.append(target.name.removesuffix(".weight"))
    write_safetensors(folder / "model.safetensors", tensors, safetensors_metadata(seen))
    quantization = None if coded is None else coded.config(floats or ["lm_head"])
    _side_files(described, spec, [t.name for t in targets], folder, quantization, max(set(kinds), key=kinds.count))
    if form == "gptq":
        (folder / "quantize_config.json").write_text(json.dumps(quantization, indent=2))
    report.nbytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return report


def _is_linear(target: Target) -> bool:
    """Linears of the layers: neither the head nor what GPTQ and its kin leave alone."""
    return target.kind == "linear" and target.canonical != "head.weight" and len(target.shape) == 2


def float_kind(target: Target, wish: str) -> str:
    """The file type of a tensor that stays floats."""
    if wish:
        return wish
    return target.dtype if target.dtype in _BYTES else "F16"


def float_row(target: Target, kind: str, refused: str, changed: str) -> Written:
    """What the report says of it."""
    was = "/".join(sorted({part.info.dtype if part.format == "vector" else part.format for part, _ in target.pieces}))
    exact = kind == "F32" or (kind == target.dtype and not changed)
    note = refused or ("" if exact else f"rounded to {kind}")
    return Written(target.name, was, kind, exact, "; ".join(filter(None, (changed, note))))


def _float_tensor(target: Target, kind: str, weights: Weights, progress: Progress, at: tuple[int, int]) -> TensorData:
    def read() -> U8:
        values = weights.floats(target)
        progress("export", *at)
        return as_bytes(narrowed(values, kind, target.name))

    nbytes = int(np.prod(target.shape)) * _BYTES[kind]
    return TensorData(TensorInfo(target.name, kind, target.shape, nbytes), read)


def _side_files(
    described: Described,
    spec: ModelSpec,
    names: Sequence[str],
    folder: Path,
    quantization: Mapping[str, Any] | None,
    kind: str,
) -> None:
    if described.source.format == "gguf":
        config: dict[str, Any] = hf_config(spec, described.family, names)
        for name, text in hf_tokenizer(read_tokenizer(described)).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
    else:
        if KEY in described.config:
            raise UnsupportedError(
                f"this model's attention was narrowed ({KEY}); other programs would not know and see everything",
                remedy="Export to onnx, whose graph holds a plain window",
            )
        config = {k: v for k, v in described.config.items() if k not in ("quantization_config", "torch_dtype")}
        origin = described.path if described.path.is_dir() else described.path.parent
        for file in side_files(origin):
            if file.name not in _SKIP:
                place = folder / file.relative_to(origin)
                place.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, place)
    config["dtype"] = _TORCH[kind]
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False, default=float))
