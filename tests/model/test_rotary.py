"""Inverse frequencies against the formulas of transformers, far beyond what a tiny model would show."""

from typing import Any

import numpy as np
import pytest

from inhouse.model.rotary import inverse_frequencies
from inhouse.model.spec import RopeSpec
from tests.model.configs import LLAMA, resolve, rope_of

pytestmark = pytest.mark.torch

SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.707,
     "mscale_all_dim": 1.0, "beta_fast": 24.0, "beta_slow": 2.0, "truncate": False},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3, "original_max_position_embeddings": 32768},
    {"rope_type": "default"},
]  # fmt: skip


@pytest.mark.parametrize("scaling", SCALINGS)
def test_frequencies_are_those_of_transformers(scaling: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    shape: dict[str, Any] = {
        "hidden_size": 1024,
        "num_attention_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
    }
    rope = scaling | {"rope_theta": 500000.0}
    spec = resolve(LLAMA | shape | {"rope_theta": None, "rope_parameters": rope})[0]
    theirs = LlamaRotaryEmbedding(LlamaConfig(**shape, rope_parameters=rope))
    expected: Any = theirs.inv_freq
    if scaling["rope_type"] == "dynamic":
        assert spec.context_length == 131072  # up to which the original's frequencies never change
    np.testing.assert_allclose(inverse_frequencies(rope_of(spec), spec.context_length), expected.numpy(), rtol=2e-6)
    assert rope_of(spec).attention_factor == pytest.approx(theirs.attention_scaling, rel=1e-12)


def test_dynamic_changes_nothing_within_the_original_context() -> None:
    dynamic = RopeSpec(64, scaling="dynamic", factor=2.0, original_context=4096)
    plain = inverse_frequencies(RopeSpec(64), 4096)
    np.testing.assert_array_equal(inverse_frequencies(dynamic, 4096), plain)
    assert inverse_frequencies(dynamic, 8192)[-1] < 0.5 * plain[-1]
