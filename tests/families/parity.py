"""The parity harness: one tiny random model as its original runs it and as we do, from its files on disk.

`check_parity` is what a decoder family's tests call; encoders and encoder-decoders use the pieces
(`transformers_oracle`, `open_tiny`, `worst`, `record`). Where transformers has no such model, the test brings an Oracle
of its own.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors.numpy import save_file

from inhouse.load.bind import bind, plan_binding
from inhouse.load.describe import describe
from inhouse.model.build import Spec, build
from inhouse.model.rewrite import order_columns, quantize_activations
from inhouse.runtime import executors
from inhouse.runtime.executor import Executor, Weight
from inhouse.runtime.program import ProgramSet
from inhouse.runtime.step import BLOCK_SIZE, Step

F32 = NDArray[np.float32]
EXECUTORS = ("native", "torch")
TOLERANCE = 1e-4  # of f32 logits: max|a - b| / max|b|
PROMPT = (3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32, 79, 50, 28, 84, 19, 71, 69, 39, 93, 75, 10, 58)
OTHER = (27, 18, 28, 18, 28, 45, 90, 45, 23, 53, 60)
GREEDY = 12  # tokens
RESULTS = "INHOUSE_PARITY_RESULTS"  # environment: the file that `record` appends to


class Oracle(Protocol):
    """The original."""

    def save(self, folder: Path) -> None:
        """Writes config.json and weights as its publisher does."""

    def logits(self, tokens: Sequence[int]) -> F32:
        """float32 [len(tokens), vocab]: of a whole sequence, computed at once."""


@dataclass(frozen=True)
class TransformersOracle:
    """A model of transformers. `architecture`: what its config.json says, where that is another's name (Yi)."""

    model: Any
    architecture: str = ""

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        if self.architecture:
            config = json.loads((folder / "config.json").read_text()) | {"architectures": [self.architecture]}
            (folder / "config.json").write_text(json.dumps(config))

    def logits(self, tokens: Sequence[int]) -> F32:
        with torch.no_grad():
            return np.asarray(self.model(torch.tensor([list(tokens)])).logits[0].float().numpy())


@dataclass(frozen=True)
class SlowOracle:
    """A reference written in a test from the published description, for models that transformers does not have.

    `forward(state, tokens)` takes float32 tensors by the checkpoint's names and gives logits [len(tokens), vocab]."""

    config: Mapping[str, Any]
    state: Mapping[str, torch.Tensor]
    forward: Any

    def save(self, folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(dict(self.config)))
        save_file({name: tensor.numpy() for name, tensor in self.state.items()}, folder / "model.safetensors")

    def logits(self, tokens: Sequence[int]) -> F32:
        with torch.no_grad():
            return np.asarray(self.forward(self.state, torch.tensor(list(tokens))).numpy())


