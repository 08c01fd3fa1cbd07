"""A model as one GGUF file that llama.cpp, the `gguf` package and we read.

Tensors that are kept in codes of the wished type go in as they are; others are encoded (runtime.encode). Which type a
tensor gets follows llama.cpp's habits: vectors are F32, the head (or the tied embedding) keeps more bits, and a width
that a type's blocks do not divide falls back to another type, which the report lists.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from inhouse.core.errors import UsageError
from inhouse.core.progress import Progress
from inhouse.core.tensors import TensorInfo
from inhouse.load.describe import Described, read_tokenizer
from inhouse.load.export_report import ExportReport, Written
from inhouse.load.export_targets import Target, Weights, as_bytes, make_targets, narrowed, row_runs
from inhouse.load.packing import Part
from inhouse.load.seen_texts import GGUF_KEY
from inhouse.model.families.config_out import ROPE_FACTORS, derive_target, gguf_norm_offset, gguf_table, rope_factors
from inhouse.model.spec import ModelSpec
from inhouse.model.tokens.write import gguf_tokenizer
from inhouse.runtime.encode import encode_rows, fits
from inhouse.runtime.packed_blocks import gguf_blocks, writable
from inhouse.runtime.packed_layout import U8
from inhouse.store.dtypes import GGML_TYPES
from inhouse.store.gguf_write import write_gguf
from inhouse.store.writing import TensorData, from_array

FLOATS = ("F32", "F16", "BF16")
# Type -> what a width that its blocks of 256 do not divide gets instead (llama.cpp's choices).
_NARROW = {
    "Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "IQ4_XS": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
    "TQ1_0": "Q4_0", "TQ2_0": "Q4_0",
}  # fmt: skip
# Mixture -> (type of most matrices, type of some layers' v and down projections).
_MIXTURES = {"Q4_K_M": ("Q4_K", "Q6_K"), "Q5_K_M": ("Q5_K", "Q6_K"), "Q3_K_M": ("Q3_K", "Q5_K")}
_FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 11, "Q3_K_M": 12,
    "Q4_K": 14, "Q4_K_M": 15, "Q5_K": 16, "Q5_K_M": 17, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30, "BF16": 32,
    "TQ1_0": 36, "TQ2_0": 37, "MXFP4": 38,
}  # fmt: skip
_SAME = {"i4_g32": "q4_0", "i8_g32": "q8_0"}  # the same numbers under two names
ALIGNMENT = 32


def gguf_wishes() -> tuple[str, ...]:
    """What `--type` may be for GGUF."""
    return tuple(name.lower() for name in (*FLOATS, *writable(), *_MIXTURES) if name != "NVFP4")


def export_gguf(
    described: Described,
    parts: Sequence[Part],
    weights: Weights,
    out: Path,
    wish: str,
    progress: Progress,
    threads: int,
    seen: str = "",
) -> ExportReport:
    """Writes the file. `wish`: "" (as stored) or one of `gguf_wishes()`. `seen`: what `seen_texts.seen_text` gives.

    Raises UnsupportedError for what GGUF cannot say of the model, UsageError for an unknown type.
    """
    if wish and wish not in gguf_wishes():
        raise UsageError(f"GGUF has no type {wish!r} that is written", remedy=f"Known: {', '.join(gguf_wishes())}")
    spec = described.spec
    assert isinstance(spec, ModelSpec)
    report = ExportReport(out, "gguf")
    targets = make_targets(parts, derive_target(described.family, spec, gguf=True))
    planned = [(target, *_planned(target, weights, spec, wish.upper())) for target in targets]
    metadata = _metadata(described, spec, [t.name for t in targets], wish.upper(), [kind for _, kind, _ in planned])
    if seen:
        metadata[GGUF_KEY] = seen
    done, total = 0, sum(int(np.prod(t.shape)) for t in targets)
    tensors: list[TensorData] = []
    with ThreadPoolExecutor(threads, "encode") as pool:
        for target, kind, note in planned:
            offset = _offset(target, spec)
            exact = is_exact(target, weights, kind) and not offset
            if offset:
                note = f"{offset:g} added, as GGUF keeps these norms"
            elif not exact and not note and weights.is_coded(target) and not weights.changed(target):
                note = f"encoded anew from {'/'.join(sorted(target.formats))}"
            note = "; ".join(filter(None, (weights.changed(target), note)))
            report.tensors.append(Written(target.name, "/".join(sorted(target.formats)), kind, exact, note))
            done += int(np.prod(target.shape))
            tensors.append(_tensor(target, kind, weights, pool, progress, (done, total), offset))
        factors = rope_factors(spec.rope, spec.context_length)
        if factors is not None:
            tensors.append(from_array(ROPE_FACTORS, factors))
        write_gguf(out, metadata, tensors)
    if any(spec.windows):
        report.notes.append(
            f"attention sees {max(spec.windows)} positions; llama.cpp does not limit it for every family"
        )
    report.nbytes = out.stat().st_size
    return report


def _planned(target: Target, weights: Weights, spec: ModelSpec, wish: str) -> tuple[str, str]:
    """(GGUF type, why it is not the wished one)."""
    if len(target.shape) == 1 or target.kind == "vector":
        return "F32", ""
    if not wish:
        return as_stored(target, weights)
    if wish in FLOATS:
        return wish, ""
    if "ffn_gate_inp" in target.name or len(target.shape) == 1:
        return "F32", "the router of experts stays F32"
    base, more = _MIXTURES.get(wish, (wish, wish))
    kind, note = base, ""
    head = "output.weight" if not spec.tied else "token_embd.weight"
    if target.name == head and wish not in ("Q8_0", "Q6_K"):
        kind, note = "Q6_K", "the head keeps 6 bits"
    elif more != base and _takes_more(target.name, spec.layers):
        kind = more
    width = target.shape[-1]
    if not fits(writable()[kind], width) and kind in _NARROW:
        kind, note = _NARROW[kind], f"{width} inputs are no multiple of 256"
    if not fits(writable()[kind], width):
        kind, note = "F16", f"{width} inputs are no multiple of 32"
    return kind, note


def _takes_more(name: str, layers: int) -> bool:
    """llama.cpp's choice: v and down of the first and last eighth of the layers, and of every third between."""
    parts = name.split(".")
    if not name.endswith(("attn_v.weight", "ffn_down.weight")) or not parts[1].isdigit():
        return False
    i = int(parts[1])
    return i < layers // 8 or i >= 7 * layers // 8 or (i - layers // 8) % 3 == 2


