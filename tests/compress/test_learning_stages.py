"""Fine-tuning, distillation, QAT and learned rounding over a Work: forms, masks and side branches are trained through,
what is put is what was trained; teachers of another tokenizer are refused; iterative rounds keep the last good one."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from inhouse.compress.blocks import BlockRunner
from inhouse.compress.calibrate import Calibration
from inhouse.compress.heal import HealOptions, as_data, heal
from inhouse.compress.hooks import FormHook
from inhouse.compress.methods.distill import DistillOptions, distill
from inhouse.compress.methods.finetune import FinetuneOptions, finetune
from inhouse.compress.methods.iterate import cubic_schedule, geometric_schedule, iterate
from inhouse.compress.methods.qat import QatOptions, qat
from inhouse.compress.methods.signround import SignRoundOptions, signround_block
from inhouse.compress.recipe import parse_recipe
from inhouse.compress.stages import StageRun
from inhouse.compress.work import Work
from inhouse.core.errors import UnsupportedError, UsageError
from inhouse.runtime.form import Form
from inhouse.runtime.packed import pack_float, quantize
from inhouse.runtime.torch_dense import forward
from inhouse.train.data import Dataset
from tests.compress.tiny_models import make

pytestmark = [pytest.mark.torch, pytest.mark.realdata]

Q, UP = "layers.0.attn.q.weight", "layers.1.mlp.up.weight"
SHORT: dict[str, Any] = {"steps": 6, "batch_tokens": 96, "rate": 2e-3, "warmup": 1, "validate_every": 3}


def rows(count: int = 24, length: int = 12) -> Calibration:
    tokens = torch.randint(3, 500, (count, length), generator=torch.Generator().manual_seed(3))
    return Calibration(tokens, torch.full((count,), length), "hash", ())


@pytest.fixture(scope="module")
def tiny(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    return make("Llama", stories, folder, num_hidden_layers=2)


@pytest.fixture
def work(tiny: Path, tmp_path: Path) -> Iterator[Work]:
    with Work.open(str(tiny), tmp_path / "run") as opened:
        yield opened


def put_svd(work: Work, name: str, rank: int) -> None:
    value = work.value(name)
    u, s, v = torch.linalg.svd(value, full_matrices=False)
    a, b = (v[:rank]).numpy(), (u[:, :rank] * s[:rank]).numpy()
    main = quantize([value.numpy()], "q4", shape=(value.shape[0], value.shape[1]))
    low = (pack_float(np.ascontiguousarray(0.1 * a), "f32"), pack_float(np.ascontiguousarray(b), "f16"))
    order = np.arange(value.shape[1], dtype=np.int64)[::-1].copy()
    turned = quantize([np.ascontiguousarray(value.numpy()[:, order])], "q4", shape=main.shape)
    work.put_form(name, Form(turned, low, order))


def test_a_form_hook_gives_what_its_form_decodes_to(work: Work) -> None:
    put_svd(work, Q, 3)
    form = work.form(Q)
    assert form is not None
    weight = work.float_value(Q)
    hook = FormHook(form, weight)
    assert np.array_equal(hook.form(weight).value(), FormHook(hook.form(weight), weight).form(weight).value())
    moved = weight + 0.01
    with torch.no_grad():
        for value in hook.parameters().values():
            value += 0.01
    assert np.allclose(hook.form(moved).value(), hook(moved).detach().numpy(), atol=1e-6)
    assert np.array_equal(hook.form(moved).main.dequantize(), hook._main(moved.flip(1)).detach().numpy())  # type: ignore[union-attr,misc]
    held = FormHook(form, weight, learn_main=False)
    assert not held.main_learns
    assert np.allclose(held(weight).detach().numpy(), form.value(), atol=1e-6)
    assert set(held.parameters()) == {"a", "b"}


def test_finetuning_holds_masks_and_trains_through_forms(work: Work) -> None:
    mask = torch.rand(work.shape(UP), generator=torch.Generator().manual_seed(1)) < 0.5
    work.put(UP, work.value(UP) * mask)
    work.put_mask(UP, mask)
    put_svd(work, Q, 3)
    before = {name: work.value(name) for name in work.names()}
    report: dict[str, Any] = {}
    finetune(work, rows(), FinetuneOptions(**SHORT), report)
    assert report["finished"]
    assert report["loss"][-1] < report["loss"][0]
    assert not torch.any(work.value(UP)[~mask])
    found = work.mask(UP)
    assert found is not None
    assert torch.equal(found, mask)
    form = work.form(Q)
    assert form is not None
    assert form.main is not None
    assert form.main.format == "q4_0"
    assert form.low_rank is not None
    assert all(not torch.equal(before[name], work.value(name)) for name in before)
    work.save("finetune/0")


def test_only_low_rank_learns_the_factors_alone(work: Work) -> None:
    put_svd(work, Q, 3)
    first = work.form(Q)
    before = {name: work.value(name) for name in work.names()}
    heal(work, *_data(), HealOptions(**SHORT, only="low_rank"))
    after = work.form(Q)
    assert first is not None
    assert after is not None
    assert np.array_equal(first.main.data, after.main.data)  # type: ignore[union-attr]
    assert not np.array_equal(first.low_rank[0].data, after.low_rank[0].data)  # type: ignore[index]
    assert all(torch.equal(before[name], work.value(name)) for name in before if name != Q)
    with pytest.raises(UsageError, match="unknown part"):
        heal(work, *_data(), HealOptions(**SHORT, only="biases"))  # type: ignore[arg-type]


def _data() -> tuple[Dataset]:
    return (as_data(rows())[0],)


def test_qat_stores_what_it_trained(work: Work) -> None:
    report: dict[str, Any] = {}
    options = QatOptions(**SHORT | {"steps": 20, "rate": 5e-4}, activations=True)
    formats = {"embed.weight": "q8_0", "head.weight": ""}
    qat(work, rows(), options, report, formats=lambda name: formats.get(name, "u2_g32"))
    assert report["validation"][-1][1] < report["validation"][0][1]
    names = {name: form.main.format for name in work.matrices() if (form := work.form(name)) and form.main}
    assert names.pop("embed.weight") == "q8_0"
    assert "head.weight" not in names
    assert set(names.values()) == {"u2_g32"}
    logits = forward(work.program, rows().tokens, work.weights())["logits"]
    assert bool(torch.isfinite(logits).all())


def test_recipes_reach_the_stages(work: Work) -> None:
    """Prune, heal, train in the stored form, heal again: the order is allowed, formats and overrides arrive."""
    recipe = parse_recipe({"stages": [
        {"prune": {"method": "magnitude", "exclude": ["embed.weight", "head.weight"]}},
        {"distill": {**SHORT, "teacher": "base"}},
        {"qat": {**SHORT, "format": "u3_g32", "exclude": ["head.weight"],
                 "overrides": {"embed.weight": {"format": "q8_0"}}}},
        {"finetune": {**SHORT, "steps": 3}},
    ]})  # fmt: skip
    for i, stage in enumerate(recipe.stages):
        StageRun(work, stage, f"{i}.{stage.kind}", rows(), 1 << 28).run()
    formats = {name: form.main.format for name in work.matrices() if (form := work.form(name)) and form.main}
    assert formats["embed.weight"] == "q8_0"
    assert formats[UP] == "u3_g32"
    assert "head.weight" not in formats
    mask = work.mask(UP)
    assert mask is not None
    assert not torch.any(work.value(UP)[~mask])
    assert float((work.value(UP) == 0).float().mean()) >= 0.5
    with pytest.raises(UsageError, match="rate"):
        parse_recipe({"stages": [{"distill": {"ratr": 1e-3}}]})


def test_distillation_towards_the_base_comes_closer_to_it(work: Work) -> None:
    data = rows(60)
    original = work.weights()
    for name in work.matrices():
        work.put(
            name, work.value(name) + 0.05 * torch.randn(work.shape(name), generator=torch.Generator().manual_seed(7))
        )
    options = DistillOptions(**SHORT | {"steps": 30}, top_k=64)
    damaged = work.weights()
    report: dict[str, Any] = {}
    distill(work, data, options, report)

    def gap(weights: dict[str, Tensor]) -> float:
        a, b = (forward(work.program, rows(4).tokens, w)["logits"].log_softmax(-1) for w in (original, weights))
        return float((a.exp() * (a - b)).sum(-1).mean())

    assert gap(work.weights()) < 0.7 * gap(damaged)
    assert report["teacher"] == "base"
    assert report["shared_ids"] == 512


def test_every_kind_of_signal_runs_and_a_teacher_may_be_larger(work: Work, stories: Path, tmp_path: Path) -> None:
    larger = make("Llama", stories, tmp_path / "larger", num_hidden_layers=3, hidden_size=64, num_attention_heads=8,
                  num_key_value_heads=4)  # fmt: skip
    signals: dict[str, Any] = {
        "hidden": 1.0,
        "attention": 1.0,
        "distance": 1.0,
        "angle": 1.0,
        "minilm": 1.0,
        "between": 1.0,
    }
    options = DistillOptions(**SHORT, teacher=str(larger), direction="js", temperature=2.0, ce=0.2, **signals)
    report: dict[str, Any] = {}
    distill(work, rows(), options, report)
    assert report["loss"][-1] < report["loss"][0]
    with pytest.raises(UnsupportedError, match="top_k"):
        distill(work, rows(), replace(options, top_k=8), {})
    with pytest.raises(UsageError, match="nothing is to be learned"):
        distill(work, rows(), DistillOptions(response=0.0), {})
    with pytest.raises(UsageError, match="needs texts"):
        distill(work, None, options, {})


def test_another_tokenizer_is_refused_before_anything_runs(work: Work, stories: Path, tmp_path: Path) -> None:
    other = make("Llama", stories, tmp_path / "other", num_hidden_layers=1)
    (other / "tokenizer.model").unlink()
    path = other / "tokenizer.json"
    words = json.loads(path.read_text())
    vocab = words["model"]["vocab"]
    first, second = (token for token, number in vocab.items() if number in (300, 301))
    vocab[first], vocab[second] = vocab[second], vocab[first]
    path.write_text(json.dumps(words))
    with pytest.raises(UnsupportedError, match="different tokenizers"):
        distill(work, rows(), DistillOptions(**SHORT, teacher=str(other)), {})
    shutil.rmtree(other)


def test_a_killed_stage_goes_on_to_the_same_bits(tiny: Path, tmp_path: Path) -> None:
    ends = []
    for folder, kill in (("whole", False), ("parts", True)):
        with Work.open(str(tiny), tmp_path / folder) as work:
            if kill:
                stop = RuntimeError("killed")

                def progress(label: str, done: int, total: int, stop: RuntimeError = stop) -> None:
                    if done == 4:
                        raise stop

                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr("inhouse.compress.fit.SAVE_EVERY", 2)
                    with pytest.raises(RuntimeError):
                        finetune(work, rows(), FinetuneOptions(**SHORT), {}, progress)
        with Work.open(str(tiny), tmp_path / folder) as work:
            finetune(work, rows(), FinetuneOptions(**SHORT), {})
            ends.append({name: work.value(name) for name in work.names()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_learned_rounding_of_a_layer_beats_rounding(work: Work, tmp_path: Path) -> None:
    runner = BlockRunner(work, rows(), tmp_path / "run")
    records = []

    def visit(block: Any) -> None:
        if block.layer >= 0:
            records.append(signround_block(work, block.layer, block, SignRoundOptions(iters=40), "u2_g32"))

    runner.run_blocks(visit)
    assert len(records) == 2
    for record in records:
        assert record["loss_learned"] < record["loss_rounded"]
    form = work.form(Q)
    assert form is not None
    assert form.main is not None
    assert form.main.format == "u2_g32"


# ---- iterative rounds -----------------------------------------------------------------------------------------------


def test_schedules() -> None:
    for schedule in (cubic_schedule, geometric_schedule):
        targets = schedule(0.0, 0.8, 5)
        assert targets == sorted(targets)
        assert targets[-1] == pytest.approx(0.8)
        with pytest.raises(UsageError):
            schedule(0.5, 0.5, 3)
    assert cubic_schedule(0.0, 0.8, 2)[0] == pytest.approx(0.8 - 0.8 / 8)
    kept = [1 - t for t in geometric_schedule(0.0, 0.75, 2)]
    assert kept == pytest.approx([0.5, 0.25])


def test_rounds_rescore_heal_and_keep_the_last_good_state() -> None:
    """A least-squares problem: pruning scores are those of the healed weights, the gate keeps the round before."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator, dtype=torch.float64)
    x[:, 1] = x[:, 0] + 0.01 * x[:, 1]  # a twin: once one is gone the other matters twice as much
    y = x @ torch.tensor([1.0, 1.0, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05], dtype=torch.float64)
    scored: list[Tensor] = []

    def prune(state: Tensor, target: float) -> Tensor:
        scores = (x * state).square().mean(0)
        scored.append(scores)
        gone = torch.argsort(scores)[: round(target * 8)]
        return state.index_fill(0, gone, 0.0)

    def refit(state: Tensor, number: int) -> Tensor:
        kept = torch.nonzero(state)[:, 0]
        return state.index_copy(0, kept, torch.linalg.lstsq(x[:, kept], y).solution)

    def loss(state: Tensor) -> float:
        return float((x @ state - y).square().mean())

    start = torch.linalg.lstsq(x, y).solution
    found = iterate(start, [0.25, 0.5, 0.75], prune=prune, heal=refit, measure=loss, gate=0.2)
    assert found.reached == 0.5
    assert found.state is not None
    assert int((found.state == 0).sum()) == 4
    assert loss(found.state) == found.rounds[1].value <= 0.2 < found.rounds[2].value
    assert "round 1 is kept" in found.reason
    assert not torch.equal(scored[0], scored[1])
    free = iterate(start, [0.25, 0.5, 0.75], prune=prune, heal=refit, measure=loss)
    assert free.reached == 0.75
    assert iterate(start, [0.75], prune=prune, heal=refit, measure=loss, gate=1e-9).state is None
    with pytest.raises(UsageError, match="must rise"):
        iterate(start, [0.5, 0.5], prune=prune, heal=refit, measure=loss)
