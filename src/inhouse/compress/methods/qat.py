"""The recipe's stage `qat`: every matrix is trained in the format it will be stored in, with the float model as
teacher (LLM-QAT, Liu et al. 2023, arXiv 2305.17888). The mathematics and its sources are in `fake_quant`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from inhouse.compress.calibrate import Calibration
from inhouse.compress.heal import BASE, HealOptions, as_data, heal, run_folder, summary, teacher_of
from inhouse.compress.objective import CrossEntropy, Mix, Objective, Response
from inhouse.compress.values import Share
from inhouse.compress.work import Work
from inhouse.core.errors import UsageError
from inhouse.core.progress import Progress, silent


@dataclass(frozen=True, slots=True)
class QatOptions(HealOptions):
    """teacher: as of distillation. ce: share of cross-entropy beside the teacher."""

    teacher: str = BASE
    ce: Share = 0.0


def qat(
    work: Work,
    calibration: Calibration | None,
    options: QatOptions,
    report: dict[str, Any],
    progress: Progress = silent,
    formats: Callable[[str], str] = lambda name: "",
) -> None:
    """Trains `work` in its stored form. Forms of an earlier stage are trained on; other matrices get one in the format
    that `formats` gives for their name ("": they stay floats).

    Raises UsageError without texts, UnsupportedError for a format without a grid.
    """
    if calibration is None:
        raise UsageError("quantization-aware training needs texts", remedy="Name them under calibration")
    data, held = as_data(calibration)
    response: Objective = Response(teacher_of(work, options.teacher).live())
    wanted = Mix((1.0 - options.ce, response), (options.ce, CrossEntropy())) if options.ce else response
    result = heal(
        work, data, options, objective=wanted, judge=response, validation=held, formats=formats,
        folder=run_folder(work, "qat"), progress=progress, label="quantization-aware training",
    )  # fmt: skip
    report.update(summary(result))
