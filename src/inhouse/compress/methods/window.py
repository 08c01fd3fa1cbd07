"""Attention that looks at less: a sliding window (Longformer, Beltagy et al. 2020, arXiv 2004.05150), the first
positions beside it (StreamingLLM, Xiao et al. 2023, arXiv 2309.17453) and every so many blocks (Child et al. 2019,
arXiv 1904.10509). No weight changes: the model's spec does, so that the engine skips and frees what is masked.
"""

from dataclasses import dataclass
from typing import Any

from inhouse.compress.calibrate import Calibration
from inhouse.compress.values import Count, Natural
from inhouse.compress.work import Work
from inhouse.core.errors import UsageError
from inhouse.model.families.sparse_attention import KEY, attention_key, narrow


@dataclass(frozen=True, slots=True)
class WindowOptions:
    """What each layer sees of the positions before a token. Raises UsageError for sizes that cannot be."""

    window: Count = 4096  # the last so many
    sink: Natural = 0  # and the first so many, whole blocks of 16
    stride: Natural = 0  # and every stride-th block of 16; 0: none

    def __post_init__(self) -> None:
        if self.window < 1 or self.sink < 0 or self.stride < 0:
            raise UsageError(f"window {self.window}, sink {self.sink}, stride {self.stride}: window must be 1 or more")
        if self.sink % 16:
            raise UsageError(f"a sink of {self.sink} positions", remedy="Give a multiple of 16")


def window(work: Work, calibration: Calibration | None, options: WindowOptions, report: dict[str, Any]) -> None:
    """Narrows the attention of every layer. Raises UnsupportedError for a model that cannot be narrowed so."""
    said = attention_key(options.window, options.sink, options.stride)[KEY]
    work.replace_spec(narrow(work.spec, said))
    report.update(said)
