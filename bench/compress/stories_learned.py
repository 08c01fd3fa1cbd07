"""The learned targets of issue 5 on stories260K: quantization-aware training against the float model, exported, packed
and scored by the native engine with the protocol `stories`. Trained on teacher text and stories >= 100 alone.

    python -m bench.compress.teacher_text --out build/teacher_text.npz
    python -m bench.compress.stories_learned TARGET [--data build/teacher_text.npz] [--out FOLDER] [--record]

TARGET: one of TARGETS. FOLDER gets `trained.pt` (with --trained FILE only stored and scored) and `model`, the stored
checkpoint, whose tensors' bytes count: matrices in their formats, padding included, norms as f32.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench.compress.results import record
from bench.compress.scoring import score
from bench.compress.teacher_text import as_dataset, model_folder, teacher_text, training_stories
from torch import Tensor

from inhouse.compress.fake_quant import FakeQuant
from inhouse.compress.fit import FitConfig, Fitter, Setup
from inhouse.compress.grids import Grid
from inhouse.compress.objective import CrossEntropy, Response
from inhouse.compress.teacher import LiveTeacher
from inhouse.load.model import LoadedModel, open_model
from inhouse.model.rewrite import quantize_activations
from inhouse.runtime.form import Form
from inhouse.runtime.packed import Packed
from inhouse.runtime.torch_dense import forward
from inhouse.store.stored_model import write_stored
from inhouse.train.data import Dataset

HELD_OUT = 60  # of the training stories, for validation


@dataclass(frozen=True, slots=True)
class Target:
    """A row of the issue's table. `formats`: end of a canonical name -> format, the first that fits; "" the rest."""

    budget: int  # bytes
    goal: float  # perplexity
    formats: Mapping[str, str]
    steps: int
    rate: float


TARGETS: Mapping[str, Target] = {
    "4.5": Target(152_500, 3.60, {"embed.weight": "q6_0", "down.weight": "i4_row", "": "i4_g64"}, 500, 3e-4),
    "5.0": Target(
        169_000, 3.56,
        {"embed.weight": "q6_0", "down.weight": "q5_0", "o.weight": "q5_0", "v.weight": "q5_0", "": "i4_g64"},
        450, 2e-4,
    ),
    "3": Target(
        130_016, 4.20,
        {"embed.weight": "q6_0", "down.weight": "u3_g64", "o.weight": "i4_g64", "v.weight": "i4_g64", "": "u3_g64"},
        230, 5e-4,
    ),
    "2": Target(
        97_512, 8.0, {"embed.weight": "q6_0", "down.weight": "u2_row", "o.weight": "u3_g64", "": "u2_g64"}, 110, 1e-3,
    ),
}  # fmt: skip


def format_for(name: str, formats: Mapping[str, str]) -> str:
    """The format of a matrix."""
    return next(fmt for end, fmt in formats.items() if name.endswith(end))


def float_weights(model: LoadedModel) -> dict[str, Tensor]:
    """Every weight as f32."""
    values = {n: w.dequantize() if isinstance(w, Packed) else np.array(w) for n, w in model.weights.items()}
    return {name: torch.from_numpy(value) for name, value in values.items()}


