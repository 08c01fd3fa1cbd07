"""A tuned model back to base and adapter: exact where the change has that rank, and told where it has not."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from inhouse.compress.lora_extraction import extract_adapter
from inhouse.compress.lora_merge import compare
from inhouse.core.errors import ConflictError, UsageError
from inhouse.store.store import Store
from tests.load.checkpoints import Arrays, change, copy_hf

pytestmark = pytest.mark.realdata


@pytest.fixture
def store() -> Iterator[Store]:
    with Store() as opened:
        yield opened


def tuned(stories: Path, folder: Path, norms: bool = False) -> Path:
    """stories260K with a change of rank 3 in every linear of the layers."""
    random = np.random.default_rng(0)

    def edit(arrays: Arrays) -> None:
        for name, value in arrays.items():
            if name.endswith("_proj.weight"):
                out, width = value.shape
                left, right = random.standard_normal((out, 3)), random.standard_normal((3, width))
                arrays[name] = value + (0.02 * left @ right).astype(np.float32)
        if norms:
            arrays["model.norm.weight"] = arrays["model.norm.weight"] * np.float32(1.5)

    return change(copy_hf(stories, folder), edit)


def test_a_change_of_that_rank_comes_back_whole(stories: Path, tmp_path: Path, store: Store) -> None:
    new = tuned(stories, tmp_path / "new")
    made = extract_adapter(str(stories / "hf"), str(new), tmp_path / "adapter", 3, store=store)
    assert made.matrices == 35
    assert made.worst < 1e-4
    assert made.left_out == ()
    kld, top1 = compare(str(stories / "hf"), tmp_path / "adapter", new)
    assert kld < 1e-6
    assert top1 > 0.995


def test_what_the_rank_or_an_adapter_cannot_hold_is_told(stories: Path, tmp_path: Path, store: Store) -> None:
    new = tuned(stories, tmp_path / "new", norms=True)
    made = extract_adapter(str(stories / "hf"), str(new), tmp_path / "adapter", 1, store=store)
    assert 0.3 < made.worst < 1
    assert made.left_out == ("model.norm.weight",)
    with pytest.raises(ConflictError):
        extract_adapter(str(stories / "hf"), str(new), tmp_path / "adapter", 1, store=store)
    with pytest.raises(UsageError, match="do not differ"):
        extract_adapter(str(new), str(new), tmp_path / "none", 1, store=store)
    assert not (tmp_path / "none").exists()
