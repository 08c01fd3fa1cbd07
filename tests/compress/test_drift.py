"""Rounding towards the first path, layer by layer, and the whole model under a budget of bytes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from inhouse.compress.auto import AutoOptions, auto
from inhouse.compress.blocks import BlockRunner
from inhouse.compress.calibrate import Calibration
from inhouse.compress.drift import DriftOptions
from inhouse.compress.feedback import GptqOptions
from inhouse.compress.graph import fusion_groups
from inhouse.compress.grids import Grid
from inhouse.compress.methods.gptaq import gptaq
from inhouse.compress.work import Work
from inhouse.core.errors import UsageError
from inhouse.core.progress import silent
from inhouse.runtime.torch_dense import forward
from tests.compress.tiny_models import make

pytestmark = [pytest.mark.torch, pytest.mark.realdata]


@pytest.fixture
def model(stories: Path, tmp_path: Path) -> str:
    return str(make("Llama", stories, tmp_path / "model", tie_word_embeddings=True))


def calibration(seed: int = 0, rows: int = 24) -> Calibration:
    tokens = torch.randint(3, 512, (rows, 48), generator=torch.Generator().manual_seed(seed))
    return Calibration(tokens, torch.full((rows,), 48), "", ())


def divergence(work: Work, tokens: torch.Tensor) -> float:
    """Mean KL(first model || now)."""
    with torch.no_grad():
        first, now = (
            torch.log_softmax(forward(work.program, tokens, w)["logits"], -1)
            for w in (work.weights(before=True), work.weights())
        )
    return float((first.exp() * (first - now)).sum(-1).mean())


def rounded(model: str, folder: Path, options: DriftOptions, fmt: str = "u3_g32") -> float:
    with Work.open(model, folder) as work:
        work.begin("1.quantize")

        def visit(block: Any) -> None:
            block.formats = {name: fmt for name in block.names if name in work.matrices()}
            record = gptaq(work, block.layer, block, options, fmt)
            assert all(0 <= error < 0.5 for error in record["errors"].values())

        BlockRunner(work, calibration(), folder).run_blocks(visit)
        assert all(work.form(n) is not None for n in work.matrices() if n != "embed.weight")
        return divergence(work, calibration(1).tokens)


def test_each_step_helps(model: str, tmp_path: Path) -> None:
    """On text that was not calibrated on: plain rounding > feedback > feedback towards the first path."""
    with Work.open(model, tmp_path / "plain") as work:
        work.begin("1.quantize")
        for name in work.matrices():
            if name != "embed.weight":
                grid = Grid("u3_g32", work.shape(name)[1])
                weight = work.value(name)
                work.put(name, grid.nearest(weight, grid.fit(weight), grid.index()))
        plain = divergence(work, calibration(1).tokens)
    gptq = GptqOptions(refine=2)
    undirected = rounded(model, tmp_path / "a", DriftOptions(gptq, ridge=1e4, residual=False, norms=False))
    whole = rounded(model, tmp_path / "b", DriftOptions(gptq))
    assert undirected < plain
    assert whole < undirected


def test_a_budget_is_met_and_used(model: str, tmp_path: Path) -> None:
    found = {}
    for bits in (4.2, 6.0):
        with Work.open(model, tmp_path / str(bits)) as work:
            work.begin("1.quantize")
            report: dict[str, Any] = {}
            options = AutoOptions(bits=bits, rows=4, trials=8, formats=("u2_g32", "u3_g32", "i4_g32", "q8_0"))
            auto(work, calibration(), options, report, silent)
            count = sum(work.value(name).numel() for name in work.names())
            forms = {name: work.form(name) for name in work.matrices()}
            stored = sum(form.nbytes for form in forms.values() if form is not None)
            vectors = sum(4 * work.value(name).numel() for name in work.names() if name not in forms)
            assert None not in forms.values()
            assert stored <= report["bytes"] <= report["budget"]
            assert (stored + vectors) * 8 / count <= bits
            for group in fusion_groups(work.program, work.matrices()):
                assert len({report["formats"][name] for name in group}) == 1
            assert report["searched"] <= report["knapsack"]
            found[bits] = divergence(work, calibration(1).tokens)
    assert found[6.0] < 0.5 * found[4.2]


def test_impossible_budgets_are_refused(model: str, tmp_path: Path) -> None:
    with Work.open(model, tmp_path / "run") as work:
        work.begin("1.quantize")
        with pytest.raises(UsageError, match="needs a budget"):
            auto(work, calibration(), AutoOptions(), {}, silent)
        with pytest.raises(UsageError, match="smallest"):
            auto(work, calibration(rows=2), AutoOptions(bits=1.5, rows=1, formats=("u3_g32",)), {}, silent)
