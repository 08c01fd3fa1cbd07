"""Real trained weights: greedy text and perplexity of stories260K against the published figures, all nine files."""

import gzip
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch

from inhouse.core.tensors import TensorSource
from inhouse.model.build import build
from inhouse.model.families.family import Derive
from inhouse.model.families.table import resolve
from inhouse.model.rewrite import quantize_activations
from inhouse.runtime.executor import Weight
from inhouse.runtime.packed import Packed, pack_gguf
from inhouse.runtime.torch_executor import TorchExecutor
from inhouse.store.gguf import open_gguf
from inhouse.store.safetensors import open_safetensors
from tests.runtime_torch.tiny import step_of

pytestmark = [pytest.mark.torch, pytest.mark.realdata]

QUANTIZED = ("BF16", "F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


def _weight(source: TensorSource, derive: Derive) -> Weight:
    info = source.info(derive.source)
    assert info.shape == derive.source_shape
    order = None if derive.order is None else derive.order.index()
    if len(info.shape) == 2:
        return pack_gguf(source.raw(derive.source), info.dtype, (info.shape[0], info.shape[1]), order)
    return np.ascontiguousarray(source.raw(derive.source)).view(np.float32)


def executor_of(stories: Path, file: str) -> TorchExecutor:
    config: Mapping[str, Any]
    if file == "hf":
        source: TensorSource = open_safetensors(stories / "hf" / "model.safetensors")
        config = json.loads((stories / "hf" / "config.json").read_text())
    else:
        source = open_gguf(stories / f"stories260K-{file}.gguf")
        config = source.metadata
    spec, family = resolve(config, list(source))
    weights = {name: _weight(source, d) for name, d in family.derive(spec, list(source)).items()}
    return TorchExecutor(build(spec), weights)


@pytest.fixture(scope="module")
def golden(stories: Path) -> Any:
    return json.loads((stories / "golden.json").read_text())


@pytest.mark.parametrize("file", ["hf", "F32"])
def test_greedy_text_is_the_golden_one(stories: Path, golden: Any, file: str) -> None:
    executor = executor_of(stories, file)
    executor.allocate({"full": 128})
    prompts = [entry["prompt_ids"] for entry in golden["greedy"]]
    outputs: list[list[int]] = [[] for _ in prompts]
    chunks, firsts = list(prompts), [0] * len(prompts)
    for _ in range(max(len(entry["output_ids"]) for entry in golden["greedy"])):  # all prompts in one batch
        step = step_of(executor.programs, list(zip(chunks, firsts, strict=True)), "last", blocks_each=20)
        logits = executor.run("step", step)["logits"]
        for n, row in enumerate(logits):
            firsts[n] += len(chunks[n])
            chunks[n] = [int(row.argmax())]
            outputs[n] += chunks[n]
    for entry, ids in zip(golden["greedy"], outputs, strict=True):
        assert ids[: len(entry["output_ids"])] == entry["output_ids"]


@pytest.fixture(scope="module")
def documents(realdata: Path, stories: Path) -> list[list[int]]:
    """The protocol of golden.json: 40 stories, BOS, the first 256 tokens of each."""
    text = gzip.decompress((realdata / "text" / "tinystories_sample_2MiB.txt.gz").read_bytes()).decode()
    tokenizer = tokenizers.Tokenizer.from_file(str(stories / "hf" / "tokenizer.json"))
    parts = [part.strip() for part in text.split("<|endoftext|>")][:40]
    return [[1, *tokenizer.encode(part, add_special_tokens=False).ids][:256] for part in parts]


def perplexity(executor: TorchExecutor, documents: list[list[int]]) -> tuple[float, int]:
    total, count = 0.0, 0
    for begin in range(0, len(documents), 8):
        batch = documents[begin : begin + 8]
        width = max(map(len, batch))
        tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids in batch])
        with torch.no_grad():
            scores = executor.forward("step", tokens)["logits"].log_softmax(-1)
        for ids, rows in zip(batch, scores, strict=True):
            picked = rows[: len(ids) - 1].gather(1, torch.tensor(ids[1:])[:, None])
            total, count = total - float(picked.double().sum()), count + len(ids) - 1
    return math.exp(total / count), count


@pytest.mark.parametrize("file", ["hf", "F32", *QUANTIZED])
def test_perplexity_is_the_published_one(stories: Path, golden: Any, documents: list[list[int]], file: str) -> None:
    measured, count = perplexity(executor_of(stories, file), documents)
    published = golden["perplexity"]["files"]["stories260K-F32.gguf" if file == "hf" else f"stories260K-{file}.gguf"]
    assert count == golden["perplexity"]["tokens_scored"]
    assert measured == pytest.approx(published, rel=1e-4)


def test_eight_bit_activations_cost_little(stories: Path, documents: list[list[int]]) -> None:
    floats = executor_of(stories, "Q8_0")
    source = open_gguf(stories / "stories260K-Q8_0.gguf")
    spec, family = resolve(source.metadata, list(source))
    weights = {name: _weight(source, d) for name, d in family.derive(spec, list(source)).items()}
    formats = {name: w.format for name, w in weights.items() if isinstance(w, Packed)}
    integers = TorchExecutor(quantize_activations(build(spec), formats), weights)
    before, after = perplexity(floats, documents[:12])[0], perplexity(integers, documents[:12])[0]
    assert after == pytest.approx(before, rel=0.01)
    assert after != before
