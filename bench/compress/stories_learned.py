"""The learned targets of issue 5 on stories260K: quantization-aware training against the float model, exported, packed
and scored by the native engine with the protocol `stories`. Trained on teacher text and stories >= 100 alone.

    python -m bench.compress.stories_learned TARGET [--data build/teacher_text.npz] [--steps N] [--out FOLDER]

TARGET: one of TARGETS. Bytes are all tensors as stored: matrices in their formats, padding included, norms as f32.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench.compress.teacher_text import as_dataset, model_folder, sample_stories, teacher_text, training_stories
from torch import Tensor

from inhouse.compress.evaluate import SEPARATOR, Evaluation, evaluate
from inhouse.compress.fake_quant import FakeQuant
from inhouse.compress.fit import FitConfig, Fitter, Setup
from inhouse.compress.grids import Grid
from inhouse.compress.objective import CrossEntropy, Mix, Objective, Response
from inhouse.compress.teacher import LiveTeacher
from inhouse.engine.session import Session
from inhouse.load.model import LoadedModel, open_model
from inhouse.model.rewrite import quantize_activations
from inhouse.runtime import executors
from inhouse.runtime.executor import Weight
from inhouse.runtime.form import Form
from inhouse.runtime.packed import Packed
from inhouse.runtime.torch_dense import forward
from inhouse.train.data import Dataset

HELD_OUT = 60  # of the training stories, for validation
REFERENCE = 3.4481


@dataclass(frozen=True, slots=True)
class Target:
    """A row of the issue's table. `formats`: end of a canonical name -> format, the first that fits; "" the rest."""

    budget: int  # bytes
    goal: float  # perplexity
    formats: Mapping[str, str]
    rate: float = 1e-3


