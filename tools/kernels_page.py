"""Writes docs/kernels.md from bench/kernels.jsonl, the figures of `python tools/kernel_speed.py`.

Usage: python tools/kernels_page.py [FILE] [PAGE]
A table a model and level, rows by formats; a cell has tokens/s of all linears, the unit that is nearer to its peak
(GB/s of weights, or GOP/s) and the share of that peak as the same process probed it. The peak of int8 formats is that
of int8 dot products, of bf16 twice that of f32 (what bf16 dot products reach).
"""

import sys
from pathlib import Path

from kernel_speed import FILE, MODELS, ROOT, Key, Line, read

HEAD = """# Linear kernels

Written by `python tools/kernels_page.py` from `bench/kernels.jsonl`; do not edit.

All linears of a model, one after the other, weights read from memory and not from a cache; the head for one row from
64 rows on. A cell: tokens/s that these linears alone would allow; the unit nearer to its peak, GB/s of weights or
GOP/s (a multiply and an add are two); the share of that peak, which the same process probed just before (above 100 %:
something disturbed the probe). bf16 counts against twice the f32 peak, at every level. The last line names the matrix
and number of rows that is furthest from its peak. A guard by instruction count stands beside this table:
`tools/count_instructions.py`.""".splitlines()
PAGE = ROOT / "docs" / "kernels.md"
PROMPT_ROWS = 64  # from here on the head is needed for one row
HALVES = ("bf16",)  # formats whose peak is twice that of f32


def share(form: str, of_compute: float, of_read: float) -> tuple[float, bool]:
    """(share of the nearer peak, whether that is arithmetic)."""
    compute = of_compute / 2 if form in HALVES else of_compute
    return max(compute, of_read), compute > of_read


def cell(line: Line) -> str:
    """`86.7 tok/s, 38.1 GB/s, 84 %`."""
    found, computes = share(line["format"], line["of_compute"], line["of_read"])
    unit = f"{line['GOPs']:,.0f} GOP/s" if computes else f"{line['GBs']:.1f} GB/s"
    tokens = line["tokens_s"]
    return f"{tokens:,.0f} tok/s, {unit}, {found:.0%}" if tokens >= 100 else f"{tokens:.1f} tok/s, {unit}, {found:.0%}"


def weakest(lines: list[Line]) -> str:
    """The matrix of a column that is furthest from its peak: `o at 64 rows, 45 %`."""
    found = [
        (share(line["format"], compute, reading)[0], name, line["rows"])
        for line in lines
        for name, (_, compute, reading) in line["matrices"].items()
    ]
    least, name, rows = min(found)
    rows = 1 if name == "head" and rows >= PROMPT_ROWS else rows
    return f"{name} at {rows} row{'s' if rows > 1 else ''}, {least:.0%}"


def table(lines: list[Line]) -> list[str]:
    """Markdown of one model and level."""
    by = {(line["format"], line["rows"]): line for line in lines}
    forms, rows = list(dict.fromkeys(form for form, _ in by)), sorted({number for _, number in by})
    out = ["| rows | " + " | ".join(forms) + " |", "|---" * (len(forms) + 1) + "|"]
    for number in rows:
        cells = [cell(by[form, number]) if (form, number) in by else "not measured" for form in forms]
        out.append(f"| {number} | " + " | ".join(cells) + " |")
    columns = [[line for line in lines if line["format"] == form] for form in forms]
    out.append("| weakest | " + " | ".join(weakest(column) for column in columns) + " |")
    return [*out, "", peaks(lines)]


def peaks(lines: list[Line]) -> str:
    """The range of each peak over the runs of a table: a virtual machine's bandwidth moves."""
    names = {"read_GBs": "GB/s read", "dot_GOPs": "GOP/s of int8 dot products", "fma_GOPs": "GOP/s of f32"}
    parts = []
    for name, what in names.items():
        found = [line["peaks"][name] for line in lines]
        low, high = f"{min(found):,.0f}", f"{max(found):,.0f}"
        parts.append(f"{low if low == high else f'{low}-{high}'} {what}")
    return "Peaks: " + ", ".join(parts) + "."


def page(figures: dict[Key, Line]) -> str:
    """The whole page. Raises ValueError where there are no figures."""
    if not figures:
        raise ValueError("no figures; measure them by `python tools/kernel_speed.py`")
    runs = list(figures.values())
    machines = dict.fromkeys(f"{line['run']['machine']}, {line['run']['threads']} threads" for line in runs)
    dates = sorted({line["run"]["date"] for line in runs})
    commands = dict.fromkeys(line["run"]["command"] for line in runs)
    out = [
        *HEAD,
        "",
        f"Machine: {'; '.join(machines)}. Measured {' to '.join(dict.fromkeys((dates[0], dates[-1])))} by",
        ", ".join(f"`{command}`" for command in commands) + ".",
    ]
    order = {name: i for i, name in enumerate(MODELS)}
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in sorted(runs, key=lambda line: (order.get(line["model"], len(order)), line["isa"] != "avx512")):
        groups.setdefault((line["model"], line["isa"]), []).append(line)
    for (model, level), lines in groups.items():
        out += ["", f"## {model}, {level}", "", *table(lines)]
    return "\n".join(out) + "\n"


def main() -> int:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else PAGE
    try:
        target.write_text(page(read(source)))
    except ValueError as error:
        print(f"{source}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
