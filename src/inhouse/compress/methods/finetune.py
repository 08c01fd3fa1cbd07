"""Fine-tuning: what compression broke is learned again from text alone, by cross-entropy.

Source: the healing step of pruning since Han et al. 2015, arXiv 1506.02626. Masks are held after every optimiser step,
stored forms are trained through (values in the forward pass are those that are stored).
"""

from dataclasses import dataclass
from typing import Any

from inhouse.compress.calibrate import Calibration
from inhouse.compress.heal import HealOptions, as_data, heal, run_folder, summary
from inhouse.compress.work import Work
from inhouse.core.errors import UsageError
from inhouse.core.progress import Progress, silent


@dataclass(frozen=True, slots=True)
class FinetuneOptions(HealOptions):
    """As of healing."""


def finetune(
    work: Work,
    calibration: Calibration | None,
    options: FinetuneOptions,
    report: dict[str, Any],
    progress: Progress = silent,
) -> None:
    """Trains `work` on the calibration's rows. Raises UsageError without any."""
    if calibration is None:
        raise UsageError("fine-tuning needs texts", remedy="Name them under calibration", param="calibration")
    data, held = as_data(calibration)
    result = heal(
        work,
        data,
        options,
        validation=held,
        folder=run_folder(work, "finetune"),
        progress=progress,
        label="fine-tuning",
    )
    report.update(summary(result))
