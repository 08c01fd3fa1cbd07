"""Which export can express what compression leaves in a model: asked of the same functions that export.

Writes nothing; `tools/export_matrix.py` makes docs/compression-exports.md of it.
"""

from collections.abc import Iterator
from typing import NamedTuple, cast

import numpy as np

from inhouse.core.tensors import TensorInfo, TensorSource
from inhouse.load.export import FORMS
from inhouse.load.export_coded import CodedForm, carried, coded_form
from inhouse.load.export_gguf import as_stored, is_exact
from inhouse.load.export_hf import float_kind, float_row
from inhouse.load.export_targets import LOW_RANK, Target, Weights
from inhouse.load.packing import Part
from inhouse.model.families.family import Derive
from inhouse.runtime.packed import FORMATS, is_float
from inhouse.runtime.program import WeightSpec

SHAPE = (256, 256)  # every format fits it
NAME = "layers.0.mlp.up.weight"


class Fate(NamedTuple):
    """What an export does with a matrix: `kept`: every value, bit by bit; `became`: what it is there; `note`: why it is
    not what it was."""

    kept: bool
    became: str
    note: str


def stages() -> Iterator[tuple[str, str, str]]:
    """(title, packed format, extra) of everything that a stored matrix can be; extra: `branch`, `alone`, `train`,
    `columns`."""
    for name in FORMATS:
        yield name, name, ""
    yield "4 bits with a low-rank side branch", "i4_g32", "branch"
    yield "f16 with a low-rank side branch", "f16", "branch"
    yield "two factors alone (low rank)", LOW_RANK, "alone"
    yield "tensor train, Tucker stack", LOW_RANK, "train"
    yield "4 bits, columns in act-order", "i4_g32", "columns"


def fate(form: str, name: str, extra: str) -> Fate:
    """What becomes of a linear of that format when the whole model is of it; `form` is one of FORMS, the type as
    stored."""
    target, weights = _stage(name, extra)
    changed = weights.changed(target)
    if form == "onnx":
        return Fate(True, "F32", changed)
    if form == "gguf":
        kind, note = as_stored(target, weights)
        return Fate(is_exact(target, weights, kind), kind, "; ".join(filter(None, (changed, note))))
    if form == "safetensors":
        row = float_row(target, float_kind(target, ""), "", changed)
        return Fate(row.exact, row.became, row.note)
    chosen: CodedForm = coded_form(form, "", [target], weights)
    shared = weights.shared_codes(target)
    kept = carried(form, shared) == (chosen.bits, chosen.group, chosen.scale)
    note = "; ".join(filter(None, (changed, "" if kept or is_plain(name) else f"rounded anew from {name}")))
    return Fate(kept, f"int{chosen.bits} g{chosen.group}", note)


def is_plain(name: str) -> bool:
    """Whether a stage's format is plain floats."""
    return name in FORMATS and is_float(name)


def every_fate(name: str, extra: str) -> dict[str, Fate]:
    """Form -> what becomes of the stage there."""
    return {form: fate(form, name, extra) for form in FORMS}


def _stage(name: str, extra: str) -> tuple[Target, Weights]:
    spec = WeightSpec(NAME, SHAPE, "linear")
    derive = Derive(NAME, SHAPE, SHAPE)
    part = Part(spec, derive, TensorInfo(NAME, name.upper(), SHAPE, 0), name, stored=not is_plain(name))
    columns = {NAME: np.arange(SHAPE[1])[::-1]} if extra == "columns" else {}
    words = {"branch": "a side branch", "alone": "a product of factors", "train": "cores"}
    folded = {NAME: words[extra]} if extra in words else {}
    unread = cast(TensorSource, None)  # deciding reads no tensor
    return Target("model.layers.0.mlp.up_proj.weight", SHAPE, ((part, derive),), False), Weights(
        unread, columns, folded
    )
