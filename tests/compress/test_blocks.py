"""The cut run: equal to the whole Program, in the order of the pass, with what was compressed before in sight."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from inhouse.compress.blocks import Block, BlockRunner, Tap
from inhouse.compress.calibrate import Calibration
from inhouse.compress.stats import LinearStats, collect
from inhouse.compress.work import Work
from inhouse.core.errors import UsageError
from inhouse.runtime.torch_dense import forward
from tests.compress.tiny_models import FAMILIES, make

pytestmark = [pytest.mark.torch, pytest.mark.realdata]


def _calibration(rows: int = 5, length: int = 24, vocab: int = 500, short: bool = True) -> Calibration:
    tokens = torch.randint(1, vocab, (rows, length), generator=torch.Generator().manual_seed(3))
    lengths = torch.full((rows,), length)
    if short:
        lengths[1], lengths[3] = 7, 15
    return Calibration(tokens, lengths, "hash", ())


def _inputs(work: Work, calibration: Calibration) -> dict[str, Tensor]:
    """Input rows of every plain linear, from one whole forward with the weights as they are."""
    found: dict[str, Tensor] = {}

    def observe(op, inputs, outputs) -> None:  # type: ignore[no-untyped-def]
        if op.kind == "linears":
            for name in op.weights[: len(op.weights) // 2]:
                found[name] = inputs[0]

    forward(work.program, calibration.tokens, work.weights(), observe=observe)
    valid = (torch.arange(calibration.tokens.shape[1])[None] < calibration.lengths[:, None]).flatten()
    return {name: rows[valid] for name, rows in found.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cut_run_is_the_whole_forward(family: str, stories: Path, tmp_path: Path) -> None:
    calibration = _calibration()
    with Work.open(str(make(family, stories, tmp_path / "model")), tmp_path / "run") as work:
        whole = forward(work.program, calibration.tokens, work.weights())["logits"]
        runner = BlockRunner(work, calibration, tmp_path / "run", memory=0)
        assert len(runner.chunks) == 5  # no memory to spare: one sequence at a time
        found = runner.outputs()["logits"].reshape(whole.shape)
        valid = torch.arange(24)[None] < calibration.lengths[:, None]
        scale = float(whole.abs().max())
        assert float((found - whole)[valid].abs().max()) / scale < 2e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_is_visited_once_with_its_inputs(family: str, stories: Path, tmp_path: Path) -> None:
    calibration = _calibration()
    seen: dict[str, LinearStats] = {}
    with Work.open(str(make(family, stories, tmp_path / "model")), tmp_path / "run") as work:
        wanted = _inputs(work, calibration)

        def visit(tap: Tap) -> None:
            assert not seen.keys() & tap.stats.keys()
            seen.update(tap.stats)
            if tap.op.kind == "linears":
                again = torch.cat(list(tap.inputs()))
                for name in tap.names:
                    torch.testing.assert_close(again, wanted[name], rtol=1e-4, atol=1e-4)

        BlockRunner(work, calibration, tmp_path / "run", memory=1 << 20).run(visit)
        linears = {name for name, spec in work.programs.weights.items() if spec.kind == "linear"}
        assert linears - seen.keys() == set()
        for name, rows in wanted.items():
            theirs = collect([rows], rows.shape[1])
            assert seen[name].count == int(calibration.lengths.sum())
            torch.testing.assert_close(seen[name].gram, theirs.gram, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(seen[name].max_abs, theirs.max_abs, rtol=1e-4, atol=1e-4)
        assert not (tmp_path / "run" / "spill").exists()


def test_experts_are_counted_apart_and_padding_not_at_all(stories: Path, tmp_path: Path) -> None:
    calibration = _calibration()
    counts: dict[str, int] = {}
    with Work.open(str(make("Mixtral", stories, tmp_path / "model")), tmp_path / "run") as work:
        BlockRunner(work, calibration, tmp_path / "run").run(
            lambda tap: counts.update({name: stats.count for name, stats in tap.stats.items()})
        )
    tokens = int(calibration.lengths.sum())
    for layer in range(3):
        gates = [counts[f"layers.{layer}.moe.experts.{e}.gate.weight"] for e in range(4)]
        assert sum(gates) == 2 * tokens
        assert gates == [counts[f"layers.{layer}.moe.experts.{e}.down.weight"] for e in range(4)]


def test_later_inputs_see_what_was_compressed_before(stories: Path, tmp_path: Path) -> None:
    """True-sequential: after every visit, inputs are those of a whole forward with all changes made so far."""
    calibration = _calibration(rows=2, short=False)
    checked = 0
    with Work.open(str(make("Llama", stories, tmp_path / "model")), tmp_path / "run") as work:

        def visit(tap: Tap) -> None:
            nonlocal checked
            now = _inputs(work, calibration)
            for name in tap.names:
                torch.testing.assert_close(torch.cat(list(tap.inputs())), now[name], rtol=1e-4, atol=1e-4)
                checked += 1
            for name in tap.names:
                work.put(name, (work.value(name) * 8).round() / 8)
            work.save(tap.names[0])

        BlockRunner(work, calibration, tmp_path / "run").run(visit)
    assert checked == 3 * 7 + 1


def test_blocks_have_both_paths_and_gradients(stories: Path, tmp_path: Path) -> None:
    calibration = _calibration()
    layers = []
    with Work.open(str(make("Llama", stories, tmp_path / "model")), tmp_path / "run") as work:
        work.begin("quantize")

        def visit(block: Block) -> None:
            layers.append(block.layer)
            weights = work.weights(block.layer, before=True)
            made = block.forward(block.original(0), weights, 0)
            for value, target in block.target(0).items():
                torch.testing.assert_close(made[value], target, rtol=1e-5, atol=1e-5)
            drift = max(float((block.given(0)[v] - block.original(0)[v]).abs().max()) for v in block.given(0))
            assert (drift > 1e-3) == (block.layer > 0)
            name = f"layers.{block.layer}.mlp.down.weight"
            weights[name].requires_grad_()
            block.forward(block.given(0), weights, 0)[block.outputs[0]].square().sum().backward()  # type: ignore[no-untyped-call]
            assert weights[name].grad is not None
            work.put(name, work.value(name) * 0.9)

        BlockRunner(work, calibration, tmp_path / "run").run_blocks(visit)
    assert layers == [0, 1, 2]


def test_activations_kept_in_two_bytes_are_close(stories: Path, tmp_path: Path) -> None:
    calibration = _calibration(short=False)
    with Work.open(str(make("Llama", stories, tmp_path / "model")), tmp_path / "run") as work:
        wanted = _inputs(work, calibration)
        last: dict[str, Tensor] = {}
        runner = BlockRunner(work, calibration, tmp_path / "run", dtype="bf16")
        runner.run(lambda tap: last.update({tap.names[0]: torch.cat(list(tap.inputs()))}))
        error = (last["head.weight"] - wanted["head.weight"]).norm() / wanted["head.weight"].norm()
        assert 0 < error < 0.05
        with pytest.raises(UsageError, match="cannot be kept"):
            BlockRunner(work, calibration, tmp_path / "run", dtype="int8").run(lambda tap: None)
