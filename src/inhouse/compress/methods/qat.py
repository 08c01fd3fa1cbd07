"""The recipe's stage `qat`: every matrix is trained in the format it will be stored in, with the float model as
teacher (LLM-QAT, Liu et al. 2023, arXiv 2305.17888). The mathematics and its sources are in `fake_quant`."""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from inhouse.compress.calibrate import Calibration
from inhouse.compress.heal import BASE, HealOptions, as_data, heal, run_folder, summary, teacher_of
from inhouse.compress.objective import CrossEntropy, Mix, Objective, Response
from inhouse.compress.work import Work
from inhouse.core.errors import UsageError
from inhouse.core.progress import Progress, silent


@dataclass(frozen=True, slots=True)
class QatOptions(HealOptions):
    """format: of matrices that have no form yet ("": they stay floats). formats: pattern of canonical names -> format,
    the first that fits wins. teacher: as of distillation. ce: share of cross-entropy beside the teacher."""

    format: str = "i4_g64"
    formats: Mapping[str, str] = field(default_factory=dict)
    teacher: str = BASE
    ce: float = 0.0

    def format_of(self, name: str) -> str:
        return next((fmt for pattern, fmt in self.formats.items() if fnmatch.fnmatch(name, pattern)), self.format)


def qat(
    work: Work,
    calibration: Calibration | None,
    options: QatOptions,
    report: dict[str, Any],
    progress: Progress = silent,
) -> None:
    """Trains `work` in its stored form. Forms of an earlier stage are trained on; other matrices get one.

    Raises UsageError without texts, UnsupportedError for a format without a grid.
    """
    if calibration is None:
        raise UsageError("quantization-aware training needs texts", remedy="Name them under calibration")
    data, held = as_data(calibration)
    response: Objective = Response(teacher_of(work, options.teacher).live())
    wanted = Mix((1.0 - options.ce, response), (options.ce, CrossEntropy())) if options.ce else response
    result = heal(
        work, data, options, objective=wanted, judge=response, validation=held, formats=options.format_of,
        folder=run_folder(work, "qat"), progress=progress, label="quantization-aware training",
    )  # fmt: skip
    report.update(summary(result))
