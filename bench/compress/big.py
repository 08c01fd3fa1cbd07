"""A Llama-3.2-1B shape made on the spot, for what a toy cannot show: memory and time of a calibrated run.

    python -m bench.compress.big make FOLDER [--layers 16] [--width 2048] [--spread 3] [--seed 0]
    inhouse compress FOLDER big --recipe FOLDER/recipe.yaml --ram 3GB --threads 2 --json
    python -m bench.compress.big check FOLDER big [--tokens 2048]
    python -m bench.compress.big sharpness [--width 256] [--layers 4] [--record]

The weights are random, but what they meet is not: rows of the embedding lie near a space of a sixteenth of its width,
so that inputs are correlated, and the gains of norms lift a few channels to ten times the others (outliers). The last
norm is scaled so that logits spread by `--spread` nats (standard deviation). With 0 it is left as it is drawn: then
they spread by tens of nats, every next token is as good as certain, and a small error costs tens of nats wherever it
changes which one is first; `sharpness` measures that on a small shape. The tokenizer is GPT-2's. `check` is no part of
the pipeline: it opens both checkpoints, runs the float model to the first, middle and last block, and compares what
the block makes of the same inputs with stored and with plainly rounded weights.
"""

import argparse
import gzip
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from bench.compress.results import record
from bench.compress.teacher_text import realdata
from torch import Tensor

from inhouse.compress.cut import blocks
from inhouse.compress.evaluate import evaluate
from inhouse.compress.grids import Grid
from inhouse.compress.pipeline import compress
from inhouse.compress.recipe import parse_recipe
from inhouse.compress.work import Work
from inhouse.core.settings import load_settings
from inhouse.core.tensors import TensorInfo
from inhouse.engine.session import Session
from inhouse.runtime.packed_pack import narrow_bf16
from inhouse.runtime.torch_dense import DenseRows
from inhouse.runtime.torch_program import evaluate_ops
from inhouse.store.home import Home
from inhouse.store.safetensors import write_safetensors
from inhouse.store.store import Store
from inhouse.store.writing import TensorData

WIDTH, LAYERS, HEAD_DIM = 2048, 16, 64
OUTLIERS, LIFT = 12, 10.0
EMBEDDED, SPREAD = 0.5, 3.0  # size of an embedding's values; standard deviation of logits, nats
ROWS, LENGTH = 32, 1024  # 32,768 calibration tokens
FORMAT = "q4_0"


@dataclass(frozen=True, slots=True)
class Shape:
    """Llama-3.2-1B's, or one of another width and depth with its proportions."""

    layers: int = LAYERS
    hidden: int = WIDTH
    spread: float = SPREAD  # 0: as it is drawn
    seed: int = 0

    @property
    def ffn(self) -> int:
        return 4 * self.hidden

    @property
    def heads(self) -> int:
        return self.hidden // HEAD_DIM

    @property
    def kv_heads(self) -> int:
        return self.heads // 4

    @property
    def vocab(self) -> int:
        return 128256 if self.hidden == WIDTH else 50304  # what a smaller one needs for the tokenizer


def config(shape: Shape) -> dict[str, Any]:
    """config.json of Llama-3.2-1B, in that shape."""
    rope = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "head_dim": HEAD_DIM, "vocab_size": shape.vocab,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "rope_scaling": rope, "tie_word_embeddings": True, "hidden_act": "silu", "torch_dtype": "bfloat16",
        "bos_token_id": 50256, "eos_token_id": 50256,
    }  # fmt: skip


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...], Callable[[], npt.NDArray[np.float32]]]]:
    """(name, shape, values) of every tensor."""
    hidden, low_width = shape.hidden, shape.hidden // 16

    def rng(name: str) -> np.random.Generator:
        return np.random.default_rng([shape.seed, *name.encode()])

    def matrix(name: str, rows: int, columns: int) -> tuple[str, tuple[int, ...], Callable[[], Any]]:
        return name, (rows, columns), lambda: rng(name).standard_normal((rows, columns), np.float32) / columns**0.5

    def embedding() -> npt.NDArray[np.float32]:
        draw = rng("embedding")
        low = draw.standard_normal((low_width, hidden), np.float32) / low_width**0.5
        out = np.empty((shape.vocab, hidden), np.float32)
        for start in range(0, shape.vocab, 8192):
            part = out[start : start + 8192]
            part[:] = draw.standard_normal((len(part), low_width), np.float32) @ low
            part += 0.25 * draw.standard_normal(part.shape, np.float32)
        return out * np.float32(EMBEDDED)

    def gain(name: str, spread: float = 0.0) -> tuple[str, tuple[int, ...], Callable[[], Any]]:
        def values() -> npt.NDArray[np.float32]:
            out = rng(name).uniform(0.5, 1.5, hidden).astype(np.float32)
            out[np.random.default_rng(shape.seed).permutation(hidden)[:OUTLIERS]] *= LIFT
            if spread:  # logits of a normed vector that is independent of the embeddings spread by this much
                out *= np.float32(spread / (EMBEDDED * float(np.linalg.norm(out))))
            return out

        return name, (hidden,), values

    yield "model.embed_tokens.weight", (shape.vocab, hidden), embedding
    for i in range(shape.layers):
        layer = f"model.layers.{i}"
        attention = (("q", shape.heads * HEAD_DIM), ("k", shape.kv_heads * HEAD_DIM),
                     ("v", shape.kv_heads * HEAD_DIM), ("o", hidden))  # fmt: skip
        for part, rows in attention:
            yield matrix(f"{layer}.self_attn.{part}_proj.weight", rows, hidden)
        for part, rows, columns in (
            ("gate", shape.ffn, hidden),
            ("up", shape.ffn, hidden),
            ("down", hidden, shape.ffn),
        ):
            yield matrix(f"{layer}.mlp.{part}_proj.weight", rows, columns)
        yield gain(f"{layer}.input_layernorm.weight")
        yield gain(f"{layer}.post_attention_layernorm.weight")
    yield gain("model.norm.weight", shape.spread)


