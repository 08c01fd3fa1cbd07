"""Writes docs/models.md: every family of the table, what was tried of it, and how far it is from its original.

Usage: python tools/models_table.py [--results FILE]
Without --results it runs tests/families first. With it (a file that tests wrote, INHOUSE_PARITY_RESULTS=FILE), families
that the file does not name keep the cells that the page has. A cell that no test filled says untested.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from inhouse.model.families.table import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "models.md"
HEAD = """# Models

Which model families run, made by `tools/models_table.py` from the tests in `tests/families` that ran. Each test
builds a tiny random model, runs it as its original does (Hugging Face transformers; where that has no such model, a
slow reference written from the published description), and compares: the error is max|ours - original| / max|original|
over all logits in float32, the largest over the family's cases; greedy ids must be equal, and a prompt among others
must give the bits that it gives alone. For quantised formats the original runs on the numbers that the file holds.

| family | architectures | GGUF | formats tried | native | torch |
|---|---|---|---|---|---|
"""
FOOT = """

## Left out, and why

Layers that carry a state from token to token instead of a cache of positions are not run: Mamba and Mamba-2 (and the
hybrids around them: Jamba, Bamba, Zamba, Falcon-H1, Granite 4 H, Nemotron-H), RWKV, and linear attention with a decay
or a delta rule (Qwen3-Next, Qwen3.5, Kimi Linear, MiniMax-Text-01, LFM2's convolutions). Two promises stand against
them today. A token's bits must not depend on how its prompt was cut into chunks; the forms that make their prompts
fast sum within chunks, in another order than decoding does, so they need kernels whose chunks begin at absolute
positions. And prefixes are shared and rolled back by blocks of positions; such a state is one for the whole past, and
would have to be kept at every block's end. The state kind `recurrent` is in the contract of Programs for that day; no
op writes it.

Also not run: attention that chooses its keys by an index of its own (DeepSeek-V3.2 and later, GLM-5), attention in
chunks and experts weighted at their input (Llama 4), and layers that predict further tokens (the last one of
DeepSeek-V3 and of GLM-4.5; they are left unread, and the model answers as without them).
"""
Results = Mapping[str, Mapping[str, Mapping[str, float]]]  # family -> format -> executor -> largest error


def read(lines: Iterable[str]) -> Results:
    """The largest error of each family, format and executor."""
    found: defaultdict[str, defaultdict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        entry = json.loads(line)
        cell = found[entry["family"]][entry["format"]]
        cell[entry["executor"]] = max(entry["error"], cell.get(entry["executor"], 0.0))
    return found


def measured(page: str) -> dict[str, list[str]]:
    """Family -> its cells of formats and errors, of a page that was written before."""
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[3:] for cells in lines}


def table(results: Results, before: str = "") -> str:
    """The page; families without results keep what the page `before` says of them."""
    rows, old = [], measured(before)
    for family in FAMILIES:
        tried = results.get(family.name, {})
        cells = [", ".join(tried) or "untested", *(_cell(tried, executor) for executor in ("native", "torch"))]
        cells = cells if tried else old.get(family.name, cells)
        names = ", ".join(f"`{name}`" for name in family.architectures)
        gguf = ", ".join(f"`{name}`" for name in family.gguf) or "-"
        rows.append(f"| {family.name} | {names} | {gguf} | {' | '.join(cells)} |")
    return HEAD + "\n".join(rows) + "\n" + FOOT


def _cell(tried: Mapping[str, Mapping[str, float]], executor: str) -> str:
    errors = [errors[executor] for errors in tried.values() if executor in errors]
    return f"{max(errors):.0e}" if errors else "untested"


def main() -> int:
    """Runs the tests where no results are given, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path)
    given = parser.parse_args().results
    if given is not None:
        before = TABLE.read_text() if TABLE.exists() else ""
        TABLE.write_text(table(read(given.read_text().splitlines()), before))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.jsonl"
        command = [sys.executable, "-m", "pytest", "-q", str(ROOT / "tests" / "families")]
        code = subprocess.run(command, env=os.environ | {"INHOUSE_PARITY_RESULTS": str(path)}, check=False).returncode
        if code == 0:
            TABLE.write_text(table(read(path.read_text().splitlines())))
    return code


if __name__ == "__main__":
    sys.exit(main())
