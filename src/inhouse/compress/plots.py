"""The plots of a report, as SVG text. Knows arrays and matplotlib; knows nothing of models or files."""

import io
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

F64 = npt.NDArray[np.float64]


def _svg(draw: Callable[[Axes], None], width: float = 6.4, height: float = 3.2) -> str:
    """One figure, text as text, the same bytes for the same data."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "inhouse", "font.size": 9}):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots())
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def bars(names: Sequence[str], values: Sequence[float], what: str) -> str:
    """A bar for each name."""

    def draw(axes: Axes) -> None:
        axes.bar(range(len(values)), values, width=0.9)
        axes.set_ylabel(what)
        step = max(1, len(names) // 32)
        axes.set_xticks(range(0, len(names), step), list(names)[::step], rotation=90, fontsize=6)
        axes.margins(x=0.01)

    return _svg(draw, 9.0, 3.6)


def heat(rows: Sequence[str], columns: Sequence[str], values: F64, what: str) -> str:
    """A map of values [rows, columns]; NaN stays empty."""

    def draw(axes: Axes) -> None:
        shown = axes.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis")
        axes.set_yticks(range(len(rows)), list(rows), fontsize=6)
        axes.set_xticks(range(len(columns)), list(columns), rotation=90, fontsize=6)
        axes.figure.colorbar(shown, ax=axes, label=what)

    return _svg(draw, 6.4, 1.6 + 0.16 * len(rows))


def histogram(values: F64, what: str) -> str:
    """How often values lie where, on a logarithmic axis."""

    def draw(axes: Axes) -> None:
        floor = 1e-9
        low, high = np.log10(max(float(values.min()), floor)), np.log10(max(float(values.max()), 10 * floor))
        axes.hist(np.maximum(values, floor), bins=list(np.logspace(low, high + 1e-9, 60)))
        axes.set_xscale("log")
        axes.set_xlabel(what)
        axes.set_ylabel("tokens")
        for share in (0.5, 0.99):
            axes.axvline(max(float(np.quantile(values, share)), floor), color="black", linewidth=0.8, linestyle="--")

    return _svg(draw)


def curve(x: F64, ys: Mapping[str, F64], across: str, up: str, *, log: bool = False, mark: float | None = None) -> str:
    """Lines over one axis; `mark`: a vertical line."""

    def draw(axes: Axes) -> None:
        for name, y in ys.items():
            axes.plot(x[: len(y)], y, label=name, linewidth=1)
        if log:
            axes.set_yscale("log")
        if mark is not None:
            axes.axvline(mark, color="black", linewidth=0.8, linestyle="--")
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        if len(ys) > 1:
            axes.legend()

    return _svg(draw)


def scatter(points: Sequence[tuple[str, float, float, bool]], across: str, up: str, mark: float | None = None) -> str:
    """Named points (name, x, y, on the front); the front is joined by a line."""

    def draw(axes: Axes) -> None:
        front = sorted((x, y) for _, x, y, best in points if best)
        axes.plot([x for x, _ in front], [y for _, y in front], color="tab:orange", linewidth=1)
        axes.scatter([p[1] for p in points], [p[2] for p in points], s=14)
        for name, x, y, best in points:
            if best:
                axes.annotate(name, (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
        if mark is not None:
            axes.axvline(mark, color="black", linewidth=0.8, linestyle="--")
        axes.set_yscale("log")
        axes.set_xlabel(across)
        axes.set_ylabel(up)

    return _svg(draw, 9.0, 4.2)
