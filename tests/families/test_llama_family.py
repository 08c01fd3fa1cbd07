"""Llama and what is built like it, against transformers."""

from pathlib import Path
from typing import Any

import pytest

from tests.families.parity import check_parity, transformers_oracle
from tests.families.shapes import SHAPE

pytestmark = pytest.mark.torch

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500000.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "Llama", {}),
    "llama-3": ("llama", "Llama", {"rope_parameters": LLAMA3}),
    "llama-tied": ("llama", "Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": ("mistral", "Mistral", {"sliding_window": 7}),
    "qwen2": ("qwen2", "Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", "Qwen3", {"head_dim": 16}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_ids_and_batches(case: str, tmp_path: Path) -> None:
    family, name, changes = CASES[case]
    oracle = transformers_oracle(f"{name}ForCausalLM", f"{name}Config", SHAPE | changes)
    check_parity(oracle, tmp_path, family, case=case.removeprefix(family).strip("-"))