def random_state(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors: matrices around 0, vectors called `norm` or `ln` around 1, other vectors around 0."""
    draw = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        one = name.endswith("weight") and len(shape) == 1
        state[name] = torch.randn(shape, generator=draw) * (0.2 if len(shape) == 1 else 0.3) + float(one)
    return state


def transformers_oracle(
    model: str, config: str, settings: Mapping[str, Any], attention: str = "eager", **more: str
) -> TransformersOracle:
    """A random model of the class `model` with the config class `config`; vectors are moved off the constants that they
    begin as, which hide mix-ups. `attention`: which of its implementations runs."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    made = getattr(transformers, config)(**settings)
    made._attn_implementation = attention
    original = getattr(transformers, model)(made).eval()
    with torch.no_grad():
        for parameter in original.parameters():
            noise = torch.randn(parameter.shape)
            if parameter.dim() == 1:
                parameter.add_(noise * 0.2)
            else:
                parameter.copy_(noise * 0.3)
    return TransformersOracle(original, **more)


@dataclass(frozen=True)
class Tiny:
    """A checkpoint as loading makes it, without its tokenizer."""

    spec: Spec
    family: str
    format: str  # as the table of models calls it
    programs: ProgramSet
    weights: Mapping[str, Weight]

    def executor(self, name: str, blocks: int = 64) -> Executor:
        """An executor with that many blocks in every state group, K and V in f32."""
        made = executors.create(name, self.programs, self.weights, kv_dtype="f32", threads=1)
        made.allocate({group.name: blocks for group in self.programs.groups})
        return made


def open_tiny(
    path: Path,
    *,
    quantize: str | None = None,
    fmt: str = "safetensors",
    context: int | None = None,
    activations: str = "int8",
) -> Tiny:
    """The model at `path` (folder or GGUF file), described, bound and packed as `open_model` does it."""
    described = describe(path, context)
    programs = build(described.spec)
    plan = plan_binding(described.source, described.spec, described.family, programs, quantize)
    programs = order_columns(programs, plan.columns)
    weights = {part.spec.name: weight for part, weight in bind(described.source, plan, threads=1)}
    described.source.close()
    run = programs if activations == "float" else quantize_activations(programs, plan.formats)
    return Tiny(described.spec, described.family.name, fmt, run, weights)


def check_parity(
    oracle: Oracle,
    folder: Path,
    family: str,
    *,
    case: str = "",
    prefix: int = 0,
    context: int | None = None,
    prompt: Sequence[int] = PROMPT,
    tolerance: float = TOLERANCE,
) -> Tiny:
    """Saves the original, opens it and holds both executors to it: logits, greedy ids, batched as alone (bit for bit on
    the native executor). `prefix`: positions of the prompts that see one another. Returns what was opened."""
    oracle.save(folder)
    tiny = open_tiny(folder, context=context)
    assert tiny.family == family
    compare(tiny, oracle, case=case, prefix=prefix, prompt=prompt, tolerance=tolerance)
    return tiny


def compare(
    tiny: Tiny,
    oracle: Oracle,
    *,
    case: str = "",
    prefix: int = 0,
    prompt: Sequence[int] = PROMPT,
    tolerance: float = TOLERANCE,
    names: Sequence[str] = EXECUTORS,
) -> None:
    """Holds an opened model to its original, on each executor."""
    wanted, ids = oracle.logits(prompt), greedy(oracle, prompt)
    for name in names:
        executor = tiny.executor(name)
        ours = run(executor, [(prompt, 0, prefix)])
        error = worst(ours, wanted)
        assert error < tolerance, f"{name}: logits are off by {error:.2e}"
        assert greedy_ids(executor, ours[-1], prompt, len(ids), prefix) == ids, name
        check_batched(executor, ours, prompt, prefix)
        executor.close()
        record(tiny.family, case, tiny.format, name, error)


def greedy(oracle: Oracle, prompt: Sequence[int]) -> list[int]:
    """What the original says next, token by token."""
    tokens = list(prompt)
    for _ in range(GREEDY):
        tokens.append(int(oracle.logits(tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def greedy_ids(executor: Executor, first: F32, prompt: Sequence[int], count: int, prefix: int) -> list[int]:
    """What we say next, from the cache that the prompt left in the first sequence's blocks."""
    ids = [int(first.argmax())]
    for i in range(count - 1):
        logits = run(executor, [((ids[-1],), len(prompt) + i, prefix)])
        ids.append(int(logits[0].argmax()))
    return ids


def check_batched(executor: Executor, alone: F32, prompt: Sequence[int], prefix: int = 0) -> None:
    """The prompt among strangers, and in two chunks where the model may be cut, against the prompt alone."""
    if all(group.chunkable for group in executor.programs.groups):
        cut = len(prompt) // 2
        first = run(executor, [(OTHER[:4], 0, 0), (prompt[:cut], 0, 0), ((7,), 0, 0)])
        second = run(executor, [(OTHER[4:], 4, 0), (prompt[cut:], cut, 0), ((8,), 1, 0)])
        rest = len(OTHER) - 4
        together = np.concatenate([first[4 : 4 + cut], second[rest : rest + len(prompt) - cut]])
    else:
        whole = run(executor, [(OTHER, 0, 2), (prompt, 0, prefix), ((7,), 0, 0)])
        together = whole[len(OTHER) : len(OTHER) + len(prompt)]
    if executor.name.startswith("native"):
        assert np.array_equal(together, alone), "batched bits differ from those alone"
    else:
        assert worst(together, alone) < 1e-5


def run(executor: Executor, chunks: Sequence[tuple[Sequence[int], int, int]]) -> F32:
    """Logits of every row of a step over `chunks` of (tokens, first position, prefix); [rows, vocab]."""
    return np.array(executor.run("step", step_of(executor.programs, chunks))["logits"])


def step_of(programs: ProgramSet, chunks: Sequence[tuple[Sequence[int], int, int]], blocks_each: int = 16) -> Step:
    """A step over `chunks` of (tokens, first position, prefix), every row sampled. Sequence n owns `blocks_each` blocks
    from n * blocks_each on, in reverse order, so that block ids and positions never agree by chance."""
    lengths = [first + len(tokens) for tokens, first, _ in chunks]
    assert max(lengths) <= blocks_each * BLOCK_SIZE
    ids = [token for tokens, _, _ in chunks for token in tokens]
    places = [first + i for tokens, first, _ in chunks for i in range(len(tokens))]
    table = np.array(
        [[n * blocks_each + b for b in reversed(range(blocks_each))] for n in range(len(chunks))], np.int32
    )
    step = Step(
        tokens=np.array(ids, np.int32),
        positions=np.array(places, np.int32),
        sequences=np.repeat(np.arange(len(chunks)), [len(tokens) for tokens, _, _ in chunks]).astype(np.int32),
        lengths=np.array(lengths, np.int32),
        tables={group.name: table for group in programs.groups},
        sampled=np.arange(len(ids), dtype=np.int32), adapters=np.zeros(len(chunks), np.int32),
    )  # fmt: skip
    return replace(step, prefixes=np.array([prefix for _, _, prefix in chunks], np.int32))


def worst(a: F32, b: F32) -> float:
    """max|a - b| / max|b|; infinite where either is not finite."""
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    return float(np.abs(a - b).max() / np.abs(b).max())


def record(family: str, case: str, fmt: str, executor: str, error: float) -> None:
    """Adds one measurement to the file that the environment names, from which tools/models_table.py makes
    docs/models.md. `executor`: `native` or `torch`; `case`: what is special in this model, "" for the plain one."""
    path = os.environ.get(RESULTS)
    if path:
        line = {"family": family, "case": case, "format": fmt, "executor": executor, "error": error}
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
