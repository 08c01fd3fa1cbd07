"""Every family against its original in transformers, on tiny random models: logits, greedy ids, and the promise that
batches and chunks change nothing."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.runtime_torch.tiny import Tiny, step_of, tiny, worst

pytestmark = pytest.mark.torch

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500000.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-biases-tied": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-head-dim": ("Llama", {"head_dim": 12, "num_key_value_heads": 6, "rms_norm_eps": 1e-3}),
    "llama-llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "llama-yarn-mscale": (
        "Llama",
        {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.2, "truncate": False}},
    ),
    "mistral-window": ("Mistral", {"sliding_window": 7}),
    "mistral-full": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-biases-tied": ("Qwen3", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
}
PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32, 79, 50, 28, 84, 19, 71, 69, 39, 93, 75, 10, 58]
OTHER = [27, 18, 28, 18, 28, 45, 90, 45, 23, 53, 60]


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest) -> Tiny:
    family, config = MODELS[request.param]
    return tiny(family, **config)


def original_logits(model: Tiny, tokens: list[int]) -> Any:
    with torch.no_grad():
        return model.original(torch.tensor([tokens])).logits[0].numpy()


def test_whole_sequences_agree(model: Tiny) -> None:
    executor = model.executor()
    with torch.no_grad():
        ours = executor.forward("step", torch.tensor([PROMPT]))["logits"][0].numpy()
    assert worst(ours, original_logits(model, PROMPT)) < 1e-4


def test_greedy_ids_agree_over_thirty_tokens(model: Tiny) -> None:
    executor = model.executor()
    ours, tokens, first = [], PROMPT, 0
    for _ in range(30):
        logits = executor.run("step", step_of(model.programs, [(tokens, first)], "last"))["logits"]
        first += len(tokens)
        tokens = [int(logits[0].argmax())]
        ours += tokens
    theirs = model.original.generate(
        torch.tensor([PROMPT]), attention_mask=torch.ones(1, len(PROMPT)), max_new_tokens=30, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert ours == theirs[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_chunks_change_nothing(model: Tiny, chunk: int) -> None:
    executor = model.executor()
    whole = executor.run("step", step_of(model.programs, [(PROMPT, 0)]))["logits"]
    executor = model.executor()
    parts = [
        executor.run("step", step_of(model.programs, [(PROMPT[at : at + chunk], at)]))["logits"]
        for at in range(0, len(PROMPT), chunk)
    ]
    assert worst(np.concatenate(parts), whole) < 1e-5
    assert worst(whole, original_logits(model, PROMPT)) < 1e-4


def test_strangers_in_the_batch_change_nothing(model: Tiny) -> None:
    alone = [model.executor().run("step", step_of(model.programs, [(p, 0)]))["logits"] for p in (PROMPT, OTHER)]
    executor = model.executor()
    first = executor.run("step", step_of(model.programs, [(PROMPT[:20], 0), (OTHER[:4], 0), ([7], 0)]))["logits"]
    second = executor.run("step", step_of(model.programs, [(PROMPT[20:], 20), (OTHER[4:], 4), ([8], 1)]))["logits"]
    together = np.concatenate([first[:20], second[:7]]), np.concatenate([first[20:24], second[7:14]])
    assert worst(together[0], alone[0]) < 1e-5
    assert worst(together[1], alone[1]) < 1e-5


def test_dynamic_rope_keeps_to_the_trained_length() -> None:
    config = {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 10000.0}
    model = tiny("Llama", max_position_embeddings=16, rope_parameters=config)
    assert model.spec.context_length == 16
    tokens = [(7 * i + 3) % 97 for i in range(16)]
    ours = model.executor().run("step", step_of(model.programs, [(tokens, 0)]))["logits"]
    assert worst(ours, original_logits(model, tokens)) < 1e-4
