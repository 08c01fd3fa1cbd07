"""Structured pruning: planted redundancy is found and removed without a trace, widths and counts are as computed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from inhouse.compress.activations import observe
from inhouse.compress.calibrate import Calibration
from inhouse.compress.methods.neurons import NeuronOptions, fold_constants, merge_duplicates, neurons
from inhouse.compress.methods.structured import StructuredOptions, compensated, structured
from inhouse.compress.slicing import Cut, axes, cut_spec, cut_weights, kept_width, renamed
from inhouse.compress.work import Work
from inhouse.core.errors import UnsupportedError, UsageError
from inhouse.model.build import build, parameters
from inhouse.model.spec import ModelSpec, RopeSpec
from inhouse.runtime.program import ProgramSet
from inhouse.runtime.torch_dense import forward
from tests.compress.tiny_models import make

pytestmark = [pytest.mark.torch, pytest.mark.realdata]

SPEC = ModelSpec(
    family="llama", hidden=48, layers=3, heads=6, kv_heads=3, head_dim=8, ffn=80, vocab_size=64, context_length=64,
    rope=RopeSpec(dim=8), norm_eps=1e-5,
)  # fmt: skip
Weights = dict[str, Tensor]


@pytest.fixture
def work(stories: Path, tmp_path: Path) -> Work:
    folder = make("Llama", stories, tmp_path / "model", num_key_value_heads=3)
    return Work.open(str(folder), tmp_path / "run")


def texts(rows: int = 6, length: int = 32) -> Calibration:
    tokens = torch.randint(3, 512, (rows, length), generator=torch.Generator().manual_seed(7))
    lengths = torch.full((rows,), length)
    lengths[-1] = length // 2
    return Calibration(tokens, lengths, "", ())


def logits(work: Work) -> Tensor:
    tokens = torch.randint(3, 512, (3, 20), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        weights = {name: weight.double() for name, weight in work.weights().items()}  # so that 1e-5 is not the sums'
        return forward(work.program, tokens, weights)["logits"]


def change(work: Work, **values: Tensor) -> None:
    """Puts weights given as `layers_0_mlp_up_weight=...`."""
    for key, value in values.items():
        work.put(key.replace("_", ".").replace("attn.norm", "attn_norm"), value)


def run(work: Work, calibration: Calibration | None = None, **options: Any) -> dict[str, Any]:
    report: dict[str, Any] = {}
    work.begin("structured")
    structured(work, calibration or texts(), StructuredOptions(**options), report)
    work.save("structured/0")
    return report


def test_a_duplicate_and_a_silent_neuron_are_merged_without_a_trace(work: Work) -> None:
    for i in range(3):
        mlp = f"layers.{i}.mlp"
        gate, up = work.value(f"{mlp}.gate.weight").clone(), work.value(f"{mlp}.up.weight").clone()
        gate[5], up[5] = gate[11], up[11]
        gate[20], up[20] = gate[30], up[30] * -1.75  # the same but for a factor
        up[40] = 0.0  # says nothing
        change(work, **{f"layers_{i}_mlp_gate_weight": gate, f"layers_{i}_mlp_up_weight": up})
    down = work.value("layers.1.mlp.down.weight").clone()
    down[:, 50] = 0.0  # is not heard; only in this layer, so that it stays, as the others have nothing to match it
    work.put("layers.1.mlp.down.weight", down)
    report: dict[str, Any] = {}
    before = logits(work)
    neurons(work, texts(), NeuronOptions(), report)
    assert report["folded"] == {"0": 3, "1": 4, "2": 3}
    assert (report["removed"], work.spec.ffn) == (3, 77)  # type: ignore[union-attr]
    assert (logits(work) - before).abs().max() < 1e-5
    work.save("neurons/0")


def test_constant_neurons_go_into_the_bias() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(200, 10, generator=rng)
    x[:, 3], x[:, 7], x[:, 8] = 0.5, -2.0, 0.0
    weight, bias = torch.randn(6, 10, generator=rng), torch.randn(6, generator=rng)
    wide = x.double()
    mean, square = wide.mean(0), wide.square().mean(0)
    folded = fold_constants(weight, bias, mean, square, 1e-6)
    assert folded.silent == (3, 7, 8)
    assert folded.bias is not None
    assert torch.allclose(x @ folded.weight.T + folded.bias, x @ weight.T + bias, atol=1e-5)
    alone = fold_constants(weight, None, mean, square, 1e-6)
    assert alone.silent == (3, 8)  # 7, the loudest, carries 3
    assert alone.bias is None
    assert torch.allclose(x @ alone.weight.T, x @ weight.T, atol=1e-5)


def test_neurons_that_differ_are_left_alone() -> None:
    rng = torch.Generator().manual_seed(0)
    gate, up, down = (torch.randn(*shape, generator=rng) for shape in ((12, 8), (12, 8), (8, 12)))
    gate[3] = gate[4]  # but up differs
    up[6] = up[7]  # but gate differs
    assert merge_duplicates(gate, up, down).silent == ()
    assert torch.equal(merge_duplicates(gate, up, down).weight, down)
    assert merge_duplicates(None, up, down).silent == (7,)


def test_a_zero_head_goes_first(work: Work) -> None:
    """A key-value group whose values are 0 adds nothing; neither do query heads that `o` does not read."""
    zero = 2
    for i in range(3):
        value = work.value(f"layers.{i}.attn.v.weight").clone()
        value[zero * 8 : (zero + 1) * 8] = 0.0
        work.put(f"layers.{i}.attn.v.weight", value)
    before = logits(work)
    report = run(work, kv_groups=1)
    assert (work.spec.heads, work.spec.kv_heads) == (4, 2)  # type: ignore[union-attr]
    assert (logits(work) - before).abs().max() < 1e-5
    assert report["parameters"][0] - report["parameters"][1] == 3 * (2 * 8 * 48 + 4 * 8 * 48)


def test_query_heads_go_from_every_group(work: Work) -> None:
    for i in range(3):
        o = work.value(f"layers.{i}.attn.o.weight").clone()
        for head in (1, 2, 5):  # one of each group of two
            o[:, head * 8 : (head + 1) * 8] = 0.0
        work.put(f"layers.{i}.attn.o.weight", o)
    before = logits(work)
    run(work, heads_per_group=1)
    assert (work.spec.heads, work.spec.kv_heads) == (3, 3)  # type: ignore[union-attr]
    assert (logits(work) - before).abs().max() < 1e-5


def test_an_identity_layer_goes_first(work: Work) -> None:
    work.put("layers.1.attn.o.weight", torch.zeros(48, 48))
    work.put("layers.1.mlp.down.weight", torch.zeros(48, 80))
    seen = observe(work.program, work.weights(), texts().tokens)
    influence = seen.influence(3)
    assert float(influence[1]) == 0.0
    assert min(float(influence[0]), float(influence[2])) > 1e-3
    before = logits(work)
    report = run(work, layers=1)
    assert report["widths"]["layers"] == 2
    assert (logits(work) - before).abs().max() < 1e-5


def test_silent_hidden_channels_go_without_a_trace(work: Work) -> None:
    """Channels of the residual stream that nobody writes: norms and their epsilon are scaled to the rest."""
    gone = [1, 17, *range(33, 47)]
    for name in ("embed.weight", *(f"layers.{i}.{part}.weight" for i in range(3) for part in ("attn.o", "mlp.down"))):
        value = work.value(name).clone()
        value[(..., gone) if name == "embed.weight" else (gone, ...)] = 0.0
        work.put(name, value)
    before = logits(work)
    report = run(work, hidden=1 / 3, multiple=32)
    assert report["widths"]["hidden"] == 32
    assert (logits(work) - before).abs().max() < 1e-5
    assert work.shape("embed.weight") == (512, 32)


def test_all_at_once_and_after_a_restart(work: Work, tmp_path: Path) -> None:
    report = run(work, ffn=0.35, kv_groups=1, layers=1, hidden=0.3, multiple=16)
    spec = work.spec
    assert isinstance(spec, ModelSpec)
    assert (spec.layers, spec.hidden, spec.ffn, spec.heads, spec.kv_heads) == (2, 32, 48, 4, 2)
    attention = 32 * 32 + 2 * 16 * 32 + 32 * 32
    wanted = 2 * 512 * 32 + 2 * (attention + 3 * 48 * 32 + 2 * 32) + 32
    assert report["parameters"][1] == wanted == parameters(spec)
    first = logits(work)
    work.close()
    with Work.open(str(tmp_path / "model"), tmp_path / "run") as again:
        assert again.spec == spec
        assert torch.equal(logits(again), first)


def test_what_stays_makes_up_for_what_goes() -> None:
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(500, 12, generator=rng, dtype=torch.float64) @ torch.randn(12, 12, generator=rng).double()
    weight, kept = torch.randn(5, 12, generator=rng), [0, 2, 3, 5, 7, 8, 11]
    made = compensated(weight, x.T @ x / 500, kept, 0.0)
    oracle = torch.linalg.lstsq(x[:, kept], x @ weight.double().T).solution.T
    assert torch.allclose(made.double(), oracle, atol=1e-5)
    silent = x.clone()
    silent[:, [1, 4, 6, 9, 10]] = 0.0
    assert torch.equal(compensated(weight, silent.T @ silent / 500, kept, 1e-3), weight[:, kept])


def test_compensation_betters_the_output(work: Work, stories: Path, tmp_path: Path) -> None:
    before = logits(work)
    run(work, texts(48, 48), ffn=0.4, multiple=16)
    with Work.open(str(tmp_path / "model"), tmp_path / "plain") as plain:
        run(plain, texts(48, 48), ffn=0.4, multiple=16, compensate=False)
        assert (logits(work) - before).norm() < (logits(plain) - before).norm()


@pytest.mark.parametrize(("total", "share", "multiple", "kept"), [
    (768, 1 / 3, 0, 512), (11008, 0.25, 0, 8192), (172, 1 / 3, 0, 128), (512, 0.3, 0, 384), (80, 0.35, 16, 48),
    (20, 0.5, 0, 10), (4096, 0.0, 0, 4096),
])  # fmt: skip
def test_widths_are_multiples_with_a_reason(total: int, share: float, multiple: int, kept: int) -> None:
    found, why = kept_width(total, share, multiple)
    assert found == kept
    assert why


def test_permuting_channels_and_heads_changes_nothing() -> None:
    """Hidden channels, FFN channels and key-value groups in another order: the same logits."""
    programs, weights = random_model()
    rng = torch.Generator().manual_seed(5)
    hidden, ffn = torch.randperm(48, generator=rng), torch.randperm(80, generator=rng)
    kv = torch.randperm(3, generator=rng)
    heads = torch.stack([2 * kv, 2 * kv + 1], 1).flatten()
    orders = {"hidden": hidden, "ffn": ffn, "kv": spread(kv), "q": spread(heads)}
    permuted = {}
    for name, weight in weights.items():
        for axis, kind in enumerate(axes(name, SPEC)):
            weight = weight.index_select(axis, orders[kind]) if kind in orders else weight
        permuted[name] = weight
    tokens = torch.randint(0, 64, (2, 16), generator=rng)
    plain, other = (
        forward(programs.programs["step"], tokens, each | constants(programs))["logits"] for each in (weights, permuted)
    )
    assert torch.allclose(plain, other, atol=1e-5)


def test_counts_and_names_of_every_cut() -> None:
    programs, weights = random_model()
    cut = Cut(
        layers=(0, 2), hidden=tuple(range(0, 48, 2)), ffn={i: tuple(range(i, 60 + i)) for i in range(3)},
        heads=dict.fromkeys(range(3), (0, 1, 4, 5)), kv_heads=dict.fromkeys(range(3), (0, 2)),
    )  # fmt: skip
    spec = cut_spec(SPEC, cut)
    made = dict(cut_weights(weights.items(), SPEC, cut))
    assert {name: tuple(w.shape) for name, w in made.items()} == {n: w.shape for n, w in build(spec).weights.items()}
    assert sum(w.numel() for w in made.values()) == parameters(spec)
    assert torch.equal(made["layers.1.mlp.up.weight"], weights["layers.2.mlp.up.weight"][2:62, ::2])
    assert renamed("layers.1.attn_norm", (0, 2)) is None
    assert renamed("final_norm", (0, 2)) == "final_norm"
    assert programs.weights.keys() == weights.keys()


def test_cuts_that_do_not_hold_together_are_refused() -> None:
    uneven = {0: (0, 1), 1: (0, 1, 2), 2: (0, 1)}
    with pytest.raises(UsageError, match="different numbers"):
        cut_spec(SPEC, Cut(ffn=uneven))
    with pytest.raises(UsageError, match="query heads"):
        cut_spec(SPEC, Cut(heads=dict.fromkeys(range(3), (0, 1, 2))))
    with pytest.raises(UsageError, match="ascending"):
        cut_spec(SPEC, Cut(hidden=(3, 1)))
    with pytest.raises(UsageError, match="ascending"):
        cut_spec(SPEC, Cut(layers=()))
    with pytest.raises(UnsupportedError, match="widths"):
        axes("layers.0.moe.router.weight", SPEC)
    with pytest.raises(UsageError, match="multiple"):
        kept_width(80, 0.5, 128)
    with pytest.raises(UsageError, match="share"):
        kept_width(80, 1.0)


@pytest.mark.parametrize("options", [{"layers": 3}, {"kv_groups": 3}, {"heads_per_group": 2}, {"ffn": 1.0}])
def test_more_than_there_is_is_refused(work: Work, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        run(work, **options)


def test_layers_of_experts_go_and_their_widths_do_not(stories: Path, tmp_path: Path) -> None:
    with Work.open(str(make("Mixtral", stories, tmp_path / "experts")), tmp_path / "run") as work:
        with pytest.raises(UnsupportedError, match="experts"):
            run(work, ffn=0.4, multiple=16)
        work.put("layers.0.attn.o.weight", torch.zeros(48, 48))
        for name in work.names(0):
            if ".down" in name:
                work.put(name, torch.zeros(work.shape(name)))
        before = logits(work)
        run(work, layers=1)
        spec = work.spec
        assert isinstance(spec, ModelSpec)
        assert spec.moe is not None
        assert spec.moe.layers == (0, 1)
        assert (logits(work) - before).abs().max() < 1e-5


def test_structured_pruning_needs_texts(work: Work) -> None:
    with pytest.raises(UsageError, match="texts"):
        structured(work, None, StructuredOptions(ffn=0.5), {})
    with pytest.raises(UsageError, match="texts"):
        neurons(work, None, NeuronOptions(), {})


def spread(heads: Tensor) -> Tensor:
    return (heads[:, None] * 8 + torch.arange(8)).flatten()


def random_model() -> tuple[ProgramSet, Weights]:
    programs, rng = build(SPEC), torch.Generator().manual_seed(2)
    weights = {name: torch.randn(*spec.shape, generator=rng) * 0.2 for name, spec in programs.weights.items()}
    return programs, weights


def constants(programs: ProgramSet) -> Weights:
    return {name: torch.from_numpy(array.copy()) for name, array in programs.constants.items()}
