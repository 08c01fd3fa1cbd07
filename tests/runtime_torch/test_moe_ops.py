"""Routing against the routers of transformers, and the way of rows through experts against one token at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV3Config, GptOssConfig, Qwen2MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.phimoe.modeling_phimoe import sparsemixer
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter

from inhouse.core.errors import UsageError
from inhouse.runtime import torch_moe as moe
from inhouse.runtime import torch_ops as ops
from inhouse.runtime.ops import OPS, complete_attrs
from inhouse.runtime.program import Attr, Axis, Value, WeightSpec

pytestmark = pytest.mark.torch
TOKENS, HIDDEN, EXPERTS = 40, 24, 16


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spread(experts: Tensor, weights: Tensor) -> Tensor:
    """[T, EXPERTS]: the weight of each expert, zero where it was not chosen; in what order does not matter."""
    return torch.zeros(len(experts), EXPERTS).scatter(1, experts, weights)


def ours(logits: Tensor, correction: Tensor | None = None, **attrs: Any) -> Tensor:
    routing = moe.route(logits, correction, **attrs)
    half = routing.shape[1] // 2
    return spread(routing[:, :half].long(), routing[:, half:])


def agree(a: Tensor, b: Tensor) -> None:
    assert torch.equal(a != 0, b != 0)
    assert float((a - b).abs().max() / b.abs().max()) < 2e-6


def original(router: Any, correction: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(logits, weights [T, EXPERTS]) of a router of transformers with random weights."""
    with torch.no_grad():
        router.weight.copy_(randn(EXPERTS, HIDDEN, seed=1))
        if isinstance(getattr(router, "bias", None), Tensor):
            router.bias.copy_(randn(EXPERTS, seed=2))
        if correction is not None:
            router.e_score_correction_bias.copy_(correction)
        logits, weights, experts = router(randn(TOKENS, HIDDEN, seed=3))
    return logits, spread(experts, weights)


@pytest.mark.parametrize("normalize", [True, False])
def test_softmax_before_the_choice(normalize: bool) -> None:
    config = Qwen2MoeConfig(hidden_size=HIDDEN, num_experts=EXPERTS, num_experts_per_tok=4, norm_topk_prob=normalize)
    logits, expected = original(Qwen2MoeTopKRouter(config))  # type: ignore[no-untyped-call]
    agree(ours(logits, top_k=4, normalize=normalize), expected)


def test_softmax_over_the_chosen() -> None:
    config = GptOssConfig(hidden_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=4)
    logits, expected = original(GptOssTopKRouter(config))  # type: ignore[no-untyped-call]
    agree(ours(logits, top_k=4, scoring="softmax_after"), expected)


@pytest.mark.parametrize("groups", [(4, 2), (8, 3), (0, 0)])
def test_groups_by_their_best_expert(groups: tuple[int, int]) -> None:
    method = "group_limited_greedy" if groups[0] else "greedy"
    config = DeepseekV2Config(
        hidden_size=HIDDEN, num_attention_heads=4, n_routed_experts=EXPERTS, num_experts_per_tok=4, n_group=groups[0],
        topk_group=groups[1], topk_method=method, routed_scaling_factor=16.0,
    )  # fmt: skip
    logits, expected = original(DeepseekV2TopkRouter(config))
    found = ours(logits, top_k=4, normalize=False, scale=16.0, groups=groups[0], top_groups=groups[1])
    agree(found, expected)


@pytest.mark.parametrize("normalize", [True, False])
def test_groups_by_their_two_best_with_a_correction(normalize: bool) -> None:
    config = DeepseekV3Config(
        hidden_size=HIDDEN, n_routed_experts=EXPERTS, num_experts_per_tok=5, n_group=4, topk_group=2,
        norm_topk_prob=normalize, routed_scaling_factor=2.5,
    )  # fmt: skip
    correction = randn(EXPERTS, seed=9)  # large: it decides, and it must not be in the weights
    logits, expected = original(DeepseekV3TopkRouter(config), correction)
    found = ours(
        logits, correction, top_k=5, normalize=normalize, scoring="sigmoid", scale=2.5, groups=4, top_groups=2,
        group_score="top2",
    )  # fmt: skip
    agree(found, expected)


@pytest.mark.parametrize("jitter", [0.01, 0.3])
def test_sparsemixer(jitter: float) -> None:
    logits = randn(TOKENS, EXPERTS)
    weights, experts = sparsemixer(logits, jitter_eps=jitter, training=False)  # type: ignore[no-untyped-call]
    agree(ours(logits, top_k=2, scoring="sparsemixer", jitter=jitter), spread(experts, weights))


