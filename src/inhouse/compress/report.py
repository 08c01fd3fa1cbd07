"""The report of a compressed model: one HTML file that needs no network, with plots, and the same figures as JSON.

Knows what a run ended with; measures nothing but tensors and speed. Times and paths of this machine stand here and
never in the model.
"""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader

from inhouse.compress.evaluate import Divergence
from inhouse.compress.fallbacks import grouped
from inhouse.compress.gate import Judged
from inhouse.compress.speed import Speed
from inhouse.compress.tensor_facts import TensorFacts
from inhouse.store.writing import atomic_file

TEMPLATE = "report.html.j2"
QUANTILES = (0.5, 0.9, 0.99, 0.999, 1.0)
POSITION_BINS = 16


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a report is made of. `spectra`: (matrix, singular values before, after, rank)."""

    title: str
    result: Mapping[str, Any]
    manifest: Mapping[str, Any]
    tensors: Sequence[TensorFacts]
    spectra: Sequence[tuple[str, Any, Any, int]]
    judged: Judged | None
    speed: tuple[Speed, Speed] | None
    bytes_before: int


def write_report(folder: Path, inputs: Inputs) -> Path:
    """Writes report.json and report.html into `folder`, each whole or not at all; the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    document = facts(inputs)
    with atomic_file(folder / "report.json") as file:
        file.write(json.dumps(document, ensure_ascii=False, indent=1).encode())
    environment = Environment(loader=PackageLoader("inhouse.compress", "."), autoescape=True)
    environment.filters |= {"number": _number, "grouped": grouped}
    page = environment.get_template(TEMPLATE).render(r=document, plots=drawings(inputs))
    with atomic_file(folder / "report.html") as file:
        file.write(page.encode())
    return folder / "report.html"


def facts(inputs: Inputs) -> dict[str, Any]:
    """Everything that the page says, as JSON."""
    judged, speed = inputs.judged, inputs.speed
    result = dict(inputs.result)
    return {
        "title": inputs.title, "ref": result["ref"], "summary": inputs.manifest["summary"],
        "recipe": inputs.manifest["recipe"], "fingerprint": inputs.manifest["fingerprint"],
        "model": inputs.manifest["model"], "calibration": inputs.manifest["calibration"],
        "machine": {"system": platform.platform(), "processor": _processor()},
        "size": {
            "bytes_before": inputs.bytes_before, "bytes": result["bytes"], "bits_per_weight": result["bits_per_weight"],
            "share": result["bytes"] / inputs.bytes_before if inputs.bytes_before else None,
        },
        "quality": judged.report.to_dict() if judged is not None else None,
        "divergence": _quantiles(judged.divergence) if judged is not None else None,
        "speed": {"before": speed[0].to_dict(), "after": speed[1].to_dict()} if speed is not None else None,
        "peak_memory": result["peak_memory"], "ram": result["ram"], "seconds": result["seconds"],
        "fallbacks": list(result["fallbacks"]), "notes": list(result["notes"]), "proof": result["proof"],
        "search": result.get("search"), "tensors": [one.to_dict() for one in inputs.tensors],
    }  # fmt: skip


def drawings(inputs: Inputs) -> dict[str, str]:
    """Name -> SVG; what there is nothing to draw of is left out, and all where matplotlib is not installed."""
    try:
        from inhouse.compress import plots
    except ImportError:
        return {}
    out: dict[str, str] = {}
    matrices = [t for t in inputs.tensors if len(t.shape) == 2]
    if matrices:
        out["bits"] = plots.bars([t.name for t in matrices], [t.bits for t in matrices], "bits a weight")
        for key, what in (("error", "relative error of the weights"), ("zeros", "share of exact zeros")):
            drawn = _map(matrices, key)
            if drawn is not None:
                out[key] = plots.heat(*drawn, what)
    if searched := inputs.result.get("search"):
        good = [c for c in searched["candidates"] if not c["error"]]
        points = [(c["name"], c["nbytes"] / 1e6, max(c["kld"], 1e-9), c["front"]) for c in good]
        out["search"] = plots.scatter(
            points, "MB as stored", "KL divergence, nats a token", inputs.result["bytes"] / 1e6
        )
    if inputs.judged is not None:
        divergence = inputs.judged.divergence
        out["kld"] = plots.histogram(divergence.kld, "KL divergence, nats a token (dashed: median, 99 %)")
        out["positions"] = plots.curve(*_agreement(divergence), "position of the token", "share of equal top-1")
    for name, before, after, rank in inputs.spectra:
        x = np.arange(1, max(len(before), len(after)) + 1, dtype=np.float64)
        both = {"before": np.maximum(before, 1e-9), "after": np.maximum(after, 1e-9)}
        drawn_ = plots.curve(x, both, f"singular value of {name}", "size", log=True, mark=float(rank) if rank else None)
        out[f"spectrum {name}"] = drawn_
    return out


def _map(matrices: Sequence[TensorFacts], key: str) -> tuple[list[str], list[str], Any] | None:
    """Rows: kinds of matrix; columns: layers. None where there is nothing but zeros or nothing at all."""
    kinds = list(dict.fromkeys(_kind(t) for t in matrices))
    layers = sorted({t.layer for t in matrices})
    values = np.full((len(kinds), len(layers)), np.nan)
    for t in matrices:
        found = getattr(t, key)
        if found is not None:
            values[kinds.index(_kind(t)), layers.index(t.layer)] = found
    if np.isnan(values).all() or (key == "zeros" and not np.nanmax(values) > 0):
        return None
    return kinds, ["outside" if layer < 0 else str(layer) for layer in layers], values


def _kind(t: TensorFacts) -> str:
    parts = t.name.removesuffix(".weight").split(".")
    return ".".join(part for part in parts if part != "layers" and not part.isdigit())


def _agreement(d: Divergence) -> tuple[Any, dict[str, Any]]:
    """Same top-1 by position in the piece: middles of bins, shares."""
    edges = np.linspace(d.position.min(), d.position.max() + 1, POSITION_BINS + 1)
    place = np.clip(np.digitize(d.position, edges) - 1, 0, POSITION_BINS - 1)
    total = np.bincount(place, minlength=POSITION_BINS)
    same = np.bincount(place, weights=d.agree, minlength=POSITION_BINS)
    there = total > 0
    x = ((edges[:-1] + edges[1:]) / 2)[there]
    return x, {"same": same[there] / total[there]}


def _quantiles(d: Divergence) -> dict[str, float]:
    return {f"{share:g}": float(np.quantile(d.kld, share)) for share in QUANTILES}


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return f"{names[0]}, {len(names)} processors" if names else platform.processor()


def _number(value: Any, digits: int = 4) -> str:
    """A number as a reader wants it."""
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}".replace(",", " ")
    return f"{value:.{digits}g}"
