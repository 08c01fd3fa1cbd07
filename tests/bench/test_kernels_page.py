"""The table of linear kernels from a small recorded output of linear_bench, and the cut into pieces."""

import json
import stat
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import kernel_speed
import kernels_page

RUN = {"machine": "Machine X, 2 CPUs", "command": "python tools/kernel_speed.py", "date": "2026-11-22", "threads": 2}
SHAPE = '"out":1152,"in":896,'


def matrix(name: str, form: str, rows: int, compute: float, read: float) -> str:
    return (
        f'{{"kind":"matrix","model":"qwen2.5-0.5b","matrix":"{name}",{SHAPE}"format":"{form}","isa":"avx512",'
        f'"rows":{rows},"ms":0.05,"GOPs":75.3,"GBs":21.2,"of_compute":{compute},"of_read":{read}}}\n'
    )


def total(form: str, rows: int, tokens: float, compute: float, read: float) -> str:
    return (
        f'{{"kind":"model","model":"qwen2.5-0.5b","format":"{form}","isa":"avx512","rows":{rows},"tokens_s":{tokens},'
        f'"ms":10.0,"GOPs":1234.4,"GBs":38.06,"of_compute":{compute},"of_read":{read}}}\n'
    )


PEAK = '{"kind":"peak","isa":"avx512","threads":2,"read_GBs":45.0,"dot_GOPs":1500.0,"fma_GOPs":300.0}\n'
OUTPUT = [
    PEAK, matrix("qkv", "q4_0", 1, 0.06, 0.8), matrix("head", "q4_0", 1, 0.05, 0.9),
    total("q4_0", 1, 86.66, 0.06, 0.84), matrix("qkv", "q4_0", 512, 0.75, 0.01),
    matrix("head", "q4_0", 512, 0.05, 0.7), total("q4_0", 512, 1250.0, 0.74, 0.0),
    PEAK.replace("45.0", "50.0"), matrix("qkv", "bf16", 1, 0.4, 0.1), total("bf16", 1, 17.04, 1.2, 0.55),
]  # fmt: skip


def recorded(folder: Path) -> Path:
    path = folder / "kernels.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in [RUN, *kernel_speed.gather(OUTPUT)]) + "\n")
    return path


def test_page_has_every_cell_its_share_and_the_weakest_shape(tmp_path: Path) -> None:
    text = kernels_page.page(kernel_speed.read(recorded(tmp_path)))
    assert "Machine: Machine X, 2 CPUs, 2 threads. Measured 2026-11-22 by\n`python tools/kernel_speed.py`." in text
    assert "## qwen2.5-0.5b, avx512\n\n| rows | q4_0 | bf16 |\n" in text
    # bf16's arithmetic counts against twice the f32 peak: 120 % of one is 60 % of the other
    assert "| 1 | 86.7 tok/s, 38.1 GB/s, 84% | 17.0 tok/s, 1,234 GOP/s, 60% |" in text
    assert "| 512 | 1,250 tok/s, 1,234 GOP/s, 74% | not measured |" in text
    assert "| weakest | head at 1 row, 70% | qkv at 1 row, 20% |" in text
    assert "Peaks: 45-50 GB/s read, 1,500 GOP/s of int8 dot products, 300 GOP/s of f32." in text


def test_a_later_figure_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    path = recorded(tmp_path)
    again = next(kernel_speed.gather([PEAK, matrix("qkv", "q4_0", 1, 0.1, 0.95), total("q4_0", 1, 99.0, 0.1, 0.95)]))
    later = RUN | {"date": "2026-11-23", "command": "python tools/kernel_speed.py --again"}
    with path.open("a") as file:
        file.write(json.dumps(later) + "\n" + json.dumps(again) + "\n")
    text = kernels_page.page(kernel_speed.read(path))
    assert "| 1 | 99.0 tok/s, 38.1 GB/s, 95% |" in text
    assert "86.7" not in text
    assert "Measured 2026-11-22 to 2026-11-23 by" in text
    assert "--again`" in text


def test_only_what_is_missing_is_measured(tmp_path: Path) -> None:
    have = kernel_speed.read(recorded(tmp_path))
    found = kernel_speed.missing(have, ["qwen2.5-0.5b"], ["avx512"], ["q4_0", "bf16"], [1, 8, 512])
    assert found == [("qwen2.5-0.5b", "avx512", form, rows) for form, rows in (("q4_0", 8), ("bf16", 8), ("bf16", 512))]


def test_a_limit_keeps_what_was_finished(tmp_path: Path) -> None:
    program = tmp_path / "bench"
    lines = "".join(OUTPUT[:4]) + OUTPUT[4][:30]
    program.write_text(f"#!/bin/sh\nprintf '%s' '{lines}'\nexec sleep 60\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    keys = kernel_speed.missing((), ["qwen2.5-0.5b"], ["avx512"], ["q4_0", "q8_0"], [1, 512])
    begin = time.monotonic()
    found = list(kernel_speed.measure(program, keys, 2, begin + 1))
    assert [(line["rows"], line["matrices"]["head"]) for line in found] == [(1, [0.05, 0.05, 0.9])]
    assert time.monotonic() - begin < 20


def test_no_figures_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["kernels_page.py", str(tmp_path / "none"), str(tmp_path / "page.md")])
    assert kernels_page.main() == 1
    assert not (tmp_path / "page.md").exists()
