"""Whole sequences: gradients, packed documents, chosen rows, autocast, and what an observer sees."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from inhouse.core.errors import UnsupportedError, UsageError
from inhouse.runtime.torch_dense import forward
from inhouse.runtime.torch_executor import to_torch
from tests.runtime_torch.tiny import Tiny, tiny, worst

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def model() -> Tiny:
    return tiny("Qwen2", tie_word_embeddings=True, use_sliding_window=True, sliding_window=6, max_window_layers=2)


@pytest.fixture(scope="module")
def weights(model: Tiny) -> dict[str, Tensor]:
    return to_torch(model.weights) | to_torch(model.programs.constants)


TOKENS = torch.tensor([[5, 17, 3, 88, 41, 2, 9, 60, 33, 12], [71, 8, 26, 54, 39, 66, 4, 20, 77, 13]])


def test_gradients_are_those_of_transformers(model: Tiny, weights: dict[str, Tensor]) -> None:
    parameters = {n: t.clone().requires_grad_(not n.startswith("const.")) for n, t in weights.items()}
    logits = forward(model.programs.programs["step"], TOKENS, parameters)["logits"]
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
    model.original.zero_grad()
    model.original(TOKENS, labels=TOKENS).loss.backward()
    theirs = dict(model.original.named_parameters())
    pairs = {
        "embed.weight": "model.embed_tokens.weight", "final_norm": "model.norm.weight",
        "layers.0.attn.q.weight": "model.layers.0.self_attn.q_proj.weight",
        "layers.2.attn.k.bias": "model.layers.2.self_attn.k_proj.bias",
        "layers.1.mlp.down.weight": "model.layers.1.mlp.down_proj.weight",
        "layers.1.attn_norm": "model.layers.1.input_layernorm.weight",
    }  # fmt: skip
    for ours, name in pairs.items():
        gradient = parameters[ours].grad
        assert gradient is not None
        assert worst(gradient.numpy(), theirs[name].grad.numpy()) < 1e-3, ours


def test_packed_documents_are_as_if_alone(model: Tiny, weights: dict[str, Tensor]) -> None:
    step = model.programs.programs["step"]
    first, second = TOKENS[:1, :4], TOKENS[1:, :6]
    packed = torch.cat([first, second], dim=1)
    segments = torch.tensor([[0] * 4 + [1] * 6])
    positions = torch.tensor([[*range(4), *range(6)]])
    together = forward(step, packed, weights, segments=segments, positions=positions)["logits"][0]
    alone = [forward(step, part, weights)["logits"][0] for part in (first, second)]
    assert worst(together.numpy(), torch.cat(alone).numpy()) < 1e-5
    leaking = forward(step, packed, weights, positions=positions)["logits"][0]
    assert worst(leaking[4:].numpy(), alone[1].numpy()) > 1e-2


def test_only_the_chosen_rows_get_logits(model: Tiny, weights: dict[str, Tensor]) -> None:
    step = model.programs.programs["step"]
    whole = forward(step, TOKENS, weights)["logits"]
    some = forward(step, TOKENS, weights, rows=torch.tensor([3, 19]))["logits"]
    assert some.shape == (2, 97)
    assert worst(some.numpy(), torch.stack([whole[0, 3], whole[1, 9]]).numpy()) < 1e-6


def test_rows_do_not_see_one_another_or_the_future(model: Tiny, weights: dict[str, Tensor]) -> None:
    step = model.programs.programs["step"]
    changed = TOKENS.clone()
    changed[1, 5:] = 1
    a, b = (forward(step, tokens, weights)["logits"] for tokens in (TOKENS, changed))
    torch.testing.assert_close(a[0], b[0], rtol=0, atol=0)
    assert worst(a[1, :5].numpy(), b[1, :5].numpy()) < 1e-6
    assert worst(a[1, 5:].numpy(), b[1, 5:].numpy()) > 1e-3


def test_autocast_trains_in_bfloat16(model: Tiny, weights: dict[str, Tensor]) -> None:
    parameters = {n: t.clone().requires_grad_(not n.startswith("const.")) for n, t in weights.items()}
    step = model.programs.programs["step"]
    exact = forward(step, TOKENS, weights)["logits"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = forward(step, TOKENS, parameters)["logits"]
    assert logits.dtype == torch.bfloat16
    assert worst(logits.float().detach().numpy(), exact.numpy()) < 0.2
    logits.float().square().mean().backward()  # type: ignore[no-untyped-call]
    gradients = [t.grad for n, t in parameters.items() if not n.startswith("const.")]
    assert all(g is not None and g.dtype == torch.float32 and torch.isfinite(g).all() for g in gradients)


def test_an_observer_sees_the_inputs_of_linears(model: Tiny, weights: dict[str, Tensor]) -> None:
    seen: dict[str, Any] = {}

    def observe(op: Any, inputs: Any, outputs: Any) -> None:
        if op.kind == "linears":
            seen[op.weights[0]] = (inputs[0], outputs[0])

    forward(model.programs.programs["step"], TOKENS, weights, observe=observe)
    assert len(seen) == 4 * 3 + 1
    x, y = seen["layers.1.mlp.down.weight"]
    np.testing.assert_allclose(y.numpy(), (x @ weights["layers.1.mlp.down.weight"].T).numpy(), rtol=1e-4, atol=1e-4)


def test_an_executor_takes_weights_by_name(model: Tiny) -> None:
    executor = model.executor()
    plain = executor.forward("step", TOKENS)["logits"]
    zeroed = executor.forward("step", TOKENS, {"final_norm": torch.zeros(48)})["logits"]
    assert float(zeroed.abs().max()) == 0.0
    assert float(plain.abs().max()) > 0.1
    torch.testing.assert_close(executor.forward(model.programs.programs["step"], TOKENS)["logits"], plain)


def test_pooled_rows_and_hidden(model: Tiny, weights: dict[str, Tensor]) -> None:
    out = forward(model.programs.programs["embed"], TOKENS, weights)
    assert (out["hidden"].shape, out["pooled"].shape) == ((2, 10, 48), (2, 48))
    last = torch.nn.functional.normalize(out["hidden"][:, -1], dim=-1)
    torch.testing.assert_close(out["pooled"], last)


def test_what_is_refused(model: Tiny, weights: dict[str, Tensor]) -> None:
    step = model.programs.programs["step"]
    with pytest.raises(UsageError, match=r"needs the weight layers\.1\.attn_norm"):
        forward(step, TOKENS, {n: t for n, t in weights.items() if n != "layers.1.attn_norm"})
    with pytest.raises(UsageError, match=r"\[10\]"):
        forward(step, TOKENS[0], weights)
    from tests.runtime_torch.test_executor import encoder_decoder

    programs, arrays = encoder_decoder()
    with pytest.raises(UnsupportedError, match="cross"):
        forward(programs.programs["step"], TOKENS % 11, to_torch(arrays))
