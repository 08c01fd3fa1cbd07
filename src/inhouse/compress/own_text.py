"""Calibration on text that the model writes itself, where the user gives none. Knows how to open a model; no recipe."""

from inhouse.compress.calibrate import Calibration, CalibrationOptions, rows_of
from inhouse.compress.generated import sample_documents
from inhouse.core.progress import Progress, silent
from inhouse.core.settings import load_settings
from inhouse.engine.session import Session

SAID = "text that the model wrote itself (temperature 1), because no calibration file was given"


class OwnText:
    """What a model writes: drawn when it is first asked for, and once for equal options, whoever asks."""

    def __init__(self, model: str, threads: int | None = None) -> None:
        self._model, self._threads = model, threads
        self._drawn: dict[tuple[int, int, int], Calibration] = {}

    def rows(self, options: CalibrationOptions, progress: Progress = silent) -> Calibration:
        """`options.samples` rows of at most `options.length` tokens. Raises what opening the model raises, and
        UsageError where it has nothing to begin a text with."""
        key = (options.samples, options.length, options.seed)
        if key not in self._drawn:
            settings = load_settings({"threads": self._threads, "max_sequences": 64})
            with Session.open(self._model, settings) as session:
                length = min(options.length, session.engine.context_length)
                drawn = sample_documents(session, options.samples, length=length, seed=options.seed, progress=progress)
                self._drawn[key] = rows_of([row for row in drawn if len(row) > 1], SAID)
        return self._drawn[key]
