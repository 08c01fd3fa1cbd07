"""A Llama-3.2-1B shape made on the spot, for what a toy cannot show: memory and time of a calibrated run.

    python -m bench.compress.big make FOLDER [--layers 16] [--seed 0]
    inhouse compress FOLDER big --recipe FOLDER/recipe.yaml --ram 3GB --threads 2 --json
    python -m bench.compress.big check FOLDER big [--tokens 2048]

The weights are random, but what they meet is not: rows of the embedding lie near a space of a sixteenth of its width,
so that inputs are correlated, and the gains of norms lift a few channels to ten times the others (outliers). The
tokenizer is GPT-2's. `check` is no part of the pipeline: it opens both checkpoints, runs the float model to the first,
middle and last block, and compares what the block makes of the same inputs with stored and with plainly rounded
weights.
"""

import argparse
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from bench.compress.teacher_text import realdata
from torch import Tensor

from inhouse.compress.cut import blocks
from inhouse.compress.grids import Grid
from inhouse.compress.work import Work
from inhouse.core.tensors import TensorInfo
from inhouse.runtime.packed_pack import narrow_bf16
from inhouse.runtime.torch_dense import DenseRows
from inhouse.runtime.torch_program import evaluate_ops
from inhouse.store.safetensors import write_safetensors
from inhouse.store.writing import TensorData

HIDDEN, FFN, HEADS, KV, HEAD_DIM, VOCAB = 2048, 8192, 32, 8, 64, 128256
OUTLIERS, LIFT = 12, 10.0
ROWS, LENGTH = 32, 1024  # 32,768 calibration tokens
FORMAT = "q4_0"


def config(layers: int) -> dict[str, Any]:
    """config.json of Llama-3.2-1B, with that many layers."""
    rope = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": FFN,
        "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": KV, "head_dim": HEAD_DIM,
        "vocab_size": VOCAB, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "rope_scaling": rope, "tie_word_embeddings": True, "hidden_act": "silu", "torch_dtype": "bfloat16",
        "bos_token_id": 50256, "eos_token_id": 50256,
    }  # fmt: skip


