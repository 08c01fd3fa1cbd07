"""The table of formats in Python and the one in C++ are the same table."""

import re
from pathlib import Path

import numpy as np
import pytest

from inhouse.core.errors import UnsupportedError
from inhouse.runtime.packed_layout import BLOCK, FORMATS, MAX_GROUPS, SUPER, TABLES, layout

pytestmark = pytest.mark.null

HEADER = Path(__file__).resolve().parents[2] / "native" / "src" / "formats.h"
ROW = re.compile(
    r'\{"(\w+)", (\d), (\d), (\d+), (\d+), k(\w+), (true|false), (true|false)(?:, k(\w+))?(?:, (true|false))?'
    r"(?:, false, k(\w+), (\d+), (\d+))?\}"
)


def spelled_out(text: str) -> str:
    """The rows of the table with the two macros replaced by what they stand for."""

    def scales(name: str, low: str, high: str, zero: str, group: int, zeros: str) -> str:
        ends = {"": "kF16", "_bf16": "kBF16", "_f32": "kF32"}
        return "".join(
            f'{{"{name}{end}", {low}, {high}, {zero}, {group}, {scale}, false, false, kPlain, {zeros}}}'
            for end, scale in ends.items()
        )

    def family(match: re.Match[str]) -> str:
        name, low, high, zero, zeros = match.groups()
        groups = {"g32": 32, "g64": 64, "g128": 128, "row": 0}
        return "".join(scales(f"{name}_{at}", low, high, zero, group, zeros) for at, group in groups.items())

    def coded(match: re.Match[str]) -> str:
        name, low, zero, coding, base, books = match.groups()
        groups = {"g32": (32, 0), "g64": (64, 3), "g128": (128, 6), "row": (0, 9)}
        return "".join(
            f'{{"{name}_{at}", {low}, 0, {zero}, {group}, kF16, false, false, kPlain, false, false, {coding}, '
            f"{int(base) + offset}, {books}}}"
            for at, (group, offset) in groups.items()
        )

    text = text.split("constexpr Format kFormats[]")[1].split("};")[0]
    text = re.sub(r'IH_CODED\("(\w+)", (\d), (\d+), (\w+), (\d+), (\d)\)', coded, text)
    text = re.sub(r'IH_SCALES\("(\w+)", (\d), (\d), (\d+), (\d+), (\w+)\)', lambda m: scales(*m.groups()), text)  # type: ignore[arg-type]
    return re.sub(r'IH_FAMILY\("(\w+)", (\d), (\d), (\d+), (\w+)\)', family, text)


def test_the_header_has_the_same_rows() -> None:
    found = ROW.findall(spelled_out(HEADER.read_text()))
    rows = [
        (name, *map(int, (low, high, zero, group)), scale.lower(), minimum == "true", two_level == "true",
         "" if t == "Plain" else t.lower(), zeros == "true", coding.lower(), int(base or 0), int(books or 0))
        for name, low, high, zero, group, scale, minimum, two_level, t, zeros, coding, base, books in found
    ]  # fmt: skip
    assert rows == [
        (f.name, f.low, f.high, f.zero, f.group, f.scale, f.minimum, f.two_level, f.table, f.zeros,
         f.coding, FORMATS[f.base].id if f.base else 0, f.books)
        for f in FORMATS.values()
    ]  # fmt: skip


def test_the_header_has_the_same_tables() -> None:
    text = re.sub(r"//.*", "", HEADER.read_text()).split("kCodeTables[3][16] = {")[1]
    numbers = [
        float(number)
        for number in re.findall(r"-?\d+(?:\.\d+)?(?=f?[,}])", text.split("constexpr Format")[0].split("#define")[0])
    ]
    iq4, e2m1, log4, nf4, fp4 = np.reshape(numbers, (5, 16)).astype(np.float32)
    for name, zero, values in (
        ("iq4", 128, iq4),
        ("e2m1", 12, e2m1),
        ("log4", 128, log4),
        ("nf4", 0, nf4),
        ("fp4", 0, fp4),
    ):
        assert np.array_equal(values - np.float32(zero), np.array(TABLES[name], np.float32)), name


def test_the_header_has_the_same_constants() -> None:
    text = HEADER.read_text()
    constants = {name: int(value) for name, value in re.findall(r"constexpr \w+ (k\w+) = (\d+);", text)}
    assert (constants["kBlock"], constants["kSuper"], constants["kMaxGroups"]) == (BLOCK, SUPER, MAX_GROUPS)


def test_inputs_beyond_what_a_kernel_prepares_are_refused() -> None:
    assert layout(FORMATS["q4_0"], 32 * MAX_GROUPS).groups == MAX_GROUPS
    with pytest.raises(UnsupportedError, match="at most 4096 groups"):
        layout(FORMATS["q6_k"], 16 * MAX_GROUPS + 256)