def as_stored(target: Target, weights: Weights) -> tuple[str, str]:
    """(GGUF type that keeps a target as it is, or comes nearest; why it is not the same)."""
    shared = _shared(target, weights)
    if target.dtype in writable() and shared == writable()[target.dtype]:
        return target.dtype, ""
    for kind, name in writable().items():
        if shared == name and kind not in ("NVFP4", "TQ1_0"):
            return kind, ""
    if target.dtype in FLOATS:
        return target.dtype, ""
    changed = weights.changed(target)
    fallback = "Q8_0" if fits("q8_0", target.shape[-1]) else "F16"
    if changed:
        return fallback, f"then encoded as {fallback}; ask for another with --type"
    why = f"GGUF has no {'/'.join(sorted(target.formats))}"
    if weights.shared_codes(target) and not _shared(target, weights):
        why = f"{target.shape[-1]} inputs are no whole blocks of {'/'.join(sorted(target.formats))}"
    return fallback, f"{why}; ask for another with --type"


def is_exact(target: Target, weights: Weights, kind: str) -> bool:
    """Whether a GGUF type keeps every value."""
    if kind in writable():
        return _shared(target, weights) == writable()[kind]
    order = {"F16": ("F16",), "BF16": ("BF16",), "F32": ("F32", "F16", "BF16")}[kind]
    if weights.changed(target):
        return kind == "F32"
    return target.dtype in order or (kind == "F32" and target.dtype not in ("F64",))


def _shared(target: Target, weights: Weights) -> str:
    """The code format of a target, by the name of the GGUF type with the same codes and scales; "" where whole blocks
    of it do not make up a row."""
    name = weights.shared_codes(target)
    name = _SAME.get(name, name)
    return name if name not in writable().values() or fits(name, target.shape[-1]) else ""


def _offset(target: Target, spec: ModelSpec) -> float:
    """What is added to the weights of a norm."""
    return gguf_norm_offset(spec) if target.kind == "vector" and target.canonical.endswith("norm") else 0.0


def _tensor(
    target: Target,
    kind: str,
    weights: Weights,
    pool: ThreadPoolExecutor,
    progress: Progress,
    at: tuple[int, int],
    offset: float,
) -> TensorData:
    block = GGML_TYPES[kind]
    nbytes = int(np.prod(target.shape)) // block.block * block.nbytes

    def read() -> U8:
        raw = _raw(target, kind, weights, pool) if not offset else as_bytes(weights.floats(target) + np.float32(offset))
        progress("export", *at)
        return raw

    return TensorData(TensorInfo(target.name, kind, target.shape, nbytes), read)


def _raw(target: Target, kind: str, weights: Weights, pool: ThreadPoolExecutor) -> U8:
    if kind in FLOATS:
        return as_bytes(narrowed(weights.floats(target), kind, target.name))
    name = writable()[kind]
    if _shared(target, weights) == name:
        return as_bytes(gguf_blocks(weights.codes(target), kind))
    rows = weights.matrix(target) if not target.transpose else weights.floats(target).reshape(-1, target.shape[-1])

    def encoded(part: slice) -> U8:
        return gguf_blocks(encode_rows(name, rows[part]), kind)

    return as_bytes(np.concatenate(list(pool.map(encoded, row_runs(len(rows), 16)))))


def _metadata(
    described: Described, spec: ModelSpec, names: Sequence[str], wish: str, kinds: Sequence[str]
) -> dict[str, Any]:
    matrices = [kind for kind in kinds if kind != "F32"] or ["F32"]
    usual = wish or max(set(matrices), key=matrices.count)
    file_type = {"general.quantization_version": 2}
    if usual in _FILE_TYPES:
        file_type["general.file_type"] = _FILE_TYPES[usual]
    if described.source.format == "gguf":
        own = {k: v for k, v in described.config.items() if not k.startswith(("split.", "general.file_type"))}
        return own | file_type
    extra = {ROPE_FACTORS} if rope_factors(spec.rope, spec.context_length) is not None else set()
    table = gguf_table(spec, described.family, {*names, *extra})
    tokenizer = gguf_tokenizer(read_tokenizer(described), spec.vocab_size)
    title: Mapping[str, Any] = {"general.name": described.path.resolve().name, "general.alignment": ALIGNMENT}
    return {"general.architecture": table.pop("general.architecture")} | dict(title) | file_type | table | tokenizer
