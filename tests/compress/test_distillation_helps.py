"""The short form of bench/compress/distillation.py: with stories260K as teacher a small student ends with a lower loss
on held-out stories than with cross-entropy alone, on every seed, from the same start with the same tokens."""

import gzip
from pathlib import Path

import pytest

from inhouse.compress.evaluate import SEPARATOR
from inhouse.compress.fit import FitConfig, fit
from inhouse.compress.heal import open_teacher
from inhouse.compress.objective import CrossEntropy, FeatureMatch, Mix, Objective, Response, layer_map
from inhouse.model.build import build
from inhouse.model.spec import ModelSpec, RopeSpec
from inhouse.train.data import Dataset, make_dataset
from inhouse.train.loop import initial_weights

pytestmark = [pytest.mark.torch, pytest.mark.realdata]

STUDENT = ModelSpec(
    family="llama", hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=64, vocab_size=512, context_length=128,
    rope=RopeSpec(dim=8), norm_eps=1e-5, tied=True,
)  # fmt: skip
STEPS, LENGTH = 40, 48


@pytest.fixture(scope="module")
def setting(stories: Path, realdata: Path) -> tuple[Dataset, Dataset, Response, FeatureMatch]:
    model = open_teacher(str(stories / "hf"))
    text = gzip.decompress((realdata / "text" / "tinystories_sample_2MiB.txt.gz").read_bytes()).decode()
    parts = [part.strip() for part in text.split(SEPARATOR)[100:200] if part.strip()]  # 0-99 are for scoring alone
    rows = [model.tokenizer.encode(part)[:LENGTH] for part in parts]
    data, held = (
        make_dataset((ids, [False] + [True] * (len(ids) - 1)) for ids in some) for some in (rows[20:], rows[:20])
    )
    features = FeatureMatch(model.live(features=True), layer_map(2, 5), (32, 64))
    return data, held, Response(model.live()), features


def held_out(objective: Objective, data: Dataset, held: Dataset, seed: int, rate: float) -> float:
    programs = build(STUDENT)
    start = initial_weights(programs, seed=seed, layers=2, std=0.05)
    config = FitConfig(steps=STEPS, batch_tokens=512, learning_rate=rate, warmup=8, seed=seed, validate_every=STEPS)
    result = fit(programs, start, data, config, objective=objective, validation=held, judge=CrossEntropy())
    assert result.validation[-1][0] == STEPS
    return result.validation[-1][1]


def test_the_taught_student_wins_on_every_seed(setting: tuple[Dataset, Dataset, Response, FeatureMatch]) -> None:
    data, held, response, features = setting
    table: dict[int, tuple[float, float]] = {}
    for seed in range(3):
        control = min(held_out(CrossEntropy(), data, held, seed, rate) for rate in (1e-2, 2e-2))
        taught = held_out(Mix((0.9, response), (0.1, CrossEntropy())), data, held, seed, 1.5e-2)
        table[seed] = (round(control, 4), round(taught, 4))
        assert taught < control, table
    matched = held_out(Mix((1.0, CrossEntropy()), (1.0, features)), data, held, 0, 1.5e-2)
    assert matched < table[0][0], (matched, table)
