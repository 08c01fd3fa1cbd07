"""Tiny random models: the Hugging Face original, and the same weights under our names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from inhouse.model.build import build
from inhouse.model.families.table import resolve
from inhouse.model.spec import ModelSpec
from inhouse.runtime.program import ProgramSet
from inhouse.runtime.step import BLOCK_SIZE, Step
from inhouse.runtime.torch_executor import TorchExecutor

SHAPE = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip


@dataclass(frozen=True)
class Tiny:
    """A random model twice: as transformers runs it, and as we do."""

    original: Any
    spec: ModelSpec
    programs: ProgramSet
    weights: Mapping[str, NDArray[np.float32]]

    def executor(self, blocks: int = 64, **options: str) -> TorchExecutor:
        """A TorchExecutor with that many blocks in every state group."""
        executor = TorchExecutor(self.programs, self.weights, **options)
        executor.allocate({group.name: blocks for group in self.programs.groups})
        return executor


def tiny(family: str, **config: Any) -> Tiny:
    """`family` is transformers' prefix (`Llama`); `config` overrides SHAPE."""
    torch.manual_seed(0)
    settings = getattr(transformers, f"{family}Config")(**(SHAPE | config))
    settings._attn_implementation = "eager"
    original = getattr(transformers, f"{family}ForCausalLM")(settings).eval()
    with torch.no_grad():
        for name, parameter in original.named_parameters():  # biases and norms begin as constants, which hides mix-ups
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
            assert torch.isfinite(parameter).all(), name
    state = {name: tensor.detach().numpy() for name, tensor in original.state_dict().items()}
    if settings.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    spec, row = resolve(settings.to_dict() | {"architectures": [f"{family}ForCausalLM"]}, list(state))
    assert isinstance(spec, ModelSpec)
    weights = {name: derive.take(state[derive.source]) for name, derive in row.derive(spec, list(state)).items()}
    return Tiny(original, spec, build(spec), weights)


def step_of(
    programs: ProgramSet, chunks: list[tuple[list[int], int]], sampled: str = "all", blocks_each: int = 8
) -> Step:
    """A step over `chunks` of (tokens, first position); sequence n owns blocks n * blocks_each onwards, in reverse
    order, so that block ids and positions never agree by chance."""
    ids: list[int] = []
    positions: list[int] = []
    sequences: list[int] = []
    lengths: list[int] = []
    rows: list[int] = []
    for n, (tokens, first) in enumerate(chunks):
        ids += tokens
        positions += range(first, first + len(tokens))
        sequences += [n] * len(tokens)
        lengths.append(first + len(tokens))
        rows.append(len(ids) - 1)
    table = np.array(
        [[n * blocks_each + b for b in reversed(range(blocks_each))] for n in range(len(chunks))], np.int32
    )
    assert max(lengths) <= blocks_each * BLOCK_SIZE
    return Step(
        tokens=np.array(ids, np.int32), positions=np.array(positions, np.int32),
        sequences=np.array(sequences, np.int32), lengths=np.array(lengths, np.int32),
        tables={group.name: table for group in programs.groups},
        sampled=np.array(range(len(ids)) if sampled == "all" else rows, np.int32),
        adapters=np.zeros(len(chunks), np.int32),
    )  # fmt: skip


def worst(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """max|a - b| / max|b|."""
    return float(np.abs(a - b).max() / np.abs(b).max())
