"""The end of a run: the checkpoint written from the list of expected tensors, and the proof that it is the model.

Knows the stored form; knows no methods. Nothing in the checkpoint depends on when or how often a run was
interrupted: times and memory are the run folder's, not the manifest's.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from inhouse.compress.blocks import BlockRunner
from inhouse.compress.calibrate import Calibration
from inhouse.compress.fallbacks import of_records
from inhouse.compress.matrix import sparsest, sparsest_floats
from inhouse.compress.recipe import Recipe
from inhouse.compress.work import Work
from inhouse.core.errors import FormatError, UnsupportedError
from inhouse.core.progress import Progress, silent
from inhouse.load.prove import Proof, prove
from inhouse.load.stored import stored_config, stored_sides
from inhouse.model.spec import ModelSpec
from inhouse.runtime.form import Form
from inhouse.runtime.packed import pack_float
from inhouse.runtime.packed_pack import narrow_bf16
from inhouse.store.stored_model import TABLE, StoredModel, write_stored
from inhouse.store.writing import atomic_file

F32 = npt.NDArray[np.float32]
PROOF_TOKENS = 64
SETTLED = "floats/end"  # the unit of `settle`; units that end so are no work that is listed


class Writer:
    """What of a Work is written: every tensor that its Programs name, once."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._float = float_format(work)
        self.notes: list[str] = []

    def forms(self) -> Iterator[tuple[str, Form]]:
        """Matrices and tables, in the order of the forward pass."""
        for name, spec in self._work.programs.weights.items():
            if len(spec.shape) == 2:
                yield name, self._form(name)

    def vectors(self) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """Norms and biases, in the type of the opened model where they are as they were."""
        for name, spec in self._work.programs.weights.items():
            if len(spec.shape) == 1:
                value = self._work.value(name).numpy()
                kind = self._work.source_dtype(name)
                yield name, narrow_bf16(value) if kind == "bf16" else value.astype("<f2" if kind == "f16" else "<f4")

    def value(self, name: str) -> F32 | Form:
        """What the written tensor must decode to."""
        if len(self._work.shape(name)) == 2:
            return self._form(name)
        return self._work.value(name).numpy()

    def _form(self, name: str) -> Form:
        form = self._work.form(name)
        if form is not None:
            if form.main is None or self._work.mask(name) is None:
                return form
            main, why = sparsest(form.main)
            self._dense(name, why)
            return replace(form, main=main)
        kind = self._float if self._work.is_changed(name) else self._work.source_dtype(name)
        value = self._work.value(name).numpy()
        try:
            packed = pack_float(value, kind)
            if self._work.mask(name) is not None:
                packed, why = sparsest_floats(value, packed)
                self._dense(name, why)
            return Form(packed)
        except FormatError:
            self.notes.append(f"{name} is kept as f32: a value is beyond {kind}")
            return Form(pack_float(value, "f32"))

    def _dense(self, name: str, why: str) -> None:
        """Says why a matrix with zeros is stored with them."""
        if why:
            self.notes.append(f"{name} is stored dense: {why}")


def float_format(work: Work) -> str:
    """What changed floats are rounded to: what most matrices of the opened model are; f32 where those were codes."""
    kinds = Counter(info.dtype for info in (work.described.source.info(n) for n in work.described.source)
                    if len(info.shape) > 1)  # fmt: skip
    return {"F16": "f16", "BF16": "bf16"}.get(kinds.most_common(1)[0][0] if kinds else "", "f32")


def settle(work: Work) -> None:
    """Floats that a stage changed become what they are stored as (bf16 or f16, where the opened model is that), so that
    the proof and the report are of what is written. Once a run; values beyond f16 stay, and are stored as f32."""
    kind = float_format(work)
    if kind == "f32" or SETTLED in work.units():
        return
    for name in work.matrices():
        if work.form(name) is None and work.is_changed(name):
            value = work.value(name).numpy()
            with suppress(FormatError):
                held = pack_float(value, kind).dequantize()
                if not np.array_equal(held, value):
                    work.put(name, torch.from_numpy(held))
    work.save(SETTLED)


def write(work: Work, folder: Path, manifest: Mapping[str, Any]) -> tuple[StoredModel, list[str]]:
    """Writes the checkpoint into a folder that is made anew; also what had to be kept wider."""
    if isinstance(work.spec, ModelSpec) is False and work.described.source.format == "gguf":
        raise UnsupportedError("an encoder from GGUF has no config.json to be written with")
    shutil.rmtree(folder, ignore_errors=True)
    settle(work)
    writer = Writer(work)
    config = stored_config(work.described, work.spec, work.kept_layers)
    sides = stored_sides(work.described)
    return write_stored(folder, config, writer.forms(), writer.vectors(), manifest, sides), writer.notes


def proof(
    work: Work,
    folder: Path,
    calibration: Calibration | None,
    run: bool,
    threads_folder: Path,
    progress: Progress = silent,
) -> Proof:
    """Opens the checkpoint again: every tensor equal to the last bit, and, with `run`, logits as those in memory."""
    writer = Writer(work)
    if not run or not isinstance(work.spec, ModelSpec) or work.spec.headless:
        return prove(folder, writer.value, progress=progress)
    ids = _tokens(work, calibration)

    def logits(tokens: npt.NDArray[np.int64]) -> F32:
        rows = torch.from_numpy(tokens)[None]
        one = Calibration(rows, torch.tensor([rows.shape[1]]), "", ())
        return BlockRunner(work, one, threads_folder).outputs()["logits"].numpy()

    return prove(folder, writer.value, logits, ids, progress=progress)


def _tokens(work: Work, calibration: Calibration | None) -> npt.NDArray[np.int64]:
    if calibration is not None:
        count = min(int(calibration.lengths[0]), PROOF_TOKENS)
        return calibration.tokens[0, :count].numpy()
    length = min(PROOF_TOKENS, work.spec.context_length)
    return np.random.default_rng(0).integers(0, work.spec.vocab_size, length)


def manifest(recipe: Recipe, work: Work, calibration: Calibration | None, print_: Mapping[str, Any]) -> dict[str, Any]:
    """What the checkpoint says of how it was made: a function of what was asked, never of when."""
    units = [line for line in work.journal.lines if "unit" in line and not line["unit"].endswith("/end")]
    records = {line["unit"]: _timeless(line["record"]) for line in units if line.get("record")}
    texts = [dict(text) for text in calibration.texts] if calibration is not None else []
    texts += [dict(text) for record in records.values() for text in record.get("texts", ())]
    return {
        "summary": recipe.summary(), "recipe": recipe.canonical(), "fingerprint": dict(print_),
        "model": {"reference": work.reference, "digest": work.digest},
        "calibration": calibration.manifest() | {"texts": []} if calibration is not None else None,
        "texts": texts, "notes": list(work.notes), "fallbacks": of_records(records), "units": records,
    }  # fmt: skip


def _timeless(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a method recorded, without how long it took: the journal keeps that."""
    return {key: value for key, value in record.items() if key != "seconds"}


def record_gate(folder: Path, report: Mapping[str, Any]) -> None:
    """Adds the gate's result to the manifest of a written checkpoint."""
    table = folder / TABLE
    document = json.loads(table.read_text("utf-8"))
    document["manifest"]["gate"] = dict(report)
    with atomic_file(table) as file:
        file.write(json.dumps(document, ensure_ascii=False).encode())
