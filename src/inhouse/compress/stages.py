"""One stage of a recipe over a Work, unit by unit: matrices in the order of the forward pass, layers, or the model.

Knows how a method of each scope is called, what its result becomes, and what is recorded; knows no method. A unit that
the journal has is not done again.
"""

import inspect
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inhouse.compress.blocks import Block, BlockRunner, Tap
from inhouse.compress.calibrate import Calibration
from inhouse.compress.memory import SLAB_BYTES
from inhouse.compress.method import Method
from inhouse.compress.recipe import Stage
from inhouse.compress.stats import LinearStats
from inhouse.compress.table import METHODS
from inhouse.compress.work import Work
from inhouse.core.errors import UnsupportedError, UsageError
from inhouse.core.progress import Progress, silent
from inhouse.model.moe import FLOAT_WEIGHTS
from inhouse.runtime.form import Form
from inhouse.runtime.packed import Packed, aligned_empty, packed_nbytes

# What takes the place of a format whose super-blocks a matrix is no multiple of: as many bits, smaller groups.
NARROWER: Mapping[str, str] = {
    "q2_k": "u2_g32", "q3_k": "u3_g32", "q4_k": "q4_1", "q5_k": "q5_1", "q6_k": "q6_0", "iq4_xs": "iq4_nl",
    "tq2_0": "u2_g32",
}  # fmt: skip


