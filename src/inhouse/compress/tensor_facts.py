"""What became of each matrix: bytes, bits, zeros, error, spectrum. Knows a finished Work; draws nothing."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from inhouse.compress.work import Work
from inhouse.core.progress import Progress, silent
from inhouse.runtime.form import Form
from inhouse.store.stored_model import StoredModel

MAX_SPECTRUM = 4096  # the shorter side of a matrix whose singular values are computed


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """One matrix or vector. `error`: ||W - W'|| / ||W|| against the opened model; None where the shape changed.
    `zeros`: share of exact zeros. `rank`: of its low-rank part; 0: none."""

    name: str
    layer: int  # -1: outside the layers
    shape: tuple[int, ...]
    layout: str
    nbytes: int
    bits: float
    zeros: float
    error: float | None
    rank: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def tensor_facts(work: Work, original: Work, stored: StoredModel, progress: Progress = silent) -> list[TensorFacts]:
    """Facts of every weight. `original`: the opened model; `stored`: what was written."""
    sizes = stored.sizes
    layers = {name: op.layer for op in work.program.ops for name in op.weights}
    names, out = work.names(), []
    for done, name in enumerate(names, 1):
        form, value = work.form(name), work.value(name)
        kept = work.kept_layers
        source = name if kept is None else _renumbered(name, kept)
        same = source in original.programs.weights and original.shape(source) == work.shape(name)
        error = _error(original.value(source), value) if same else None
        out.append(
            TensorFacts(
                name, layers.get(name, -1), tuple(work.shape(name)), _layout(form, stored.layouts, name),
                sizes.get(name, 0), 8 * sizes.get(name, 0) / max(value.numel(), 1),
                float((value == 0).double().mean()), error,
                form.low_rank[0].shape[0] if form is not None and form.low_rank is not None else 0,
            )
        )  # fmt: skip
        progress("report", done, len(names))
    return out


def _layout(form: Form | None, layouts: Mapping[str, str], name: str) -> str:
    parts = [layouts[name]] if name in layouts else []  # as it was written, without zeros where that is smaller
    if form is not None and form.low_rank is not None:
        parts.append(f"{form.low_rank[0].format} x {form.low_rank[1].format}")
    return " + ".join(parts)


def _error(before: Tensor, after: Tensor) -> float:
    size = float(before.double().norm())
    return float((before.double() - after.double()).norm()) / size if size else 0.0


def _renumbered(name: str, kept: list[int]) -> str:
    """The name in the opened model of a weight of a model that lost layers."""
    head, _, rest = name.partition(".")
    number, dot, tail = rest.partition(".")
    if head != "layers" or not number.isdigit() or int(number) >= len(kept):
        return name
    return f"layers.{kept[int(number)]}{dot}{tail}"


def spectra(work: Work, original: Work) -> Iterator[tuple[str, npt.NDArray[np.float64], npt.NDArray[np.float64], int]]:
    """(name, singular values before, after, rank of the low-rank part) of one matrix of the first, the middle and the
    last layer: the one that changed most in kind, the down projection where there is one."""
    layers = sorted({op.layer for op in work.program.ops if op.layer >= 0})
    for layer in dict.fromkeys([layers[0], layers[len(layers) // 2], layers[-1]] if layers else []):
        names = [n for n in work.names(layer) if len(work.shape(n)) == 2 and min(work.shape(n)) <= MAX_SPECTRUM]
        chosen = next((n for n in names if n.endswith("mlp.down.weight")), names[-1] if names else None)
        if chosen is None:
            continue
        form = work.form(chosen)
        source = chosen if work.kept_layers is None else _renumbered(chosen, work.kept_layers)
        after = torch.linalg.svdvals(work.value(chosen).double()).numpy()
        there = source in original.programs.weights
        before = torch.linalg.svdvals(original.value(source).double()).numpy() if there else after
        rank = form.low_rank[0].shape[0] if form is not None and form.low_rank is not None else 0
        yield chosen, before, after, rank
