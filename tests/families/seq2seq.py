"""Tiny random encoder-decoders: the Hugging Face original, its saved folder, and steps over both Programs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from inhouse.runtime.step import Step

T5: dict[str, Any] = {
    "vocab_size": 97, "d_model": 48, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": 97, "d_model": 48, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 6, "encoder_ffn_dim": 64, "decoder_ffn_dim": 80, "max_position_embeddings": 64,
    "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
MARIAN = BART | {
    "activation_function": "swish", "pad_token_id": 96, "decoder_start_token_id": 96, "eos_token_id": 0,
    "bos_token_id": 1, "forced_eos_token_id": 0, "scale_embedding": True,
}  # fmt: skip
UNTIED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}

# name -> (class of the model, class of the config, config, whether the head is its own)
CASES: dict[str, tuple[str, str, dict[str, Any], bool]] = {
    "t5": ("T5ForConditionalGeneration", "T5Config", T5, False),
    "flan-t5": ("T5ForConditionalGeneration", "T5Config", T5 | UNTIED, True),
    "mt5": ("MT5ForConditionalGeneration", "MT5Config", T5 | {"tie_word_embeddings": False}, True),
    "umt5": ("UMT5ForConditionalGeneration", "UMT5Config", T5, False),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART | {"scale_embedding": True}, False),
    "mbart": ("MBartForConditionalGeneration", "MBartConfig", BART, False),
    "m2m100": ("M2M100ForConditionalGeneration", "M2M100Config", BART, False),
    "marian": ("MarianMTModel", "MarianConfig", MARIAN, False),
    "marian-two-tables": ("MarianMTModel", "MarianConfig", MARIAN | {"share_encoder_decoder_embeddings": False}, False),
}


@dataclass(frozen=True)
class Pair:
    """A random model as transformers runs it, and the folder it was saved to."""

    original: Any
    folder: Path


def save_tiny(name: str, folder: Path, scale: float = 0.2, **changes: Any) -> Pair:
    """Makes and saves a case; every parameter is random, so that no two can be mixed up unseen."""
    torch.manual_seed(0)
    kind, config, settings, own_head = CASES[name]
    made = getattr(transformers, config)(**(settings | changes))
    made._attn_implementation = "eager"
    model = getattr(transformers, kind)(made).eval()
    with torch.no_grad():
        if own_head:
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
        for label, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
            elif parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * scale)
            assert torch.isfinite(parameter).all(), label
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.copy_(torch.randn(model.final_logits_bias.shape))
    model.save_pretrained(folder)
    return Pair(model, folder)


def logits_of(pair: Pair, source: list[int], target: list[int]) -> NDArray[np.float32]:
    """What transformers computes for the decoder's tokens, float32 [len(target), vocab]."""
    with torch.no_grad():
        out = pair.original(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([target]))
    array: NDArray[np.float32] = out.logits[0].numpy()
    return array


def step_over(chunks: list[tuple[list[int], int]], tables: dict[str, Any], read: list[int] | None = None) -> Step:
    """A step over (tokens, first position) with all rows sampled; `read`: encoder lengths."""
    rows = [(n, first + i, token) for n, (tokens, first) in enumerate(chunks) for i, token in enumerate(tokens)]
    sequences, positions, ids = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    return Step(
        tokens=ids, positions=positions, sequences=sequences,
        lengths=np.array([first + len(tokens) for tokens, first in chunks], np.int32), tables=tables,
        sampled=np.arange(len(rows), dtype=np.int32), adapters=np.zeros(len(chunks), np.int32),
        encoder_lengths=np.array(read or [0] * len(chunks), np.int32),
    )  # fmt: skip