def make(folder: Path, shape: Shape) -> None:
    """Writes model, tokenizer, calibration text and recipe."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config(shape)))
    place = realdata() / "tokenizers" / "gpt2"
    (folder / "merges.txt").write_bytes((place / "merges.txt").read_bytes())
    (folder / "vocab.json").write_bytes(gzip.decompress((place / "vocab.json.gz").read_bytes()))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    text = gzip.decompress((realdata() / "text" / "wikitext-2.valid.txt.gz").read_bytes())
    (folder / "calibration.txt").write_bytes(text)

    def entry(name: str, size: tuple[int, ...], values: Callable[[], npt.NDArray[np.float32]]) -> TensorData:
        info = TensorInfo(name, "BF16", size, 2 * int(np.prod(size)))
        return TensorData(info, lambda: narrow_bf16(values()).reshape(-1).view(np.uint8))

    write_safetensors(folder / "model.safetensors", [entry(*one) for one in tensors(shape)], {"format": "pt"})
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


KINDS: dict[str, list[dict[str, Any]]] = {
    "q8_0, rounded": [{"quantize": {"method": "round", "format": "q8_0"}}],
    "q4_0, rounded": [{"quantize": {"method": "round", "format": FORMAT,
                                    "overrides": {"embed.weight": {"method": "round", "format": "q6_0"}}}}],
    "q4_0, GPTQ": [{"quantize": {"method": "gptq", "format": FORMAT,
                                 "overrides": {"embed.weight": {"method": "rtn", "format": "q6_0"}}}}],
}  # fmt: skip


def sharpness(layers: int, width: int, scratch: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Spread of the logits -> kind of codes -> divergence from the float model: on Wikipedia text, and on text that
    the float model wrote; perplexity of the float model on both."""
    text = gzip.decompress((realdata() / "text" / "wikitext-2.test.txt.gz").read_bytes()).decode()[:12_000]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for label, spread in (("as drawn", 0.0), (f"{SPREAD:g} nats", SPREAD)):
        folder, home = scratch / f"model-{spread:g}", Home(scratch / f"home-{spread:g}", scratch / "cache")
        make(folder, Shape(layers, width, spread))
        found[label] = {}
        for number, (kind, stages) in enumerate(KINDS.items()):
            calibration = {"texts": [str(folder / "calibration.txt")], "samples": 16, "length": 512}
            recipe = {"calibration": calibration, "stages": stages, "gates": {"final": "none"}}
            done = compress(str(folder), f"kind-{number}", parse_recipe(recipe), home=home)
            with Store(home) as store:
                place = store.folder(store.catalog.resolve(done.ref))
            found[label][kind] = _divergence(folder, place, text) | _own(done.result["gate"])
    return found


def _divergence(folder: Path, stored: Path, text: str) -> dict[str, float]:
    settings = load_settings({"threads": 1, "max_sequences": 1})
    with Session.open(str(stored), settings, cache=False) as one, Session.open(str(folder), settings) as other:
        made = evaluate(one, text, "window:256", other)
    return {"kld": made.kld_mean or 0.0, "top1": made.top1 or 0.0, "float_perplexity": made.reference_perplexity or 0.0}


def _own(judged: Mapping[str, Any]) -> dict[str, float]:
    return {f"own_{key}": judged[name] for key, name in
            (("kld", "kld_mean"), ("top1", "top1"), ("float_perplexity", "reference_perplexity"))}  # fmt: skip


def save(found: Mapping[str, Mapping[str, Mapping[str, float]]], given: argparse.Namespace) -> None:
    for label, kinds in found.items():
        first = next(iter(kinds.values()))
        record({
            "id": f"big/sharpness-{label.split()[0]}",
            "what": f"the same recipe of random weights, {given.layers} layers of width {given.width}, logits {label}: "
            "KL to the float model, nats a token, on Wikipedia text (on text that the model wrote)",
            "value": {kind: f"{one['kld']:.4f} ({one['own_kld']:.4f})" for kind, one in kinds.items()},
            "command": f"python -m bench.compress.big sharpness --width {given.width} --layers {given.layers}",
            "note": f"float model's perplexity {first['float_perplexity']:.4g} ({first['own_float_perplexity']:.4g}); "
            "top-1 equal " + ", ".join(f"{one['top1']:.1%} ({one['own_top1']:.1%})" for one in kinds.values()),
        })  # fmt: skip


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["make", "check", "sharpness"])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("reference", nargs="?", default="big")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--spread", type=float, default=SPREAD)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--scratch", type=Path, default=Path("build/big-check"))
    given = parser.parse_args()
    if given.action == "sharpness":
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as scratch:
            found = sharpness(given.layers, given.width, Path(scratch))
        print(json.dumps(found, indent=1))
        if given.record:
            save(found, given)
    elif given.folder is None:
        parser.error(f"{given.action} needs a folder")
    elif given.action == "make":
        make(given.folder.resolve(), Shape(given.layers, given.width, given.spread, given.seed))
    else:
        print(json.dumps(check(given.folder, given.reference, given.tokens, given.scratch), indent=1))


if __name__ == "__main__":
    main()
