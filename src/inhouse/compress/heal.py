"""Training a Work: its masks held, its forms trained through, the results put back. What healing, distillation,
fine-tuning and quantization-aware training have in common.

Knows Work and the loop; knows no recipe. The caller saves.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from inhouse.compress.calibrate import Calibration
from inhouse.compress.fit import FitConfig, FitResult, Fitter, Setup
from inhouse.compress.grids import Grid
from inhouse.compress.hooks import FormHook
from inhouse.compress.objective import Objective
from inhouse.compress.teacher import LiveTeacher, shared_ids
from inhouse.compress.values import Count, Natural, NotNegative, Positive, Seed
from inhouse.compress.work import Work
from inhouse.core.errors import UnsupportedError, UsageError
from inhouse.core.progress import Progress, silent
from inhouse.load.bind import plan_binding
from inhouse.load.describe import describe, read_tokenizer
from inhouse.load.locate import locate
from inhouse.load.packing import floats
from inhouse.model.build import build
from inhouse.model.rewrite import quantize_activations
from inhouse.model.tokens.tokenizer import Tokenizer
from inhouse.runtime.form import Form
from inhouse.runtime.program import Program, ProgramSet
from inhouse.store.home import Home
from inhouse.train.data import Dataset, make_dataset

HELD_SHARE = 20  # one row in so many is held out for validation
BASE = "base"  # the teacher's name for the model that was opened


@dataclass(frozen=True, slots=True)
class HealOptions:
    """What all training stages share.

    steps, batch_tokens, rate, warmup, seed: of the run. minutes: wall time at most; 0: no limit.
    only: `all`, `low_rank` (factors of side branches alone), `vectors` (norms and biases alone).
    validate_every: steps. learn_steps: scales and zero points of quantised weights learn too.
    activations: int8 activations in the forward pass, as the native engine has them.
    """

    steps: Count = 300
    batch_tokens: Count = 2048
    rate: Positive = 3e-4
    step_rate: NotNegative = 0.3  # of scales, as a factor of `rate`
    warmup: Natural = 20
    minutes: NotNegative = 0.0
    only: Literal["all", "low_rank", "vectors"] = "all"
    validate_every: Count = 50
    learn_steps: bool = True
    activations: bool = False
    seed: Seed = 0

    def config(self) -> FitConfig:
        return FitConfig(
            steps=self.steps, batch_tokens=self.batch_tokens, learning_rate=self.rate, warmup=self.warmup,
            extra_rate=self.step_rate, validate_every=self.validate_every, seed=self.seed,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class TeacherModel:
    """A model to learn from: its Programs, float weights and tokenizer."""

    name: str
    programs: ProgramSet
    weights: Mapping[str, Tensor] = field(repr=False)
    tokenizer: Tokenizer = field(repr=False)

    def live(self, *, features: bool = False) -> LiveTeacher:
        return LiveTeacher(self.programs, self.weights, features=features)


def open_teacher(reference: str, home: Home | None = None) -> TeacherModel:
    """A model of the store, a folder or a .gguf, as floats. Raises what opening a model raises."""
    described = describe(locate(reference, home or Home.find()).path)
    try:
        programs = build(described.spec)
        plan = plan_binding(described.source, described.spec, described.family, programs)
        if plan.columns:
            raise UnsupportedError(f"{reference} keeps columns in act-order", remedy="Take its float version")
        with described.guard():
            weights = {part.spec.name: torch.from_numpy(floats(part, described.source)) for part in plan.parts}
        return TeacherModel(reference, programs, weights, read_tokenizer(described, None, None))
    finally:
        described.source.close()


def check_teacher(work: Work, reference: str) -> None:
    """Opens a teacher's configuration and tokenizer. Raises what opening a model raises, and UnsupportedError for
    another tokenizer (`teacher.shared_ids`)."""
    described = describe(locate(reference, work.home or Home.find()).path)
    try:
        theirs = vocabulary(read_tokenizer(described, None, None))
        size = build(described.spec).vocab_size
    finally:
        described.source.close()
    shared_ids(theirs, vocabulary(work.tokenizer), size, work.programs.vocab_size)


def vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    """Token -> id of everything that a tokenizer knows."""
    pieces = ((tokenizer.token_of(number), number) for number in range(tokenizer.vocab_size))
    return {piece: number for piece, number in pieces if piece is not None}


def teacher_of(work: Work, reference: str = BASE) -> TeacherModel:
    """The model that `work` was opened from, or another."""
    return open_teacher(str(work.located.path) if reference == BASE else reference, work.home)


def as_data(calibration: Calibration) -> tuple[Dataset, Dataset | None]:
    """(training, validation) data of calibration rows; every token but the first of a row is learned. One row in 20 is
    held out, none of fewer than 20."""
    rows = [
        row[:length].tolist()
        for row, length in zip(calibration.tokens, calibration.lengths.tolist(), strict=True)
        if length > 1
    ]
    if not rows:
        raise UsageError("the training texts have no tokens", remedy="Give files with text", param="calibration")
    held = rows[::HELD_SHARE] if len(rows) >= HELD_SHARE else []
    kept = [row for i, row in enumerate(rows) if i % HELD_SHARE or not held]
    return _dataset(kept), _dataset(held) if held else None


def _dataset(rows: list[list[int]]) -> Dataset:
    return make_dataset((row, [False] + [True] * (len(row) - 1)) for row in rows)


def heal(
    work: Work,
    data: Dataset,
    options: HealOptions,
    *,
    objective: Objective | None = None,
    validation: Dataset | None = None,
    judge: Objective | None = None,
    formats: Callable[[str], str] | None = None,
    folder: Path | None = None,
    progress: Progress = silent,
    label: str = "training",
) -> FitResult:
    """Trains the model in hand and puts what came out into `work`, forms as forms, masks held; does not save.

    Args:
        objective: None: cross-entropy.
        formats: canonical name of a matrix -> the format that it is to be trained in ("": floats), for matrices that
            have no form yet; None: those stay floats.
        folder: of the run's checkpoint; an interrupted run goes on from it to the same bits.

    Raises UsageError for unknown options, UnsupportedError for forms in formats that have no grid.
    """
    hooks = _hooks(work, options, formats)
    weights = {name: _start(work, name, hooks) for name in work.names()}
    masks = {name: mask for name in weights if (mask := work.mask(name)) is not None}
    setup = Setup(masks=masks, hooks=hooks, learns=_learns(options, hooks), program=_program(work, options, hooks))
    fitter = Fitter(
        work.programs, weights, data, options.config(), objective=objective, setup=setup, validation=validation,
        judge=judge, folder=folder,
    )  # fmt: skip
    result = fitter.run(minutes=options.minutes or math.inf, progress=progress, label=label)
    for name, before in weights.items():
        after = result.weights[name]
        if not torch.equal(before, after):
            work.put(name, after)
        if name in hooks:
            work.put_form(name, hooks[name].form(after))
    return result


def _start(work: Work, name: str, hooks: Mapping[str, FormHook]) -> Tensor:
    """Floats to begin with: those beneath a form that is trained through, else what there is."""
    return work.float_value(name) if name in hooks else work.value(name)


def _hooks(work: Work, options: HealOptions, formats: Callable[[str], str] | None) -> dict[str, FormHook]:
    found: dict[str, FormHook] = {}
    for name in work.matrices():
        form = work.form(name)
        if form is not None:
            low_rank = options.only == "low_rank"
            if low_rank and form.low_rank is None or options.only == "vectors":
                continue
            main = not low_rank
            floats_of = work.float_value(name)
            found[name] = FormHook(form, floats_of, learn_main=main, learn_steps=options.learn_steps)
        elif formats is not None and (fmt := formats(name)):
            start = work.value(name)
            plain = Form(Grid(fmt, start.shape[1]).quantize(start))
            found[name] = FormHook(plain, start, learn_steps=options.learn_steps)
    return found


def _learns(options: HealOptions, hooks: Mapping[str, FormHook]) -> Callable[[str], bool]:
    def mains(name: str) -> bool:
        return name not in hooks or hooks[name].main_learns

    kinds: dict[str, Callable[[str], bool]] = {
        "all": mains, "low_rank": lambda name: False, "vectors": lambda name: not name.endswith(".weight"),
    }  # fmt: skip
    if options.only not in kinds:
        raise UsageError(f"unknown part {options.only!r}", remedy=f"Use {', '.join(kinds)}", param="only")
    return kinds[options.only]


def _program(work: Work, options: HealOptions, hooks: Mapping[str, FormHook]) -> Program | None:
    if not options.activations:
        return None
    formats = {name: hook.format for name, hook in hooks.items() if hook.format}
    return quantize_activations(work.programs, formats).programs["step"]


def summary(result: FitResult) -> dict[str, Any]:
    """What a report says of a run: steps, losses of first and last tenth, validation, time."""
    tenth = max(1, len(result.losses) // 10)
    means = [sum(part) / len(part) for part in (result.losses[:tenth], result.losses[-tenth:]) if part]
    return {
        "steps": result.steps, "best_step": result.step, "finished": result.finished, "loss": means,
        "validation": [list(pair) for pair in result.validation], "seconds": round(result.seconds, 1),
    }  # fmt: skip


def run_folder(work: Work, stage: str) -> Path:
    """Where a stage's checkpoint lies: of its own for each stage of a recipe, the same after a restart."""
    return work.folder / "training" / f"{len(work.units())}-{stage}"
