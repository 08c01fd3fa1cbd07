"""The loop learns, stops on time, resumes to the bit after a kill -9, and refuses another run's checkpoint."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from inhouse.core.errors import ConflictError, ExecutorError, FormatError
from inhouse.model.build import build
from inhouse.model.spec import ModelSpec, RopeSpec
from inhouse.train.data import Dataset, make_dataset
from inhouse.train.loop import StepReport, TrainConfig, Trainer, initial_weights, rate_at

pytestmark = pytest.mark.torch

SPEC = ModelSpec(
    family="llama", hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, ffn=48, vocab_size=64, context_length=64,
    rope=RopeSpec(dim=16), norm_eps=1e-5, tied=True,
)  # fmt: skip
CONFIG = TrainConfig(steps=24, batch_tokens=128, learning_rate=1e-2, warmup=4, noise=0.05, noise_vocab=60)


def some_data() -> Dataset:
    """Sequences that count upward from a number: easy to learn."""
    samples = []
    for start in range(40):
        ids = [(start + i) % 60 for i in range(8 + start % 5)]
        samples.append((ids, [False, False, *([True] * (len(ids) - 2))]))
    return make_dataset(samples)


def trainer(folder: Path, config: TrainConfig = CONFIG) -> Trainer:
    programs = build(SPEC)
    return Trainer(programs, initial_weights(programs, seed=5, layers=SPEC.layers), some_data(), config, folder)


def equal(a: Trainer, b: Trainer) -> bool:
    return all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights)


def test_it_learns_and_reports(tmp_path: Path) -> None:
    reports: list[StepReport] = []
    run = trainer(tmp_path, TrainConfig(steps=150, batch_tokens=256, learning_rate=1e-2, warmup=10))
    assert run.run(reports.append)
    assert reports[0].loss == pytest.approx(math.log(64), abs=0.2)  # uniform guesses at first
    assert reports[-1].loss < 0.5
    assert [r.step for r in reports] == list(range(1, 151))
    assert reports[-1].eta_s == 0.0


def test_a_resumed_run_gives_the_same_bits(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    assert whole.run()
    first = trainer(tmp_path / "parts")
    assert not first.run(minutes=0.0)  # no time: saves and stops
    second = trainer(tmp_path / "parts")
    stop = iter([*[0.0] * 10, *[1e9] * 1000])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("inhouse.train.loop.time.monotonic", lambda: next(stop))
        assert not second.run(minutes=1.0)
    assert 0 < second.progress.step < CONFIG.steps
    third = trainer(tmp_path / "parts")
    assert third.progress.step == second.progress.step
    assert third.run()
    assert equal(whole, third)
    assert whole.progress.losses == third.progress.losses


KILLED = """
import sys
from pathlib import Path
from tests.train.test_train_loop import trainer
run = trainer(Path(sys.argv[1]))
run.run(lambda r: print(r.step, flush=True), save_every=5)
"""


def test_kill_9_and_resume_gives_the_same_bits(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed")]
    path = os.pathsep.join([str(root), str(root / "src"), os.environ.get("PYTHONPATH", "")])
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, env=os.environ | threads | {"PYTHONPATH": path}
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= 8:
                process.send_signal(signal.SIGKILL)
                break
    resumed = trainer(tmp_path / "killed")
    assert resumed.progress.step >= 5
    whole = trainer(tmp_path / "whole")
    assert resumed.run()
    assert whole.run()
    assert equal(whole, resumed)


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path).run(minutes=0.0)
    with pytest.raises(ConflictError, match="config differ"):
        trainer(tmp_path, TrainConfig(steps=25, batch_tokens=128))


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.run(minutes=0.0)
    run.checkpoint.write_bytes(run.checkpoint.read_bytes()[:1000])
    with pytest.raises(FormatError, match=r"checkpoint\.pt is damaged"):
        trainer(tmp_path)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    with torch.no_grad():
        run.weights["final_norm"].fill_(math.inf)
    with pytest.raises(ExecutorError, match="step 0"):
        run.run()


def test_the_rate_warms_up_and_falls() -> None:
    config = TrainConfig(steps=100, learning_rate=1.0, warmup=10, final_rate=0.1)
    rates = [rate_at(step, config) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[55] == pytest.approx(0.55, abs=0.01)
    assert rates[99] == pytest.approx(0.1, abs=0.01)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_the_clock_bounds_a_run(tmp_path: Path) -> None:
    begun = time.monotonic()
    done = trainer(tmp_path, TrainConfig(steps=10**6, batch_tokens=128)).run(minutes=0.01)
    assert not done
    assert time.monotonic() - begun < 30
