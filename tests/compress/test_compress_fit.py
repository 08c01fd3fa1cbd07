"""fit: it learns, holds masks, freezes, runs hooks, resumes to the bit, keeps the best, refuses what does not fit."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from inhouse.compress.fit import FitConfig, FitResult, Fitter, Setup, fit
from inhouse.compress.objective import CrossEntropy, FeatureMatch, Mix, RelationMatch, Response, layer_map
from inhouse.compress.teacher import CachedTeacher, LiveTeacher, shared_ids, write_cache
from inhouse.core.errors import ConflictError, ExecutorError, FormatError, UnsupportedError, UsageError
from inhouse.model.build import build
from inhouse.model.rewrite import quantize_activations
from inhouse.model.spec import ModelSpec, RopeSpec
from inhouse.runtime.program import ProgramSet
from inhouse.runtime.torch_dense import forward
from inhouse.train.data import Dataset, make_dataset
from inhouse.train.loop import initial_weights

pytestmark = pytest.mark.torch

SPEC = ModelSpec(
    family="llama", hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=48, vocab_size=64, context_length=64,
    rope=RopeSpec(dim=8), norm_eps=1e-5, tied=True,
)  # fmt: skip
SMALL = replace(SPEC, hidden=16, layers=1, heads=2, kv_heads=1, ffn=24)
CONFIG = FitConfig(steps=12, batch_tokens=128, learning_rate=1e-2, warmup=2, validate_every=4)
Weights = dict[str, Tensor]


def some_data(first: int = 0) -> Dataset:
    samples = []
    for start in range(first, first + 24):
        ids = [(start + i) % 60 for i in range(8 + start % 5)]
        samples.append((ids, [False, *([True] * (len(ids) - 1))]))
    return make_dataset(samples)


def model(spec: ModelSpec = SPEC, seed: int = 5) -> tuple[ProgramSet, Weights]:
    programs = build(spec)
    return programs, initial_weights(programs, seed=seed, layers=spec.layers)


def same(a: FitResult, b: FitResult) -> bool:
    return all(torch.equal(a.weights[n], b.weights[n]) for n in a.weights) and a.losses == b.losses


def test_it_learns_and_keeps_the_best_on_validation() -> None:
    programs, weights = model()
    config = replace(CONFIG, steps=40, validate_every=10)
    result = fit(programs, weights, some_data(), config, validation=some_data(30))
    assert result.finished
    assert result.losses[-1] < 0.6 * result.losses[0]
    assert [step for step, _ in result.validation] == list(range(0, 41, 10))
    assert result.best == min(value for _, value in result.validation)
    assert result.step == dict((v, s) for s, v in result.validation)[result.best]
    wild = fit(programs, result.weights, some_data(), replace(config, learning_rate=0.5), validation=some_data(30))
    assert wild.step == 0  # it only got worse: the start is kept
    assert all(torch.equal(wild.weights[n], result.weights[n]) for n in weights)


def test_masked_weights_stay_zero_after_every_step() -> None:
    programs, weights = model()
    name = "layers.0.mlp.gate.weight"
    mask = torch.rand(weights[name].shape, generator=torch.Generator().manual_seed(0)) < 0.5
    start = {**weights, name: weights[name] + 1.0}  # dense at first: the mask is put on
    result = fit(programs, start, some_data(), CONFIG, setup=Setup(masks={name: mask}))
    assert torch.count_nonzero(result.weights[name][~mask]) == 0
    assert torch.count_nonzero(result.weights[name][mask]) == mask.sum()
    assert not torch.equal(result.weights[name][mask], start[name][mask])


def test_only_what_learns_changes() -> None:
    programs, weights = model()
    result = fit(programs, weights, some_data(), CONFIG, setup=Setup(learns=lambda name: name.endswith("norm")))
    for name, before in weights.items():
        assert torch.equal(result.weights[name], before) != name.endswith("norm"), name
    with pytest.raises(UsageError, match="nothing is learned"):
        Fitter(programs, weights, some_data(), CONFIG, setup=Setup(learns=lambda name: False))


class Scaled:
    """A hook: the weight times a learned number."""

    def __init__(self) -> None:
        self.factor = torch.ones((), requires_grad=True)

    def parameters(self) -> dict[str, Tensor]:
        return {"factor": self.factor}

    def __call__(self, weight: Tensor) -> Tensor:
        return weight * self.factor


def test_hooks_learn_their_own_parameters() -> None:
    programs, weights = model()
    hook = Scaled()
    name = "layers.1.attn.v.weight"
    setup = Setup(hooks={name: hook}, learns=lambda n: n != name)
    result = fit(programs, weights, some_data(), CONFIG, setup=setup)
    assert hook.factor.item() != 1.0
    assert torch.equal(result.extra[f"{name}:factor"], hook.factor)
    assert torch.equal(result.weights[name], weights[name])


def test_a_resumed_run_gives_the_same_bits(tmp_path: Path) -> None:
    programs, weights = model()
    mask = torch.rand(weights["embed.weight"].shape, generator=torch.Generator().manual_seed(1)) < 0.7

    def fitter(folder: Path) -> Fitter:
        teacher = LiveTeacher(*model(seed=9), features=True)
        features = FeatureMatch(teacher, layer_map(2, 2), (32, 32))
        return Fitter(
            programs, weights, some_data(), CONFIG, objective=Mix((1.0, Response(teacher)), (0.1, features)),
            setup=Setup(masks={"embed.weight": mask}, hooks={"layers.0.attn.q.weight": Scaled()}),
            validation=some_data(30), folder=folder,
        )  # fmt: skip

    whole = fitter(tmp_path / "whole").run()
    stopped = fitter(tmp_path / "parts").run(minutes=0.0)
    assert not stopped.finished
    assert stopped.steps == 0
    ticks = iter([0.0] * 6 + [1e9] * 99)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("inhouse.compress.fit.time.monotonic", lambda: next(ticks))
        part = fitter(tmp_path / "parts").run(minutes=1.0)
    assert 0 < part.steps < CONFIG.steps
    resumed = fitter(tmp_path / "parts").run()
    assert resumed.finished
    assert same(whole, resumed)
    assert resumed.validation == whole.validation


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    programs, weights = model()
    fit(programs, weights, some_data(), CONFIG, folder=tmp_path)
    with pytest.raises(ConflictError, match="config"):
        fit(programs, weights, some_data(), replace(CONFIG, seed=1), folder=tmp_path)
    with pytest.raises(ConflictError, match="objective"):
        fit(programs, weights, some_data(), CONFIG, objective=Response(LiveTeacher(*model(seed=9))), folder=tmp_path)
    mask = {"embed.weight": torch.ones(64, 32, dtype=torch.bool)}
    with pytest.raises(ConflictError, match="weights"):
        fit(programs, weights, some_data(), CONFIG, setup=Setup(masks=mask), folder=tmp_path)


def test_bad_setups_are_refused() -> None:
    programs, weights = model()
    with pytest.raises(UsageError, match="no weight"):
        fit(programs, weights, some_data(), CONFIG, setup=Setup(masks={"nobody": torch.ones(1)}))
    with pytest.raises(UsageError, match="the mask of"):
        fit(programs, weights, some_data(), CONFIG, setup=Setup(masks={"embed.weight": torch.ones(1)}))
    with pytest.raises(UsageError, match="steps"):
        fit(programs, weights, some_data(), replace(CONFIG, steps=0))
    broken = {**weights, "final_norm": torch.full((32,), torch.nan)}
    with pytest.raises(ExecutorError, match="nan"):
        fit(programs, broken, some_data(), CONFIG)


def test_a_smaller_student_learns_from_features_and_relations() -> None:
    """Other width, depth and heads: projections are learned, every part of the mix falls."""
    teacher_model = model(seed=9)
    taught = fit(*teacher_model, some_data(), replace(CONFIG, steps=60))
    teacher = LiveTeacher(teacher_model[0], taught.weights, features=True)
    layers = layer_map(1, 2)
    assert layers == {0: 1}
    assert layer_map(3, 6) == {0: 1, 1: 3, 2: 5}
    for objective in (
        Response(teacher, temperature=2.0),
        FeatureMatch(teacher, layers, (16, 32)),
        RelationMatch(teacher, layers, between=0.0, relation_heads=2),
    ):
        result = fit(*model(SMALL), some_data(), replace(CONFIG, steps=60), objective=objective)
        assert result.losses[-1] < 0.9 * result.losses[0], objective.describe()
    assert any(key.startswith("objective:projection") for key in Fitter(
        *model(SMALL), some_data(), CONFIG, objective=FeatureMatch(teacher, layers, (16, 32))
    ).extra)  # fmt: skip
    with pytest.raises(UsageError, match="two layers"):
        RelationMatch(teacher, layers)


def test_cached_logits_teach_like_the_live_teacher(tmp_path: Path) -> None:
    teacher, data = LiveTeacher(*model(seed=9)), some_data()
    write_cache(teacher, data, tmp_path, k=64, vocab=64, temperature=2.0, batch=5)
    cached = CachedTeacher(tmp_path, data)
    assert cached.temperature == 2.0
    live = fit(*model(), data, CONFIG, objective=Response(teacher, temperature=2.0))
    kept = fit(*model(), data, CONFIG, objective=Response(cached, temperature=2.0))
    assert np.allclose(live.losses, kept.losses, rtol=0.02, atol=2e-3)  # f16 log probabilities
    write_cache(teacher, data, tmp_path / "few", k=8, vocab=64)
    few = fit(*model(), data, CONFIG, objective=Response(CachedTeacher(tmp_path / "few", data)))
    assert few.losses[-1] < few.losses[0]
    with pytest.raises(ConflictError, match="another data set"):
        CachedTeacher(tmp_path, some_data(3))
    (tmp_path / "cache.json").unlink()
    with pytest.raises(FormatError, match="no cache"):
        CachedTeacher(tmp_path, data)
    with pytest.raises(UsageError, match="no features"):
        fit(*model(), data, CONFIG, objective=FeatureMatch(CachedTeacher(tmp_path / "few", data), {0: 0}, (32, 32)))


def test_vocabularies_must_be_one() -> None:
    words = {"a": 0, "b": 1, "c": 2}
    assert shared_ids(words, dict(words), 8, 6) == 6
    with pytest.raises(UnsupportedError, match="'b' .id 1. first"):
        shared_ids(words, {"a": 0, "x": 1, "c": 2, "b": 3}, 8, 6)
    with pytest.raises(UnsupportedError, match="a head only 2"):
        shared_ids(words, words, 2, 6)


def test_padded_heads_are_renormalised_over_the_shared_ids() -> None:
    """A teacher whose head is padded to more rows says the same over the shared ids."""
    plain = LiveTeacher(*model(seed=9))
    programs, weights = model(replace(SPEC, vocab_size=72), seed=9)
    narrow = model(seed=9)[1]
    padded = {**narrow, "embed.weight": torch.cat([narrow["embed.weight"], weights["embed.weight"][64:]])}
    wide = LiveTeacher(programs, padded)
    a = fit(*model(), some_data(), CONFIG, objective=Response(plain))
    b = fit(*model(), some_data(), CONFIG, objective=Response(wide, shared=64))
    assert np.allclose(a.losses, b.losses, rtol=1e-4)


def test_gradients_pass_quantised_activations() -> None:
    """Straight through: values are the integers', gradients as if nothing had been rounded, so close to the floats'."""
    programs, weights = model()
    rounded = quantize_activations(programs, {name: "q8_0" for name, w in weights.items() if w.dim() == 2})
    tokens = torch.arange(12).reshape(2, 6)
    constants = {n: torch.from_numpy(a) for n, a in programs.constants.items()}
    grads = []
    for program in (programs.programs["step"], rounded.programs["step"]):
        leaves = {n: w.clone().requires_grad_() for n, w in weights.items()}
        loss = forward(program, tokens, leaves | constants)["logits"].square().mean()
        torch.autograd.backward(loss)
        grads.append({n: leaf.grad for n, leaf in leaves.items()})
    for name in weights:
        a, b = grads[0][name], grads[1][name]
        assert a is not None
        assert b is not None
        assert float((a - b).norm() / a.norm()) < 0.05, name
    result = fit(programs, weights, some_data(), CONFIG, setup=Setup(program=rounded.programs["step"]))
    assert result.losses[-1] < result.losses[0]


def test_cross_entropy_is_the_default() -> None:
    programs, weights = model()
    a = fit(programs, weights, some_data(), CONFIG)
    b = fit(programs, weights, some_data(), CONFIG, objective=CrossEntropy())
    assert same(a, b)