@dataclass(slots=True)
class StageRun:
    """What a stage works with. `memory`: bytes for the activations of a chunk."""

    work: Work
    stage: Stage
    id: str  # `2.quantize`: its place in the recipe and its kind
    calibration: Calibration | None
    memory: int
    progress: Progress = silent
    done: int = 0
    total: int = 0
    fallbacks: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Does what is left of the stage. Raises UsageError where it selects nothing."""
        units = self.work.units()
        if f"{self.id}/end" in units:
            return
        self.work.begin(self.id)
        scopes = {row.scope for row in self.stage.methods()}
        if len(scopes) > 1:
            raise UsageError(f"{self.id} mixes methods of the scopes {', '.join(sorted(scopes))}")
        {"matrix": self._matrices, "block": self._blocks, "model": self._model}[scopes.pop()]()
        self.work.save(f"{self.id}/end")

    # A matrix at a time.

    def _matrices(self) -> None:
        names = selected(self.work, self.stage)
        if not names:
            raise UsageError(f"{self.id} selects no weight", remedy="Check include and exclude", param=self.id)
        left = [name for name in names if f"{self.id}/{name}" not in self.work.units()]
        self.total = sum(math.prod(self.work.shape(name)) for name in left)
        self._tell(0)
        wanted = [name for name in names if self.stage.needs(name) != {"nothing"}]
        tapped: set[str] = set()
        if wanted:
            if self.calibration is None:
                raise UsageError(f"{self.id} needs calibration texts", param="calibration")
            runner = BlockRunner(self.work, self.calibration, self.work.folder, self.memory)
            taps = {name for op in self.work.program.ops if op.kind != "embed" for name in op.weights}
            for name in names:  # what no linear reads comes first, so that the pass sees it as it will be
                if name not in taps:
                    self._one(name, None)
                    tapped.add(name)

            def visit(tap: Tap) -> None:
                for name, stats in tap.stats.items():
                    if name in names and name not in tapped:
                        self._one(name, stats)
                        tapped.add(name)

            runner.run(visit, lambda name: name in names and self.stage.needs(name) == {"gram"})
        for name in names:
            if name not in tapped:
                self._one(name, None)

    def _tell(self, more: int) -> None:
        """Progress in weights (layers) of what this process has to do, so that the estimate is of its own pace."""
        self.done += more
        if self.total:
            self.progress(f"{self.stage.kind} {self.stage.method}", self.done, self.total)

    def _one(self, name: str, stats: LinearStats | None) -> None:
        unit = f"{self.id}/{name}"
        if unit not in self.work.units():
            began = time.perf_counter()
            record = self._compress(name, stats)
            if stats is not None:
                record |= _findings(name, stats)
            self.work.save(unit, seconds=round(time.perf_counter() - began, 4), record=record)
            self._tell(math.prod(self.work.shape(name)))

    def _compress(self, name: str, stats: LinearStats | None) -> dict[str, Any]:
        chosen, fmt, options = self.stage.choice(name)
        row = METHODS[chosen]
        record: dict[str, Any] = {}
        if row.need(options) != "nothing" and (stats is None or not stats.count):
            why = "no calibration token reached it" if stats is not None else "its inputs are token ids"
            record["fallback"] = f"{name}: {why}; {row.fallback or row.name} without statistics"
            stats = None
            if row.fallback:
                row = METHODS[row.fallback]
                options = row.options(**row.defaults)
        if fmt:
            fmt, note = fitting(fmt, self.work.shape(name))
            record |= {"fallback": f"{name}: {note}"} if note else {}
        read = self.work.float_value if row.family == "quantize" or row.takes_form else self.work.value
        weight = read(name)
        mask = self.work.mask(name)
        made, more = self._call(
            row, weight, stats, options, fmt, mask, self.work.form(name) if row.takes_form else None
        )
        self._keep(name, row, made, mask, record)
        return {"method": row.name, "format": fmt, **record, **more}

    def _call(
        self,
        row: Method,
        weight: Tensor,
        stats: LinearStats | None,
        options: Any,
        fmt: str,
        mask: Tensor | None,
        form: Form | None,
    ) -> tuple[Any, dict[str, Any]]:
        """The method's result, and what it says for the record; large matrices in runs of rows where it allows."""
        step = max(16, SLAB_BYTES // (4 * weight.shape[1]) // 16 * 16)
        if not row.rows_apart or row.takes_form or step >= weight.shape[0]:
            extra: dict[str, Any] = {"mask": mask} if row.masks else {}
            extra |= {"form": form} if row.takes_form else {}
            return _parts(row.run(weight, stats, options, fmt, **extra))
        made: list[Any] = []
        record: dict[str, Any] = {}
        for start in range(0, weight.shape[0], step):
            part = slice(start, start + step)
            more = {"mask": None if mask is None else mask[part]} if row.masks else {}
            one, said = _parts(row.run(weight[part].contiguous(), stats, options, fmt, **more))
            made.append(one)
            record |= said
        return _stacked(made), record

    def _keep(self, name: str, row: Method, made: Any, mask: Tensor | None, record: dict[str, Any]) -> None:
        if isinstance(made, Form):
            self.work.put_form(name, made)
            if mask is not None:
                lost = int((torch.from_numpy(made.value())[~mask] != 0).sum())
                if lost:
                    record["fallback"] = f"{name}: {lost} pruned weights are not 0 in this format"
        elif made.dtype is torch.bool:
            self.work.put_mask(name, made)
            self.work.put(name, self.work.value(name) * made)
        else:
            self.work.put(name, made)
            if row.family == "prune":
                self.work.put_mask(name, made != 0)

    # A layer at a time.

    def _blocks(self) -> None:
        if self.calibration is None:
            raise UsageError(f"{self.id} needs calibration texts", param="calibration")
        row, layers = METHODS[self.stage.method], {op.layer for op in self.work.program.ops if op.layer >= 0}
        self.total = sum(f"{self.id}/layer{layer}" not in self.work.units() for layer in layers)
        self._tell(0)

        def visit(block: Block) -> None:
            unit = f"{self.id}/layer{block.layer}"
            if unit not in self.work.units():
                began = time.perf_counter()
                record = row.run(self.work, block.layer, block, self.stage.options, self.stage.format) or {}
                self.work.save(unit, seconds=round(time.perf_counter() - began, 4), record=record)
                self._tell(1)

        BlockRunner(self.work, self.calibration, self.work.folder, self.memory).run_blocks(visit)

    # The model at once.

    def _model(self) -> None:
        unit = f"{self.id}/model"
        if unit in self.work.units():
            return
        row = METHODS[self.stage.method]
        report: dict[str, Any] = {}
        if row.need(self.stage.options) != "nothing" and self.calibration is None:
            raise UsageError(f"{self.id} needs calibration texts", param="calibration")
        began = time.perf_counter()
        offered = {"progress": self.progress, "formats": self._format}
        more = {key: value for key, value in offered.items() if key in inspect.signature(row.run).parameters}
        row.run(self.work, self.calibration, self.stage.options, report, **more)
        self.work.save(unit, seconds=round(time.perf_counter() - began, 4), record=report)

    def _format(self, name: str) -> str:
        """The format that the stage has for a matrix; "" for one that it leaves alone."""
        return self.stage.choice(name)[1] if self.stage.selects(name) else ""


def selected(work: Work, stage: Stage) -> list[str]:
    """Matrices that a stage works on. What chooses experts stays as it is unless `include` names it."""
    return [
        name for name in work.matrices()
        if stage.selects(name) and (stage.include or not name.endswith(FLOAT_WEIGHTS))
    ]  # fmt: skip


def fitting(fmt: str, shape: tuple[int, ...]) -> tuple[str, str]:
    """(the format, or one of as many bits where the matrix is no multiple of its super-blocks; what to say of that)."""
    try:
        packed_nbytes(fmt, (shape[0], shape[1]))
        return fmt, ""
    except UnsupportedError as error:
        other = NARROWER.get(fmt)
        if other is None:
            raise
        return other, f"{error.message}; {other} instead"


def _parts(result: Any) -> tuple[Any, dict[str, Any]]:
    if isinstance(result, tuple):
        return result[0], dict(result[1])
    return result, {}


def _stacked(made: list[Any]) -> Any:
    """Results of runs of rows as that of the whole matrix; forms lie in tiles of 16 rows, one after the other."""
    if not isinstance(made[0], Form):
        return torch.cat(made)
    mains = [form.main for form in made if form.main is not None and form.low_rank is None]
    if len(mains) < len(made):
        raise UsageError("a method whose rows are apart gave a form with a side branch", remedy="Report this")
    data = aligned_empty(sum(main.nbytes for main in mains))
    np.concatenate([main.data for main in mains], out=data)
    shape = (sum(main.shape[0] for main in mains), mains[0].shape[1])
    return Form(Packed(mains[0].format, shape, data), None, made[0].columns)


def _findings(name: str, stats: LinearStats) -> dict[str, Any]:
    """What calibration found of a linear's inputs, if it is worth saying."""
    found: dict[str, Any] = {"tokens": stats.count}
    dead = len(stats.dead) if stats.count else 0
    if dead:
        found["dead"] = dead
    return found