def mean_squares(
    model: LoadedModel, weights: Mapping[str, Tensor], data: Dataset, count: int = 32
) -> dict[str, Tensor]:
    """Mean square of each linear's inputs over the first sequences of the data, f32 [in]."""
    found: dict[str, Tensor] = {}

    def observe(op: Any, inputs: Any, outputs: Any) -> None:
        if op.kind == "linears":
            for name in op.weights[: len(op.weights) // 2]:
                found[name] = found.get(name, 0.0) + inputs[0].double().square().sum(0)

    constants = {n: torch.from_numpy(a) for n, a in model.plain_programs.constants.items()}
    with torch.no_grad():
        for i in range(count):
            ids = torch.from_numpy(data.ids[data.starts[i] : data.starts[i + 1]].astype(np.int64))[None]
            forward(model.plain_programs.programs["step"], ids, {**weights, **constants}, observe=observe)
    return {name: (total / float(data.starts[count])).float() for name, total in found.items()}


def write(model: LoadedModel, forms: Mapping[str, Form], vectors: Mapping[str, Tensor], folder: Path) -> int:
    """The stored checkpoint; bytes of its tensors."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    files = {path.name: path for path in model_folder().glob("*.json") if path.name != "config.json"}
    plain = ((name, vector.numpy()) for name, vector in vectors.items())
    return write_stored(folder, model.config, forms.items(), plain, {}, files).nbytes


def training_data(model: LoadedModel, path: Path) -> tuple[Dataset, Dataset]:
    """(what is trained on, what is validated on)."""
    stories = training_stories(model.tokenizer)
    held, rest = stories[:HELD_OUT], stories[HELD_OUT:]
    text = teacher_text(path)
    drawn = [text.ids[a:b].tolist() for a, b in zip(text.starts[:-1], text.starts[1:], strict=True)]
    return as_dataset(drawn + rest), as_dataset(held)


def measure(target: Target, given: argparse.Namespace) -> dict[str, Any]:
    """Trains (or takes what was trained), stores, scores."""
    torch.set_num_threads(1)
    model = open_model(str(model_folder()), cache=False, threads=1)
    weights = float_weights(model)
    data, held = training_data(model, given.data)
    squares = mean_squares(model, weights, held)
    hooks = {
        name: FakeQuant(w, Grid(format_for(name, target.formats), w.shape[1]), squares.get(name))
        for name, w in weights.items() if w.dim() == 2
    }  # fmt: skip
    facts: dict[str, Any] = {}
    path = given.out / "trained.pt"
    if given.trained is None:
        facts = train(target, given, model, weights, hooks, data, held)
        given.out.mkdir(parents=True, exist_ok=True)
        torch.save({key: facts.pop(key) for key in ("weights", "extra")}, path)
    trained = torch.load(given.trained or path, weights_only=True)
    with torch.no_grad():
        for name, hook in hooks.items():
            for key, value in hook.parameters().items():
                value.copy_(trained["extra"][f"{name}:{key}"])
    forms = {name: hook.form(trained["weights"][name]) for name, hook in hooks.items()}
    for name, hook in hooks.items():  # what is stored is what was trained, bit for bit
        assert np.array_equal(forms[name].value(), hook(trained["weights"][name]).detach().numpy()), name
    vectors = {name: w for name, w in trained["weights"].items() if name not in hooks}
    size = write(model, forms, vectors, given.out / "model")
    assert size <= target.budget, f"{size} bytes do not fit the budget"
    found = score(given.out / "model")
    return {
        "perplexity": found.perplexity, "kld_mean": found.kld_mean, "top1": found.top1, "goal": target.goal,
        "bytes": size, "budget": target.budget, "reference": found.reference_perplexity, **facts,
    }  # fmt: skip


def train(
    target: Target, given: argparse.Namespace, model: LoadedModel, weights: Mapping[str, Tensor],
    hooks: Mapping[str, FakeQuant], data: Dataset, held: Dataset,
) -> dict[str, Any]:  # fmt: skip
    """Quantization-aware training towards the float model; weights, what the hooks learned, and how long it took."""
    begun, cpu = time.monotonic(), time.process_time()
    config = FitConfig(
        steps=given.steps or target.steps, batch_tokens=given.batch_tokens, learning_rate=given.rate or target.rate,
        warmup=20, validate_every=given.validate_every, extra_rate=given.step_rate,
    )  # fmt: skip
    formats = {name: hook.grid.name for name, hook in hooks.items()}
    rounded = quantize_activations(model.plain_programs, formats).programs["step"]
    fitter = Fitter(
        model.plain_programs, weights, data, config, objective=Response(LiveTeacher(model.plain_programs, weights)),
        setup=Setup(hooks=hooks, program=rounded if given.activations else None), validation=held,
        judge=CrossEntropy(),
    )  # fmt: skip

    def tell(label: str, done: int, total: int) -> None:
        if done % 50 == 0:
            spent = f"{time.monotonic() - begun:.0f} s, {time.process_time() - cpu:.0f} s CPU"
            mean = np.mean(fitter.progress.losses[-50:])
            print(f"{label} {done}/{total} divergence {mean:.4f} {spent}", file=sys.stderr, flush=True)

    result = fitter.run(minutes=given.minutes, progress=tell)
    return {
        "weights": result.weights, "extra": result.extra, "steps": result.steps, "best_step": result.step,
        "held": result.validation, "seconds": round(time.monotonic() - begun, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }  # fmt: skip


def keep(name: str, found: Mapping[str, Any]) -> None:
    """Into docs/compression-results.json."""
    note = f"KL {found['kld_mean']:.4f}, top-1 {found['top1']:.1%}, budget {found['budget']}"
    if "seconds" in found:
        note += f"; {found['steps']} steps, {found['cpu_seconds']:.0f} s CPU of one thread; seconds on a busy machine"
    record({
        "id": f"learned.{name}bit", "what": f"stories260K learned at {name} bits: perplexity of stories 0-39",
        "value": round(found["perplexity"], 4), "goal": f"<= {found['goal']:g}", "bytes": found["bytes"],
        "seconds": found.get("seconds"), "command": f"python -m bench.compress.stories_learned {name}", "note": note,
    })  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--data", type=Path, default=Path("build/teacher_text.npz"))
    parser.add_argument("--steps", type=int, default=0, help="0: the target's own")
    parser.add_argument("--batch-tokens", type=int, default=1536)
    parser.add_argument("--rate", type=float, default=0.0, help="0: the target's own")
    parser.add_argument("--step-rate", type=float, default=0.3)
    parser.add_argument("--activations", action="store_true", help="int8 activations in the forward pass")
    parser.add_argument("--validate-every", type=int, default=500)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--trained", type=Path, help="what an earlier run learned: only store and score it")
    parser.add_argument("--record", action="store_true", help="put the figures into docs/compression-results.json")
    given = parser.parse_args()
    given.out = given.out or Path(f"build/learned-{given.target}")
    found = measure(TARGETS[given.target], given)
    print(json.dumps(found, indent=1))
    if given.record:
        keep(given.target, found)


if __name__ == "__main__":
    main()
