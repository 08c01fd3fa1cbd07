"""Low-rank forms, ranks by budget, the repair of a quantised matrix, and adapters out of two models."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from inhouse.compress.methods.lora_extract import extract, write_peft
from inhouse.compress.methods.lowrank import LowRank, factorise
from inhouse.compress.methods.repair import Repair, repair
from inhouse.compress.pack_as import pack_as
from inhouse.compress.ranks import Candidate, measured_weight, rank_for, ranks_by_budget
from inhouse.compress.spectrum import decompose, largest_saving_rank, output_error
from inhouse.core.errors import UnsupportedError, UsageError
from inhouse.runtime.form import Form
from tests.compress.test_spectrum import correlated


def value(form: Form) -> torch.Tensor:
    return torch.from_numpy(form.value())


def drawn(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / 8


@pytest.mark.parametrize(("factors", "part"), [("f32", 1e-6), ("bf16", 0.05), ("q8_0", 0.1)])
def test_a_form_is_as_small_as_it_says_and_as_near_as_the_theorem(factors: str, part: float) -> None:
    x, weight = correlated(96, 1500, seed=1), drawn(128, 96, 2)
    gram = x.T @ x / len(x)
    form = factorise(weight, LowRank(ratio=0.2, factors=factors), gram)
    assert form is not None
    rank = rank_for((128, 96), 0.2)
    width = {"f32": 4.0, "bf16": 2.0, "q8_0": 34 / 32}[factors]
    inputs = [96, rank if factors != "q8_0" else -(-rank // 32) * 32]
    assert form.nbytes == pytest.approx((rank * inputs[0] + 128 * inputs[1]) * width)
    tail = float(decompose(weight, gram=gram).tail[rank])
    error = output_error(weight, value(form), gram)
    size = output_error(weight, torch.zeros_like(weight), gram)
    assert abs(error - tail) <= part * tail + 1e-4 * part * size + 1e-12 * size


def test_larger_factors_are_refused_whatever_asks_for_them() -> None:
    weight = drawn(64, 64, 3)
    with pytest.raises(UnsupportedError, match="factors of rank 32 hold 4096"):
        factorise(weight, LowRank("svd", rank=32))
    with pytest.raises(UsageError, match="no rank of a matrix"):
        factorise(drawn(2, 2, 3), LowRank("svd", ratio=0.5))
    for bad in ({"ratio": 0.0}, {"ratio": 1.0}, {"method": "fwsvd"}):
        with pytest.raises(UsageError):
            LowRank(**bad)


def test_keep_if_better_keeps_thin_directions_and_drops_noise() -> None:
    thin = drawn(64, 4, 4) @ drawn(4, 64, 5)  # of rank 4: nothing of its size comes near
    noise = drawn(64, 64, 6)  # no direction better than another: q8 of as many bytes does
    options = LowRank("svd", rank=6, keep_if_better=True, factors="bf16")
    assert factorise(thin, options) is not None
    assert factorise(noise, LowRank("svd", rank=20, keep_if_better=True)) is None
    kept = factorise(noise, LowRank("svd", rank=20))
    assert kept is not None
    assert kept.main is None


def test_ranks_by_budget_are_those_of_enumeration() -> None:
    candidates = {}
    for i, (rows, columns) in enumerate([(6, 5), (4, 7), (8, 3)]):
        taken = decompose(drawn(rows, columns, 20 + i), "svd")
        candidates[f"m{i}"] = Candidate(taken, weight=1.0 + i)
    for budget in (45, 60, 75, 82):
        found = ranks_by_budget(candidates, budget)

        def cost(name: str, rank: int) -> int:
            rows, columns = candidates[name].spectrum.shape
            return rank * (rows + columns) if rank else rows * columns

        def loss(name: str, rank: int) -> float:
            return candidates[name].weight * float(candidates[name].spectrum.tail[rank]) if rank else 0.0

        ways = [range(largest_saving_rank(c.spectrum.shape) + 1) for c in candidates.values()]
        fitting = [w for w in itertools.product(*ways) if sum(map(cost, candidates, w)) <= budget]
        assert sum(cost(n, k) for n, k in found.items()) <= budget
        assert sum(loss(n, k) for n, k in found.items()) == pytest.approx(
            min(sum(map(loss, candidates, w)) for w in fitting)
        )
    with pytest.raises(UsageError, match="the smallest"):
        ranks_by_budget(candidates, 20)


def test_a_matrix_that_matters_is_cut_less() -> None:
    taken = {name: decompose(drawn(64, 64, 30 + i), "svd") for i, name in enumerate("ab")}
    weights = {"a": measured_weight(taken["a"], 16, 0.5), "b": measured_weight(taken["b"], 16, 0.001)}
    found = ranks_by_budget({n: Candidate(t, weights[n]) for n, t in taken.items()}, int(0.7 * 2 * 4096))
    assert found["a"] == 0 or found["a"] > found["b"] > 0
    assert measured_weight(taken["a"], 16, -0.1) == 0.0


@pytest.mark.parametrize("packed", ["q4_0", "q8_0"])
def test_repair_lowers_the_output_error(packed: str) -> None:
    x, weight = correlated(96, 1500, seed=7), drawn(80, 96, 8)
    gram, mean_abs = x.T @ x / len(x), x.abs().mean(0)
    form = Form(pack_as(weight, packed))
    before = output_error(weight, value(form), gram)
    errors = {}
    for method in ("svd", "asvd", "whitened"):
        repaired = repair(weight, form, Repair(rank=8, method=method), gram, mean_abs)
        assert repaired.main is form.main
        assert repaired.nbytes == form.nbytes + 2 * 8 * (80 + 96)
        errors[method] = output_error(weight, value(repaired), gram)
    assert errors["whitened"] < 0.5 * before
    assert errors["whitened"] < errors["asvd"] < before
    assert errors["whitened"] < errors["svd"]


def test_nothing_is_added_to_an_exact_matrix_nor_twice() -> None:
    weight = drawn(32, 32, 9)
    exact = Form(pack_as(weight, "f32"))
    assert repair(weight, exact, Repair(rank=4, method="svd")) is exact
    twice = repair(weight, Form(pack_as(weight, "q4_0")), Repair(rank=4, method="svd"))
    with pytest.raises(UnsupportedError, match="without a side branch"):
        repair(weight, twice, Repair(rank=4, method="svd"))
    with pytest.raises(UnsupportedError, match="factors of rank 20"):
        repair(weight, Form(pack_as(weight, "q4_0")), Repair(rank=20, method="svd"))


def test_extraction_finds_a_planted_adapter(tmp_path: Path) -> None:
    old = drawn(24, 20, 10)
    new = old + drawn(24, 3, 11) @ drawn(3, 20, 12)
    found = extract("model.layers.0.self_attn.q_proj", old, new, rank=3)
    assert found is not None
    assert found.error < 1e-6
    assert torch.allclose(old + found.b @ found.a, new, atol=1e-6)
    assert extract("same", old, old.clone(), rank=3) is None
    with pytest.raises(UsageError, match="no two matrices alike"):
        extract("other", old, new.T, rank=3)
    with pytest.raises(UsageError, match="do not differ"):
        write_peft(tmp_path / "none", [])
    assert write_peft(tmp_path / "one", [found]) == 1
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (3, 3, {})


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers for what that deprecates
def test_peft_and_our_loader_open_what_was_extracted(tmp_path: Path) -> None:
    """Two tiny Llamas, one tuned in three matrices: PEFT on the first is the second, and so is our own loader."""
    peft = pytest.importorskip("peft", reason="the oracle of adapters is PEFT")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    base, tuned = LlamaForCausalLM(config), LlamaForCausalLM(config)
    tuned.load_state_dict(base.state_dict())
    changed = {"model.layers.0.self_attn.q_proj": 2, "model.layers.1.mlp.down_proj": 3, "model.layers.1.mlp.up_proj": 3}
    old = {name: p.detach().clone() for name, p in base.named_parameters()}
    with torch.no_grad():
        for i, (name, rank) in enumerate(changed.items()):
            weight = tuned.get_parameter(f"{name}.weight")
            weight.add_(4 * drawn(weight.shape[0], rank, 40 + i) @ drawn(rank, weight.shape[1], 50 + i))
    pairs = [
        extract(
            name.removesuffix(".weight"),
            old[name],
            p.detach(),
            changed.get(name.removesuffix(".weight"), 3),
            least=1e-6,
        )
        for name, p in tuned.named_parameters()
        if name.endswith("_proj.weight")
    ]
    assert write_peft(tmp_path / "adapter", [p for p in pairs if p is not None]) == 3
    base.save_pretrained(tmp_path / "base")
    ids = torch.arange(40)[None] % 64
    wanted = tuned(ids).logits
    both = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.allclose(both(ids).logits, wanted, atol=2e-5)
    _ours(tmp_path, tuned, changed)


def _ours(folder: Path, tuned: torch.nn.Module, changed: dict[str, int]) -> None:
    from inhouse.load.adapter import read_adapter
    from inhouse.load.describe import describe

    described = describe(folder / "base")
    try:
        derived = described.family.derive(described.spec, set(described.source))
        read = read_adapter(folder / "adapter", described.family, described.spec, derived)
        assert read.rank == 3
        assert len(read.adapter) == len(changed)
        for name, low in read.adapter.items():
            source = derived[name].source
            old = np.frombuffer(described.source.raw(source), np.float32).reshape(low.b.shape[0], low.a.shape[1])
            np.testing.assert_allclose(old + low.b @ low.a, tuned.get_parameter(source).detach(), atol=2e-6)
    finally:
        described.source.close()