def test_ties_go_to_the_lower_expert_and_group() -> None:
    for scoring in ("softmax", "sigmoid", "softmax_after", "sparsemixer"):
        routing = moe.route(torch.zeros(1, 8), top_k=2, scoring=scoring, jitter=0.1)
        assert routing[0, :2].tolist() == [0.0, 1.0]
    tied = torch.tensor([[0.0, 1.0, 2.0, 3.0, 3.0, 2.0, 1.0, 0.0]])
    assert moe.route(tied, top_k=2, groups=2, top_groups=1, group_score="top2")[0, :2].tolist() == [3.0, 2.0]


@pytest.mark.parametrize(
    ("attrs", "why"),
    [
        ({"top_k": 0}, "top_k"),
        ({"top_k": 5, "groups": 4, "top_groups": 1}, "4 experts can be chosen"),
        ({"top_k": 2, "groups": 3, "top_groups": 1}, "groups do not divide"),
        ({"top_k": 2, "groups": 16, "top_groups": 4, "group_score": "top2"}, "no two best"),
        ({"top_k": 3, "scoring": "sparsemixer"}, "sparsemixer"),
        ({"top_k": 2, "scoring": "softmin"}, "softmin"),
    ],
)
def test_routes_that_cannot_be_are_refused(attrs: dict[str, Attr], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        OPS["route"].infer([Value(0, Axis.TOKENS, 16)], [], complete_attrs("route", attrs))


@pytest.mark.parametrize("biased", [True, False])
def test_each_token_gets_its_experts_and_no_others(biased: bool) -> None:
    x, logits = randn(7, 8), randn(7, 4, seed=1)
    first, second = [randn(6, 8, seed=10 + e) for e in range(4)], [randn(8, 6, seed=20 + e) for e in range(4)]
    third = [randn(6, 8, seed=30 + e) for e in range(4)]
    inner, outer = ([randn(n, seed=n + e) * biased for e in range(4)] for n in (6, 8))
    routing = moe.route(logits, top_k=2)
    rows = moe.dispatch(x, routing)
    absent: list[Tensor | None] = [None] * 4
    gate, up = moe.expert_linears(rows, routing, first + third, [*(inner if biased else absent), *absent], 4)
    (down,) = moe.expert_linears(ops.glu(gate, up, "relu"), routing, second, outer if biased else absent, 4)
    expected = torch.zeros(7, 8)
    for t in range(7):
        weights = torch.softmax(logits[t], -1)
        best = sorted(range(4), key=lambda e: -float(weights[e]))[:2]
        for e in best:
            hidden = torch.relu(first[e] @ x[t] + inner[e]) * (third[e] @ x[t])
            y = second[e] @ hidden + outer[e]
            expected[t] += weights[e] / sum(weights[b] for b in best) * y
    assert float((moe.combine(down, routing) - expected).abs().max() / expected.abs().max()) < 2e-6


def test_experts_may_take_quantised_rows_and_stand_idle() -> None:
    x, routing = randn(3, 64), torch.tensor([[2.0, 1.0], [0.0, 1.0], [2.0, 1.0]])
    experts = [randn(4, 64, seed=e) for e in range(3)]
    rows = ops.quantize_rows(moe.dispatch(x, routing), group=32)
    (y,) = moe.expert_linears(rows, routing, experts, [None] * 3, 3)
    exact = ops.quantize_rows(x, group=32).dequantize()
    expected = torch.stack([experts[2] @ exact[0], experts[0] @ exact[1], experts[2] @ exact[2]])
    assert float((moe.combine(y, routing) - expected).abs().max() / expected.abs().max()) < 2e-6


def test_the_clamped_glu_of_gpt_oss() -> None:
    gate, up = randn(9, 40) * 8, randn(9, 40, seed=1) * 8
    cut = gate.clamp(max=7.0)
    expected = (up.clamp(-7.0, 7.0) + 1) * (cut * torch.sigmoid(cut * 1.702))
    found = ops.glu(gate, up, "quick_gelu", limit=7.0, offset=1.0)
    assert float((found - expected).abs().max() / expected.abs().max()) < 2e-6


def test_heads_have_matrices_of_their_own() -> None:
    x, y, w = randn(5, 12), randn(5, 6, seed=1), randn(3 * 7, 4, seed=2)
    found = ops.head_linears(x, w, heads=3)
    for h in range(3):
        torch.testing.assert_close(found[:, 7 * h : 7 * h + 7], x[:, 4 * h : 4 * h + 4] @ w[7 * h : 7 * h + 7].T)
    both = ops.concat(x, y, heads=3)
    for h in range(3):
        assert torch.equal(both[:, 6 * h : 6 * h + 6], torch.cat([x[:, 4 * h : 4 * h + 4], y[:, 2 * h : 2 * h + 2]], 1))
    weight = WeightSpec("w", (21, 4), "linear")
    with pytest.raises(UsageError, match="does not fit"):
        OPS["head_linears"].infer([Value(0, Axis.TOKENS, 13)], [weight], {"heads": 3})
