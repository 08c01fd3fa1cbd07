"""Does a teacher help? A student of 3 layers, 48 wide, learns from the same little text and the same start with and
without stories260K as teacher, scored by its loss on held-out stories (number 100 on, never trained on).

The control (cross-entropy alone) runs with 3 seeds x 3 learning rates; each seed's best is what the student with
teacher (one learning rate, chosen in a look at seed 0) must beat. Each is compared at equal tokens and at equal CPU
time: in the second the control goes on for as many more steps as the teacher's cost would have paid for. The response
reads cached top-64 logits; features are hidden states and attention maps, relations similarities of tokens, each beside
cross-entropy.

    python -m bench.compress.distillation [--data build/teacher_text.npz] [--steps 100] [--seeds 3] [--out FILE]
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench.compress.results import record
from bench.compress.stories_learned import float_weights
from bench.compress.teacher_text import as_dataset, model_folder, teacher_text, training_stories

from inhouse.compress.fit import FitConfig, Fitter
from inhouse.compress.objective import CrossEntropy, FeatureMatch, Mix, Objective, RelationMatch, Response, layer_map
from inhouse.compress.teacher import CachedTeacher, LiveTeacher, write_cache
from inhouse.load.model import LoadedModel, open_model
from inhouse.model.build import build
from inhouse.model.spec import ModelSpec, RopeSpec
from inhouse.train.data import Dataset, make_dataset
from inhouse.train.loop import initial_weights

STUDENT = ModelSpec(
    family="llama", hidden=48, layers=3, heads=6, kv_heads=3, head_dim=8, ffn=128, vocab_size=512, context_length=512,
    rope=RopeSpec(dim=8), norm_eps=1e-5, tied=True,
)  # fmt: skip
RATES = (4e-3, 8e-3, 1.6e-2)  # of the control
TEACHER_RATE = 1.2e-2
LENGTH = 128
HELD_OUT = 40
KINDS = ("response", "feature", "relation")


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run: held-out loss (nats a token), tokens, CPU seconds of the steps."""

    loss: float
    tokens: int
    seconds: float


def short(data: Dataset, count: int) -> Dataset:
    """The first LENGTH tokens of the first `count` sequences."""
    samples = []
    for i in range(min(count, len(data))):
        ids = data.ids[data.starts[i] : data.starts[i + 1]][:LENGTH].tolist()
        samples.append((ids, [False] + [True] * (len(ids) - 1)))
    return make_dataset(samples)


def objectives(model: LoadedModel, data: Dataset, folder: Path) -> Mapping[str, Callable[[int], Objective]]:
    """Kind -> what is made small, for a seed. Features and relations need the teacher beside the student."""
    weights = float_weights(model)
    live = LiveTeacher(model.plain_programs, weights, features=True)
    write_cache(LiveTeacher(model.plain_programs, weights), data, folder, k=64, vocab=512)
    cached = CachedTeacher(folder, data)
    layers, widths = layer_map(STUDENT.layers, 5), (STUDENT.hidden, 64)
    alike = RelationMatch(live, layers, similarity=1.0, distance=0.0, angle=0.0, minilm=0.0, between=0.0)
    return {
        "control": lambda seed: CrossEntropy(),
        "response": lambda seed: Mix((0.9, Response(cached)), (0.1, CrossEntropy())),
        "feature": lambda seed: Mix((1.0, CrossEntropy()), (1.0, FeatureMatch(live, layers, widths, seed=seed))),
        "relation": lambda seed: Mix((1.0, CrossEntropy()), (1.0, alike)),
    }


def run(objective: Objective, data: Dataset, held: Dataset, seed: int, rate: float, steps: int, batch: int) -> Outcome:
    """Trains a student from the start that the seed gives; the order of the data is the seed's too."""
    programs = build(STUDENT)
    start = initial_weights(programs, seed=seed, layers=STUDENT.layers, std=0.05)
    config = FitConfig(
        steps=steps, batch_tokens=batch, learning_rate=rate, warmup=20, seed=seed, validate_every=10**9,
        weight_decay=0.01,
    )  # fmt: skip
    fitter = Fitter(programs, start, data, config, objective=objective)
    begun = time.process_time()
    result = fitter.run()
    spent = time.process_time() - begun
    judge = Fitter(programs, result.weights, held, FitConfig(steps=1, batch_tokens=4096), validation=held)
    return Outcome(judge.judge(), fitter.progress.tokens, spent)


