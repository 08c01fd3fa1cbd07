"""What a model is calibrated on shows: shuffled tokens come out worse, and Chinese helps Chinese."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from inhouse.compress.calibrate import Calibration, CalibrationOptions, Text, calibrate, read_texts
from inhouse.compress.recipe import parse_recipe
from inhouse.compress.stages import StageRun
from inhouse.compress.work import Work
from inhouse.model.tokens.tokenizer import Tokenizer
from inhouse.runtime.torch_dense import forward

pytestmark = [pytest.mark.torch, pytest.mark.realdata]

RECIPE = {"stages": [{"quantize": {"method": "gptq", "format": "u2_g32", "exclude": ["embed"]}}]}


@pytest.fixture(scope="module")
def stories_text(realdata: Path) -> list[Text]:
    """Stories from number 100 on; the others are for scoring alone."""
    return read_texts([realdata / "text" / "tinystories_sample_2MiB.txt.gz"])[100:]


@pytest.fixture(scope="module")
def chinese(realdata: Path) -> list[Text]:
    poems = json.loads((realdata / "text" / "zh" / "tang300.json").read_text("utf-8"))
    return [Text("tang300", "".join(poem["paragraphs"])) for poem in poems]


def _logs(work: Work, rows: Calibration) -> Tensor:
    """Log-probabilities of the counted rows, [n, vocab]."""
    with torch.no_grad():
        logs = torch.log_softmax(forward(work.program, rows.tokens, work.weights())["logits"], -1)
    return logs[torch.arange(rows.tokens.shape[1])[None] < rows.lengths[:, None]]


def _divergence(truth: Tensor, found: Tensor) -> float:
    """Mean KL in nats a token."""
    return float((truth.exp() * (truth - found)).sum(-1).mean())


def _calibrated(model: str, folder: Path, rows: Calibration, judged: list[Calibration]) -> list[float]:
    """Divergence from the float model on each of the judged texts."""
    torch.set_num_threads(1)
    with Work.open(model, folder) as work:
        truth = [_logs(work, one) for one in judged]
        StageRun(work, parse_recipe(RECIPE).stages[0], "0.quantize", rows, 1 << 28).run()
        return [_divergence(*pair) for pair in zip(truth, (_logs(work, one) for one in judged), strict=True)]


def test_what_is_calibrated_on_shows(
    stories: Path, tmp_path: Path, stories_text: list[Text], chinese: list[Text]
) -> None:
    model = str(stories / "hf")
    with Work.open(model, tmp_path / "tokens") as work:
        tokenizer: Tokenizer = work.tokenizer
    use = CalibrationOptions(samples=48, length=128, mode="documents")
    shuffled = CalibrationOptions(samples=48, length=128, mode="documents", shuffle_tokens=True)
    rows = calibrate(stories_text[:400], tokenizer, use)
    judged = [calibrate(stories_text[400:], tokenizer, use), calibrate(chinese[160:], tokenizer, use)]
    plain = _calibrated(model, tmp_path / "plain", rows, judged)
    mixed = _calibrated(model, tmp_path / "mixed", calibrate(stories_text[:400], tokenizer, shuffled), judged)
    poems = _calibrated(model, tmp_path / "poems", calibrate(chinese[:160], tokenizer, use), judged)
    assert mixed[0] > 1.02 * plain[0], (plain, mixed)
    assert poems[1] < 0.95 * plain[1], (plain, poems)
    assert poems[0] > 1.05 * plain[0], (plain, poems)