TARGETS: Mapping[str, Target] = {
    "4.5": Target(152_500, 3.60, {"embed.weight": "q6_0", "down.weight": "i4_row", "": "i4_g64"}),
    "5.0": Target(
        169_000, 3.56,
        {"embed.weight": "q6_0", "down.weight": "q5_0", "o.weight": "q5_0", "v.weight": "q5_0", "": "i4_g64"},
    ),
    "3": Target(
        130_016, 4.20,
        {"embed.weight": "q6_0", "down.weight": "u3_g64", "o.weight": "i4_g64", "v.weight": "i4_g64", "": "u3_g64"},
        2e-3,
    ),
    "2": Target(
        97_512, 8.0, {"embed.weight": "q6_0", "down.weight": "u2_row", "o.weight": "u3_g64", "": "u2_g64"}, 3e-3
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


def stored_bytes(forms: Mapping[str, Form], vectors: Mapping[str, Tensor]) -> int:
    """Every tensor as stored: forms in their parts, vectors as f32."""
    return sum(form.nbytes for form in forms.values()) + sum(4 * v.numel() for v in vectors.values())


def native_session(model: LoadedModel, forms: Mapping[str, Form], vectors: Mapping[str, Tensor]) -> Session:
    """The compressed model in the native engine, int8 activations, as `inhouse eval` runs it."""
    weights: dict[str, Weight] = {}
    for name in model.plain_programs.weights:
        main = forms[name].main if name in forms else vectors[name].numpy()
        assert main is not None
        weights[name] = main
    formats = {name: weight.format for name, weight in weights.items() if isinstance(weight, Packed)}
    programs = quantize_activations(model.plain_programs, formats)
    executor = executors.create("native", programs, weights, kv_dtype="f16", threads=1)
    return Session(replace(model, weights=weights, programs=programs, executor=executor, mapping=None))


def score(model: LoadedModel, forms: Mapping[str, Form], vectors: Mapping[str, Tensor]) -> Evaluation:
    """Stories 0-39 by the protocol `stories`, with divergence from the float model."""
    text = SEPARATOR.join(sample_stories()[:40])
    session = native_session(model, forms, vectors)
    with Session(model) as reference:
        return evaluate(session, text, "stories", reference)


def training_data(model: LoadedModel, path: Path, mixed: bool) -> tuple[Dataset, Dataset]:
    """(what is trained on, what is validated on)."""
    stories = training_stories(model.tokenizer)
    held, rest = stories[:HELD_OUT], stories[HELD_OUT:]
    text = teacher_text(path)
    drawn = [text.ids[a:b].tolist() for a, b in zip(text.starts[:-1], text.starts[1:], strict=True)]
    return as_dataset(drawn + rest if mixed else drawn), as_dataset(held)


def train(target: Target, given: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    begun, cpu = time.monotonic(), time.process_time()
    model = open_model(str(model_folder()), cache=False, threads=1)
    weights = float_weights(model)
    data, held = training_data(model, given.data, given.mixed)
    squares = mean_squares(model, weights, held)
    matrices = {name: w for name, w in weights.items() if w.dim() == 2}
    hooks = {
        name: FakeQuant(w, Grid(format_for(name, target.formats), w.shape[1]), squares.get(name))
        for name, w in matrices.items()
    }
    start = {name: hook.form(weights[name]) for name, hook in hooks.items()}
    size = stored_bytes(start, {n: w for n, w in weights.items() if n not in hooks})
    print(f"{size} bytes of {target.budget}", file=sys.stderr, flush=True)
    assert size <= target.budget, "the formats do not fit the budget"
    config = FitConfig(
        steps=given.steps, batch_tokens=given.batch_tokens, learning_rate=given.rate or target.rate, warmup=20,
        validate_every=given.validate_every, extra_rate=given.step_rate,
    )  # fmt: skip
    program = quantize_activations(
        model.plain_programs, {name: format_for(name, target.formats) for name in matrices}
    ).programs["step"]
    setup = Setup(hooks=hooks, program=program if given.activations else None)
    objective: Objective = Response(LiveTeacher(model.plain_programs, weights))
    if given.ce:
        objective = Mix((1 - given.ce, objective), (given.ce, CrossEntropy()))
    fitter = Fitter(
        model.plain_programs, weights, data, config, objective=objective, setup=setup, validation=held,
        judge=CrossEntropy(),
    )  # fmt: skip

    def tell(label: str, done: int, total: int) -> None:
        if done % 50 == 0:
            mean = np.mean(fitter.progress.losses[-50:])
            spent = f"{time.monotonic() - begun:.0f} s, {time.process_time() - cpu:.0f} s CPU"
            last = fitter._judged[-1] if fitter._judged else None
            print(f"{done}/{total} loss {mean:.4f} held {last} {spent}", file=sys.stderr, flush=True)

    result = fitter.run(minutes=given.minutes, progress=tell)
    forms = {name: hook.form(result.weights[name]) for name, hook in hooks.items()}
    for name, hook in hooks.items():  # what is stored is what was trained, bit for bit
        assert np.array_equal(forms[name].value(), hook(result.weights[name]).detach().numpy()), name
    vectors = {name: w for name, w in result.weights.items() if name not in hooks}
    found = score(model, forms, vectors)
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        torch.save({"weights": result.weights, "extra": result.extra}, given.out / "trained.pt")
    return {
        "perplexity": found.perplexity, "kld_mean": found.kld_mean, "top1": found.top1, "goal": target.goal,
        "bytes": stored_bytes(forms, vectors), "budget": target.budget, "steps": result.steps, "best_step": result.step,
        "held": result.validation, "seconds": round(time.monotonic() - begun, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1), "reference": found.reference_perplexity,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--data", type=Path, default=Path("build/teacher_text.npz"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--step-rate", type=float, default=1.0)
    parser.add_argument("--ce", type=float, default=0.0, help="share of cross-entropy in the objective")
    parser.add_argument("--mixed", action="store_true", help="stories of the sample beside teacher text")
    parser.add_argument("--activations", action="store_true", help="int8 activations in the forward pass")
    parser.add_argument("--validate-every", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    print(json.dumps(train(TARGETS[given.target], given), indent=1))


if __name__ == "__main__":
    main()