def experiment(given: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    model = open_model(str(model_folder()), cache=False, threads=1)
    held = short(as_dataset(training_stories(model.tokenizer)[:HELD_OUT]), HELD_OUT)
    data = short(teacher_text(given.data), given.sequences)
    seeds, steps = range(given.seeds), given.steps
    with tempfile.TemporaryDirectory() as folder:
        made = objectives(model, data, Path(folder))
        arguments = (data, held)

        def go(kind: str, seed: int, rate: float, count: int) -> Outcome:
            found = run(made[kind](seed), *arguments, seed, rate, count, given.batch_tokens)
            facts = f"{found.loss:.4f} nats, {found.tokens} tokens, {found.seconds:.1f} s CPU"
            print(f"{kind} seed {seed} rate {rate:g} steps {count}: {facts}", file=sys.stderr, flush=True)
            return found

        taught = {kind: [go(kind, seed, TEACHER_RATE, steps) for seed in seeds] for kind in given.kinds}
        control = {(seed, rate): go("control", seed, rate, steps) for seed in seeds for rate in RATES}
        best = [min(RATES, key=lambda rate, s=seed: control[s, rate].loss) for seed in seeds]  # type: ignore[misc]
        pace = sum(one.seconds for one in control.values()) / len(control) / steps
        out: dict[str, Any] = {"control": [[control[s, r].loss for r in RATES] for s in seeds], "rates": RATES}
        for kind, outcomes in taught.items():
            longer = max(steps, round(sum(one.seconds for one in outcomes) / len(outcomes) / pace))
            timed = [go("control", seed, best[seed], longer) for seed in seeds]
            equal_tokens = [control[seed, best[seed]].loss for seed in seeds]
            out[kind] = {
                "loss": [one.loss for one in outcomes], "seconds": [round(one.seconds, 1) for one in outcomes],
                "control_equal_tokens": equal_tokens, "control_equal_time": [one.loss for one in timed],
                "control_steps_equal_time": longer, "steps": steps,
                "wins_tokens": sum(one.loss < other for one, other in zip(outcomes, equal_tokens, strict=True)),
                "wins_time": sum(one.loss < other.loss for one, other in zip(outcomes, timed, strict=True)),
            }  # fmt: skip
    return out


def keep(found: Mapping[str, Any], command: str) -> None:
    """Into docs/compression-results.json."""
    for kind in (kind for kind in KINDS if kind in found):
        one = found[kind]
        mean = sum(one["loss"]) / len(one["loss"])
        tokens, timed = (
            ", ".join(f"{x:.4f}" for x in one[key]) for key in ("control_equal_tokens", "control_equal_time")
        )
        record({
            "id": f"distillation.{kind}",
            "what": f"student 3 x 48 taught by stories260K ({kind}): held-out loss, mean of {len(one['loss'])} seeds",
            "value": round(mean, 4), "goal": "wins on all seeds", "seconds": sum(one["seconds"]), "command": command,
            "note": f"wins {one['wins_tokens']} of {len(one['loss'])} at equal tokens, {one['wins_time']} at equal CPU "
            f"time; taught {', '.join(f'{x:.4f}' for x in one['loss'])}; control's best of 3 rates {tokens}; "
            f"control with {one['control_steps_equal_time']} steps for {one['steps']}: {timed}; busy machine, CPU time",
        })  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("build/teacher_text.npz"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--sequences", type=int, default=240)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found = experiment(given)
    text = json.dumps(found, indent=1)
    print(text)
    if given.out is not None:
        given.out.write_text(text)
    options = f"--steps {given.steps} --batch-tokens {given.batch_tokens} --sequences {given.sequences}"
    keep(found, f"python -m bench.compress.distillation {options}")


if __name__ == "__main__":
    main()
