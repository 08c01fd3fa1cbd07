"""One stage of a recipe over a Work, unit by unit: matrices in the order of the forward pass, layers, or the model.

Knows how a method of each scope is called, what its result becomes, and what is recorded; knows no method. A unit that
the journal has is not done again.
"""

import inspect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from inhouse.compress.blocks import Block, BlockRunner, Tap
from inhouse.compress.calibrate import Calibration
from inhouse.compress.fallbacks import KEY, fallback, grouped
from inhouse.compress.matrix import compress_matrix, fitting
from inhouse.compress.memory import anonymous_bytes
from inhouse.compress.recipe import Stage
from inhouse.compress.stats import LinearStats
from inhouse.compress.table import METHODS
from inhouse.compress.work import Work
from inhouse.core.errors import UsageError
from inhouse.core.progress import Progress, silent
from inhouse.model.moe import FLOAT_WEIGHTS


@dataclass(slots=True)
class StageRun:
    """What a stage works with. `memory`: bytes for the activations of a chunk."""

    work: Work
    stage: Stage
    id: str  # `2.quantize`: its place in the recipe and its kind
    calibration: Calibration | None
    memory: int
    progress: Progress = silent
    peak: Callable[[], int] = anonymous_bytes  # the most memory that the process has taken so far
    done: int = 0
    total: int = 0

    def run(self) -> None:
        """Does what is left of the stage. Raises UsageError where it selects nothing."""
        units = self.work.units()
        if f"{self.id}/end" in units:
            return
        self.work.begin(self.id)
        scope = METHODS[self.stage.method].scope  # of all its methods: `parse_recipe` sees to it
        {"matrix": self._matrices, "block": self._blocks, "model": self._model}[scope]()
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
        self._check_applied(names)

    def _check_applied(self, names: Sequence[str]) -> None:
        """A stage none of whose weights got its method must not pass as that method."""
        records = {name: self.work.units()[f"{self.id}/{name}"].get("record", {}) for name in names}
        if any(record.get("method") == self.stage.choice(name)[0] for name, record in records.items()):
            return
        told = grouped([one for record in records.values() for one in record.get(KEY, ())])
        raise UsageError(
            f"{self.id}: no weight was done by {self.stage.method}: {'; '.join(told)}",
            remedy="Name the method that was used instead, or give what the first one needs", param=self.id,
        )  # fmt: skip

    def _tell(self, more: int) -> None:
        """Progress in weights (layers) of what this process has to do, so that the estimate is of its own pace."""
        self.done += more
        if self.total:
            self.progress(f"{self.stage.kind} {self.stage.method}", self.done, self.total)

    def _one(self, name: str, stats: LinearStats | None) -> None:
        unit = f"{self.id}/{name}"
        if unit not in self.work.units():
            began = time.perf_counter()
            record = compress_matrix(self.work, self.stage, name, stats)
            self.work.save(unit, seconds=round(time.perf_counter() - began, 4), peak=self.peak(), record=record)
            self._tell(math.prod(self.work.shape(name)))

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
                chosen = set(selected(self.work, self.stage))
                block.formats = {name: self.stage.choice(name)[1] for name in block.names if name in chosen}
                record = row.run(self.work, block.layer, block, self.stage.options, self.stage.format) or {}
                self.work.save(unit, seconds=round(time.perf_counter() - began, 4), peak=self.peak(), record=record)
                self._tell(1)

        BlockRunner(self.work, self.calibration, self.work.folder, self.memory).run_blocks(visit)
        if row.family == "quantize":
            self._rest(row.name)

    def _rest(self, method: str) -> None:
        """Rounds the matrices that lie outside the blocks, or that the method left alone: a stage that names a format
        leaves none of those it selects in floats without a word."""
        for name in selected(self.work, self.stage):
            unit, fmt = f"{self.id}/{name}", self.stage.choice(name)[1]
            if unit in self.work.units() or not fmt or self.work.form(name) is not None:
                continue
            kept, _ = fitting(fmt, self.work.shape(name))
            row = METHODS["rtn"]
            self.work.put_form(name, row.run(self.work.value(name), None, row.options(), kept))
            why = f"{method} works on the linears of layers"
            said = [fallback(name, f"{method} {fmt}", f"rtn {kept}", why)]
            self.work.save(unit, peak=self.peak(), record={KEY: said})

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
        self.work.save(unit, seconds=round(time.perf_counter() - began, 4), peak=self.peak(), record=report)

    def _format(self, name: str) -> str:
        """The format that the stage has for a matrix; "" for one that it leaves alone."""
        return self.stage.choice(name)[1] if self.stage.selects(name) else ""


def selected(work: Work, stage: Stage) -> list[str]:
    """Matrices that a stage works on. What chooses experts stays as it is unless `include` names it."""
    return [
        name for name in work.matrices()
        if stage.selects(name) and (stage.include or not name.endswith(FLOAT_WEIGHTS))
    ]  # fmt: skip