def tensors(layers: int, seed: int) -> Iterator[tuple[str, tuple[int, ...], Callable[[], npt.NDArray[np.float32]]]]:
    """(name, shape, values) of every tensor."""

    def rng(name: str) -> np.random.Generator:
        return np.random.default_rng([seed, *name.encode()])

    def matrix(name: str, rows: int, columns: int) -> tuple[str, tuple[int, ...], Callable[[], Any]]:
        return name, (rows, columns), lambda: rng(name).standard_normal((rows, columns), np.float32) / columns**0.5

    def embedding() -> npt.NDArray[np.float32]:
        draw = rng("embedding")
        low = draw.standard_normal((HIDDEN // 16, HIDDEN), np.float32) / (HIDDEN // 16) ** 0.5
        out = np.empty((VOCAB, HIDDEN), np.float32)
        for start in range(0, VOCAB, 8192):
            part = out[start : start + 8192]
            part[:] = draw.standard_normal((len(part), HIDDEN // 16), np.float32) @ low
            part += 0.25 * draw.standard_normal(part.shape, np.float32)
        return out * np.float32(0.5)

    def gain(name: str) -> tuple[str, tuple[int, ...], Callable[[], Any]]:
        def values() -> npt.NDArray[np.float32]:
            out = rng(name).uniform(0.5, 1.5, HIDDEN).astype(np.float32)
            out[np.random.default_rng(seed).permutation(HIDDEN)[:OUTLIERS]] *= LIFT
            return out

        return name, (HIDDEN,), values

    yield "model.embed_tokens.weight", (VOCAB, HIDDEN), embedding
    for i in range(layers):
        layer = f"model.layers.{i}"
        for part, rows in (("q", HEADS * HEAD_DIM), ("k", KV * HEAD_DIM), ("v", KV * HEAD_DIM), ("o", HIDDEN)):
            yield matrix(f"{layer}.self_attn.{part}_proj.weight", rows, HIDDEN)
        for part, rows, columns in (("gate", FFN, HIDDEN), ("up", FFN, HIDDEN), ("down", HIDDEN, FFN)):
            yield matrix(f"{layer}.mlp.{part}_proj.weight", rows, columns)
        yield gain(f"{layer}.input_layernorm.weight")
        yield gain(f"{layer}.post_attention_layernorm.weight")
    yield gain("model.norm.weight")


def make(folder: Path, layers: int, seed: int) -> None:
    """Writes model, tokenizer, calibration text and recipe."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config(layers)))
    place = realdata() / "tokenizers" / "gpt2"
    (folder / "merges.txt").write_bytes((place / "merges.txt").read_bytes())
    (folder / "vocab.json").write_bytes(gzip.decompress((place / "vocab.json.gz").read_bytes()))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    text = gzip.decompress((realdata() / "text" / "wikitext-2.valid.txt.gz").read_bytes())
    (folder / "calibration.txt").write_bytes(text)

    def entry(name: str, shape: tuple[int, ...], values: Callable[[], npt.NDArray[np.float32]]) -> TensorData:
        info = TensorInfo(name, "BF16", shape, 2 * int(np.prod(shape)))
        return TensorData(info, lambda: narrow_bf16(values()).reshape(-1).view(np.uint8))

    write_safetensors(folder / "model.safetensors", [entry(*one) for one in tensors(layers, seed)], {"format": "pt"})
    (folder / "recipe.yaml").write_text(
        f"calibration: {{texts: [{folder / 'calibration.txt'}], samples: {ROWS}, length: {LENGTH}}}\n"
        f"stages:\n  - quantize: {{method: gptq, format: {FORMAT}, overrides: "
        "{embed.weight: {method: rtn, format: q6_0}}}\n"
    )


def check(folder: Path, reference: str, tokens: int, scratch: Path) -> dict[str, dict[str, float]]:
    """Block -> output error of stored and of rounded weights, each over the output of the float block, and their
    ratio."""
    with Work.open(str(folder), scratch / "float") as model, Work.open(reference, scratch / "stored") as stored:
        text = gzip.decompress((realdata() / "text" / "wikitext-2.test.txt.gz").read_bytes()).decode()
        ids = torch.tensor([model.tokenizer.encode(text[: 8 * tokens], add_special=False)[:tokens]])
        pieces = blocks(model.program)
        layers = [piece.layer for piece in pieces if piece.layer >= 0]
        chosen = {layers[0], layers[len(layers) // 2], layers[-1]}
        values: dict[int, Tensor] = {}
        found: dict[str, dict[str, float]] = {}
        rows = DenseRows(ids, None, None, None)
        for piece in pieces:
            names = [name for op in piece.ops for name in op.weights if name in model.programs.weights]
            if piece.layer > layers[-1] or (piece.layer < 0 and found):
                break
            with torch.no_grad():
                made = _run(piece, values, rows, {name: model.value(name) for name in names} | model.constants())
                if piece.layer in chosen:
                    ours = _run(piece, values, rows, {name: stored.value(name) for name in names} | model.constants())
                    plain = {name: _rounded(model.value(name)) for name in names} | model.constants()
                    found[f"block {piece.layer}"] = _errors(made, ours, _run(piece, values, rows, plain))
            values |= made
    return found


def _run(piece: Any, values: dict[int, Tensor], rows: DenseRows, weights: dict[str, Tensor]) -> dict[int, Tensor]:
    given = {value: values[value] for value in piece.given}
    return dict(evaluate_ops(piece.ops, given, piece.kept, weights, rows))  # type: ignore[arg-type]


def _rounded(value: Tensor) -> Tensor:
    if value.dim() < 2:
        return value
    return torch.from_numpy(Grid(FORMAT, value.shape[1]).quantize(value).dequantize())


def _errors(made: dict[int, Tensor], ours: dict[int, Tensor], plain: dict[int, Tensor]) -> dict[str, float]:
    (key,) = made
    true, size = made[key], float(made[key].norm())
    mine, theirs = float((ours[key] - true).norm()) / size, float((plain[key] - true).norm()) / size
    return {"stored": mine, "rounded": theirs, "ratio": mine / theirs}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["make", "check"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("reference", nargs="?", default="big")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--scratch", type=Path, default=Path("build/big-check"))
    given = parser.parse_args()
    if given.action == "make":
        make(given.folder.resolve(), given.layers, given.seed)
    else:
        print(json.dumps(check(given.folder, given.reference, given.tokens, given.scratch), indent=1))


if __name__ == "__main__":
    main()
