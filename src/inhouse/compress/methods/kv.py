"""K and V kept as codes while the model runs: int8 with a scale for each token and head; int4 with a scale and a
minimum for each channel of K over blocks of 16 positions and for each position of V, the last 128 positions in f16
(KIVI, Liu et al. 2024, arXiv 2402.02750). No weight changes: the model's spec names the type, `--kv` goes before it.
"""

from dataclasses import dataclass
from typing import Any, Literal

from inhouse.compress.calibrate import Calibration
from inhouse.compress.work import Work
from inhouse.core.errors import UsageError
from inhouse.model.families.kv_cache import kv_type, with_kv
from inhouse.runtime.kv_codes import KV_TYPES, code_state

Element = Literal["f32", "f16", "bf16", "int8", "int4"]


@dataclass(frozen=True, slots=True)
class KvOptions:
    """Element types of the cached K and V. Raises UsageError for two that do not go together."""

    k: Element = "int8"
    v: Element = "int8"

    def __post_init__(self) -> None:
        if not kv_type(self.k, self.v):
            raise UsageError(f"K as {self.k} and V as {self.v} do not go together", remedy=f"Use {', '.join(KV_TYPES)}")

    @property
    def label(self) -> str:
        """As `--kv` writes it."""
        return kv_type(self.k, self.v)


def kv(work: Work, calibration: Calibration | None, options: KvOptions, report: dict[str, Any]) -> None:
    """Names the type in the model's spec. Raises UnsupportedError for a model that cannot keep K and V so."""
    kv_check(work, "", "", options)
    work.replace_spec(with_kv(work.spec, options.label))
    report["kv_cache"] = options.label


def kv_check(work: Work, name: str, fmt: str, options: KvOptions) -> None:
    """Raises UnsupportedError where the shapes tell that the model cannot keep K and V so."""
    with_kv(work.spec, options.label)
    code_state(work.programs, options.label)
