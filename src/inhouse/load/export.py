"""Exporting: a model of ours as files that other programs read.

The door of the `export_*` files. Knows which writer makes which form; a new file or folder appears whole or not at
all, and nothing that is there is overwritten.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from inhouse.core.errors import ConflictError, NotFoundError, UnsupportedError, UsageError
from inhouse.core.progress import Progress, silent
from inhouse.core.tensors import TensorInfo
from inhouse.load.bind import Plan, plan_binding
from inhouse.load.describe import Described, describe
from inhouse.load.export_gguf import export_gguf, gguf_wishes
from inhouse.load.export_hf import HF_FORMS, export_hf, hf_wishes
from inhouse.load.export_report import ExportReport
from inhouse.load.export_targets import LOW_RANK, Weights
from inhouse.load.locate import locate
from inhouse.load.packing import Part
from inhouse.load.seen_texts import seen_text
from inhouse.model.build import build
from inhouse.model.families.family import Derive
from inhouse.model.families.kv_cache import GGUF_KEY, KEY
from inhouse.model.spec import ModelSpec
from inhouse.runtime.cores import stack_of
from inhouse.store.home import Home
from inhouse.store.stored_source import StoredSource

FORMS = ("safetensors", "gguf", "gptq", "awq", "compressed-tensors", "onnx")


def wishes() -> Mapping[str, tuple[str, ...]]:
    """Form -> what `--type` may be."""
    return {"gguf": gguf_wishes(), "onnx": ("f32",), **{form: hf_wishes(form) for form in HF_FORMS}}


def export_model(
    reference: str,
    form: str,
    out: Path,
    *,
    wish: str = "",
    home: Home | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> ExportReport:
    """Writes a model in another form.

    Args:
        reference: as `open_model`.
        form: one of FORMS.
        out: the file (gguf, onnx) or folder to make; it must not exist.
        wish: the weights' type; "": as stored (safetensors, gguf) or the form's usual one.
        progress: told ("export", weights done, weights in all).

    Raises:
        ConflictError: `out` exists. UsageError: unknown form or type.
        UnsupportedError: the form cannot express the model; it says what. UnavailableError: a package is missing.
    """
    if form not in FORMS:
        raise UsageError(f"unknown form {form!r}", remedy=f"Known: {', '.join(FORMS)}", param="to")
    if wish and wish not in wishes()[form]:
        raise UsageError(
            f"{form} has no type {wish!r} that is written", remedy=f"Known: {', '.join(wishes()[form])}", param="type"
        )
    if out.exists() or out.is_symlink():
        raise ConflictError(f"{out} exists", remedy="Name another place; nothing is overwritten.")
    if not out.parent.is_dir():
        raise NotFoundError(f"there is no folder {out.parent}", remedy="Make it first.")
    described = describe(locate(reference, home or Home.find()).path)
    try:
        if not isinstance(described.spec, ModelSpec):
            raise UnsupportedError(f"{described.family.name} is no decoder; only decoders are exported")
        plan = _folded(described)
        with described.guard():
            seen = seen_text([reference], home)
            report = _write(described, plan, form, out, wish, progress, threads or os.cpu_count() or 1, seen)
            described.check_unchanged()
    finally:
        described.source.close()
    report.notes += [*plan.notes, *_kv_note(described.spec, form), *_seen_note(seen, form)]
    return report


def _kv_note(spec: ModelSpec, form: str) -> list[str]:
    """What becomes of the KV type that the model names."""
    if not spec.kv_cache:
        return []
    if form == "onnx":
        return [f"the KV type {spec.kv_cache} is not in the graph, which keeps no K and V between runs"]
    place = GGUF_KEY if form == "gguf" else f"{KEY} of config.json"
    return [f"the KV type {spec.kv_cache} stands in {place}, which Inhouse reads; other programs choose for themselves"]


def _seen_note(seen: str, form: str) -> list[str]:
    """What becomes of the texts that the model was calibrated or healed on."""
    if not seen:
        return []
    if form == "onnx":
        return ["the graph does not say which texts the model was calibrated or healed on"]
    return ["hashes of the texts that the model was calibrated or healed on go along: `inhouse eval` refuses them"]


def _folded(described: Described) -> Plan:
    """What an export reads: the weights of the plain model; of those that are factors or cores alone, a part that
    stands for their product."""
    plan = plan_binding(described.source, described.spec, described.family, described.programs(), None)
    source = described.source
    if not isinstance(source, StoredSource):
        return plan
    parts = {part.spec.name: part for part in plan.parts}
    whole = []
    for name, spec in build(described.spec).weights.items():
        if name in source.alone or name in source.trains or stack_of(name) in source.stacks:
            info = TensorInfo(name, LOW_RANK.upper(), spec.shape, source.form(name).nbytes)
            whole.append(Part(spec, Derive(name, spec.shape, spec.shape), info, LOW_RANK))
        else:
            whole.append(parts[name])
    return replace(plan, parts=tuple(whole))


def _multiplied(source: StoredSource, plan: Plan) -> dict[str, str]:
    """Canonical name -> what its matrix has to be multiplied out of."""
    found = {part.spec.name: "a Tucker core" for part in plan.parts if part.format == LOW_RANK}
    for name, rank in source.ranks.items():
        found[name] = f"a {'product of factors' if name in source.alone else 'side branch'} of rank {rank}"
    return found | dict.fromkeys(source.trains, "a tensor train")


def _write(
    described: Described, plan: Plan, form: str, out: Path, wish: str, progress: Progress, threads: int, seen: str
) -> ExportReport:
    source = described.source
    weights = Weights(source, plan.columns, _multiplied(source, plan) if isinstance(source, StoredSource) else {})
    if form == "gguf":
        return export_gguf(described, plan.parts, weights, out, wish, progress, threads, seen)
    if form == "onnx":
        from inhouse.load.export_onnx import export_onnx  # needs the package onnx, an extra

        return export_onnx(described, plan.parts, weights, out, progress)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        report = export_hf(described, plan.parts, weights, folder, form, wish, progress, seen)
        folder.chmod(0o755)
        os.rename(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    report.path = out
    return report
