"""What an export did, tensor by tensor, so that nothing is changed in silence."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Written:
    """One tensor: what it was and became. `exact`: every value is kept; `note`: why it is not what was asked for."""

    name: str
    was: str
    became: str
    exact: bool
    note: str = ""


@dataclass(slots=True)
class ExportReport:
    """Where the model went."""

    path: Path
    format: str
    tensors: list[Written] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    nbytes: int = 0

    @property
    def fallbacks(self) -> list[Written]:
        """Tensors that did not become what was asked for."""
        return [tensor for tensor in self.tensors if tensor.note]

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        rows = [
            {"name": t.name, "was": t.was, "became": t.became, "exact": t.exact} | ({"note": t.note} if t.note else {})
            for t in self.tensors
        ]
        return {
            "path": str(self.path), "format": self.format, "bytes": self.nbytes, "notes": self.notes, "tensors": rows
        }  # fmt: skip
