"""Every scheme, read and packed: the values that the file means, bit for bit, at about the file's own bits."""

from pathlib import Path

import numpy as np
import pytest

from inhouse.load.bind import bind, plan_binding
from inhouse.load.describe import describe
from inhouse.model.build import build
from inhouse.runtime.packed import Packed
from tests.quantized.folders import write_folder
from tests.quantized.schemes import CASES

pytestmark = [pytest.mark.torch, pytest.mark.realdata]


@pytest.mark.parametrize("name", CASES)
def test_values_are_kept(stories: Path, tmp_path: Path, name: str) -> None:
    case = CASES[name]()
    meant = write_folder(stories, tmp_path / "model", case.config, case.writer, skip=case.skip)
    described = describe(tmp_path / "model")
    try:
        plan = plan_binding(described.source, described.spec, described.family, build(described.spec))
        seen = 0
        for part, weight in bind(described.source, plan, threads=1):
            if not isinstance(weight, Packed):
                continue
            found = weight.dequantize()
            order = plan.columns.get(part.spec.name)
            expected = meant[part.info.name] if order is None else meant[part.info.name][:, order]
            assert np.array_equal(found, expected), (part.spec.name, part.format)
            seen += 1
        assert seen == len([array for array in meant.values() if array.ndim == 2])
        assert bool(plan.columns) == ("act" in name)
    finally:
        described.source.close()
