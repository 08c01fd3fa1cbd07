"""docs/models.md names every family, tried or untested, and what it says of the tables is true."""

import importlib
from pathlib import Path

import pytest

from inhouse.model.families.table import FAMILIES

pytestmark = pytest.mark.null
PAGE = Path(__file__).parent.parent.parent / "docs" / "models.md"


def rows() -> dict[str, list[str]]:
    """Family -> cells of its row."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    return {cells[0]: cells for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)}


def test_every_family_has_a_row_with_its_names() -> None:
    page = rows()
    assert list(page) == [family.name for family in FAMILIES], "run tools/models_table.py"
    for family in FAMILIES:
        assert page[family.name][1] == ", ".join(f"`{name}`" for name in family.architectures)


def test_a_row_is_tried_or_says_untested() -> None:
    for name, cells in rows().items():
        for cell in cells[4:]:
            assert cell == "untested" or float(cell) < 1e-3, name


def test_the_tool_reads_what_the_harness_writes() -> None:
    tool = importlib.import_module("tools.models_table")
    lines = [
        '{"family": "llama", "case": "", "format": "safetensors", "executor": "native", "error": 1e-6}',
        '{"family": "llama", "case": "3", "format": "safetensors", "executor": "native", "error": 3e-6}',
        '{"family": "llama", "case": "", "format": "gguf f32", "executor": "torch", "error": 2e-6}',
    ]
    line = next(line for line in tool.table(tool.read(lines)).splitlines() if line.startswith("| llama |"))
    assert line.endswith("| safetensors, gguf f32 | 3e-06 | 2e-06 |")
