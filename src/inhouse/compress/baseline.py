"""What a recipe's codes are measured against: plain weighted rounding of the opened model in the very same formats.

Knows how to lead the ordinary stage and writer over a second Work; the result is a folder that nobody keeps.
"""

import shutil
from pathlib import Path

from inhouse.compress import finish
from inhouse.compress.calibrate import Calibration
from inhouse.compress.methods.rtn import RtnOptions
from inhouse.compress.recipe import Override, Recipe, Stage
from inhouse.compress.stages import StageRun
from inhouse.compress.work import Work
from inhouse.core.progress import Progress, silent
from inhouse.model.families.kv_cache import with_kv
from inhouse.model.spec import ModelSpec
from inhouse.runtime.packed_formats import FORMATS, is_float

ROUNDING = ("round", "rtn")  # methods that are the baseline themselves


def comparable(recipe: Recipe) -> bool:
    """Whether plain rounding in the same formats is what the recipe has to beat: it quantises by data, and nothing is
    taken away, trained or repaired on the way."""
    kinds = {stage.kind for stage in recipe.stages}
    by_data = any(row.name not in ROUNDING for s in recipe.stages if s.kind == "quantize" for row in s.methods())
    return by_data and kinds <= {"quantize", "smooth", "kv"}


def formats_of(work: Work) -> dict[str, str]:
    """Matrix -> code format, of those that became plain codes."""
    found = {}
    for name in work.matrices():
        form = work.form(name)
        if form is not None and form.main is not None and form.low_rank is None and not is_float(form.main.format):
            if not FORMATS[form.main.format].coding:
                found[name] = form.main.format
    return found


def write_baseline(
    work: Work, calibration: Calibration | None, memory: int, folder: Path, progress: Progress = silent
) -> Path | None:
    """Rounds the model that `work` opened into `folder`/model; None where no matrix became plain codes."""
    formats = formats_of(work)
    if not formats or not isinstance(work.spec, ModelSpec) or work.kept_layers is not None:
        return None
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    options = RtnOptions(importance=calibration is not None)
    overrides = tuple(Override(name, "rtn", fmt, options) for name, fmt in formats.items())
    stage = Stage("quantize", "rtn", options, next(iter(formats.values())), tuple(formats), (), overrides)
    with Work.open(str(work.described.path), folder) as plain:
        if work.spec.kv_cache:
            plain.replace_spec(with_kv(plain.spec, work.spec.kv_cache))
        StageRun(plain, stage, "0.baseline", calibration, memory, progress).run()
        finish.write(plain, folder / "model", {"summary": "plain rounding, to be compared with"})
    return folder / "model"
