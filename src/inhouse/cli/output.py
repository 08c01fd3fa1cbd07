"""How commands speak: tables and JSON on stdout, progress on stderr. Light: nothing here imports a terminal library."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

KEEP_SECONDS = 1.0  # a bar that lasted less leaves no trace


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(value, ensure_ascii=False, indent=2, default=str))


def print_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Aligned columns with a header; numbers to the right, the rest to the left."""
    texts = [[_text(row.get(column)) for column in columns] for row in rows]
    widths = [max([len(c), *(len(t[i]) for t in texts)]) for i, c in enumerate(columns)]
    right = [bool(rows) and all(isinstance(r.get(c), int | float) for r in rows) for c in columns]
    for cells in [[c.upper() for c in columns], *texts]:
        line = "  ".join(t.rjust(w) if r else t.ljust(w) for t, w, r in zip(cells, widths, right, strict=True))
        print(line.rstrip())


def print_pairs(pairs: Mapping[str, Any]) -> None:
    """`name  value` a line, aligned."""
    width = max(map(len, pairs), default=0)
    for name, value in pairs.items():
        print(f"{name:<{width}}  {_text(value)}")


def print_note(text: str) -> None:
    """Something the user should know, on stderr."""
    print(f"note: {text}", file=sys.stderr)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def human_bytes(size: float) -> str:
    """`1536` as `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def human_count(count: float) -> str:
    """`494032768` as `494.0M`."""
    for unit in ("", "K", "M", "B"):
        if count < 1000:
            return f"{count:.1f}{unit}" if unit else f"{count:.0f}"
        count /= 1000
    return f"{count:.1f}T"


def human_seconds(seconds: float) -> str:
    """`75` as `1:15`, `4000` as `1:06:40`."""
    whole = int(seconds + 0.5)
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


class ProgressBar:
    """A bar with an estimate of the time left; call it as a `core.progress.Progress`.

    Draws on a terminal only; elsewhere it writes one line for a stage that lasts over a second, so that logs stay
    readable.
    """

    def __init__(
        self, stream: TextIO | None = None, *, unit: str = "bytes", units: Mapping[str, str] | None = None,
        width: int = 28,
    ) -> None:  # fmt: skip
        """unit: what is counted; units: the same of stages that count something else."""
        self._stream = stream or sys.stderr
        self._units = units or {}
        self._unit, self._width = unit, width
        self._stage, self._began, self._drawn = "", 0.0, 0.0
        self._live = self._stream.isatty()
        self._open = False

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self.finish()
            self._stage, self._began, self._drawn = stage, now, 0.0
        if not self._live:
            if not self._drawn and now - self._began > 1.0:
                self._drawn = now
                print(self._line(done, total, now - self._began), file=self._stream, flush=True)
            return
        if now - self._drawn >= 0.1 or done >= total:
            self._drawn, self._open = now, True
            self._stream.write("\r\x1b[K" + self._line(done, total, now - self._began))
            self._stream.flush()
            if done >= total:
                self.finish()

    def _line(self, done: int, total: int, elapsed: float) -> str:
        share = min(1.0, done / total) if total else 1.0
        bar = "#" * round(share * self._width)
        unit = self._units.get(self._stage, self._unit)
        amount = f"{human_bytes(done)} of {human_bytes(total)}" if unit == "bytes" else f"{done} of {total} {unit}"
        left = f", {human_seconds(elapsed / share - elapsed)} left" if 0 < share < 1 and elapsed > 0.5 else ""
        return f"{self._stage} [{bar:<{self._width}}] {share:4.0%} {amount}{left}"

    def finish(self) -> None:
        """Ends the line of the bar, and takes it away again if the stage was short; safe to call at any time."""
        if self._open:
            short = time.monotonic() - self._began < KEEP_SECONDS
            self._stream.write("\r\x1b[K" if short else "\n")
            self._stream.flush()
            self._open = False
