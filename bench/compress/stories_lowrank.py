"""stories260K at low rank: whitened SVD, ranks shared out by measured loss, healed by the float model's own answers.

    python -m bench.compress.teacher_text --out build/teacher_text.npz
    python -m bench.compress.stories_lowrank --ratio 0.2 --minutes 10 [--run build/lowrank-0.2] [--record]

Prints one JSON object: perplexity of stories 0-39 of the stored model, before and after healing, by the native engine.
Moments, the loss of each cut and healing see stories from number 100 on and text that the float model wrote itself.
`--ratio` is the share of the numbers of all linears that is saved, factors counted (the tied embedding stays whole).
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench.compress.results import record
from bench.compress.scoring import score
from bench.compress.teacher_text import as_dataset, model_folder, rows, teacher_text, training_stories
from torch import Tensor

from inhouse.compress.factored import Factors
from inhouse.compress.fit import FitConfig, FitResult, Setup, fit
from inhouse.compress.methods.rank_budget import RankBudget
from inhouse.compress.methods.rank_budget import share_out as budget
from inhouse.compress.objective import Response
from inhouse.compress.pack_as import pack_as
from inhouse.compress.spectrum import cut
from inhouse.compress.teacher import LiveTeacher
from inhouse.compress.work import Work
from inhouse.runtime.form import Form
from inhouse.store.stored_model import write_stored
from inhouse.train.data import Dataset

MOMENTS, JUDGES = 200, 16  # stories from number 100 on: for second moments, then for the loss of each cut
PROBE = 0.2  # the ratio at which each matrix is cut alone
FORMAT = "bf16"


def share_out(work: Work, ratio: float, stories: list[list[int]]) -> dict[str, Factors]:
    """Factors of the matrices that are cut."""
    options = RankBudget(ratio=ratio, probe=PROBE)
    spectra, ranks = budget(work, rows(stories[:MOMENTS]), rows(stories[MOMENTS : MOMENTS + JUDGES]), options)
    return {name: Factors(*cut(spectra[name], rank)) for name, rank in ranks.items() if rank}


def heal(
    work: Work, weights: Mapping[str, Tensor], hooks: Mapping[str, Factors], data: Dataset, given: argparse.Namespace
) -> FitResult:
    """Everything learns: factors, whole matrices, embedding and norms; the float model's answers are the goal."""
    programs = work.programs
    own = {name: weights[name] for name in programs.weights}
    config = FitConfig(
        steps=given.steps, batch_tokens=given.batch, learning_rate=given.rate, warmup=40, final_rate=0.02, seed=0
    )
    return fit(
        programs, own, data, config, objective=Response(LiveTeacher(programs, own)),
        setup=Setup(hooks=hooks, learns=lambda name: name not in hooks), folder=given.run / "fit",
        minutes=given.minutes, progress=tell,
    )  # fmt: skip


def tell(label: str, done: int, total: int) -> None:
    if done % 50 == 0:
        print(f"{label} {done}/{total} {time.process_time():.0f} s", file=sys.stderr, flush=True)


def write(work: Work, weights: Mapping[str, Tensor], hooks: Mapping[str, Factors], folder: Path) -> tuple[int, int]:
    """The stored model; (bytes of its tensors, numbers in its linears, factors counted)."""
    shutil.rmtree(folder, ignore_errors=True)
    forms: dict[str, Form] = {}
    vectors: dict[str, Any] = {}
    for name in work.programs.weights:
        if name in hooks:
            forms[name] = hooks[name].form(FORMAT)
        elif weights[name].dim() == 2:
            forms[name] = Form(pack_as(weights[name], FORMAT))
        else:
            vectors[name] = np.array(weights[name].detach(), np.float32)
    files = {path.name: path for path in model_folder().glob("*.json") if path.name != "config.json"}
    stored = write_stored(folder, work.config, forms.items(), vectors.items(), {}, files)
    numbers = sum(
        sum(p.shape[0] * p.shape[1] for _, p in form.matrices()) for name, form in forms.items() if "layers" in name
    )
    return stored.nbytes, numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch", type=int, default=3072)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--text", type=Path, default=Path("build/teacher_text.npz"))
    parser.add_argument("--record", action="store_true", help="put the figures into docs/compression-results.json")
    given = parser.parse_args()
    given.run = given.run or Path(f"build/lowrank-{given.ratio}")
    torch.set_num_threads(1)
    with Work.open(str(model_folder()), given.run / "work") as work:
        result = measure(work, given)
    print(json.dumps(result, indent=1))
    if given.record:
        save(result, given)


def measure(work: Work, given: argparse.Namespace) -> dict[str, Any]:
    begun = time.monotonic()
    weights = {name: tensor.clone() for name, tensor in work.weights().items()}
    stories = training_stories(work.tokenizer)
    hooks = share_out(work, given.ratio, stories)
    cut_seconds = time.monotonic() - begun
    whole = sum(tensor.numel() for name, tensor in weights.items() if "layers" in name and tensor.dim() == 2)
    nbytes, numbers = write(work, weights, hooks, given.run / "unhealed")
    unhealed = score(given.run / "unhealed")
    drawn = teacher_text(given.text)
    texts = [drawn.ids[s:e].tolist() for s, e in zip(drawn.starts[:-1], drawn.starts[1:], strict=True)]
    healed_by = heal(work, weights, hooks, as_dataset(texts + stories[MOMENTS + JUDGES :]), given)
    nbytes, numbers = write(work, healed_by.weights, hooks, given.run / "healed")
    healed = score(given.run / "healed")
    return {
        "ratio": given.ratio, "numbers": numbers, "saved": 1 - numbers / whole, "bytes": nbytes,
        "ranks": {name: hook.a.shape[0] for name, hook in hooks.items()}, "unhealed": unhealed.to_dict(),
        "healed": healed.to_dict(), "steps": healed_by.steps, "heal_seconds": healed_by.seconds,
        "cut_seconds": cut_seconds,
    }  # fmt: skip


def save(result: Mapping[str, Any], given: argparse.Namespace) -> None:
    name = f"lowrank-{round(100 * given.ratio)}"
    command = (
        f"python -m bench.compress.stories_lowrank --ratio {given.ratio} --minutes {given.minutes:g} "
        f"--steps {given.steps} --rate {given.rate:g}"
    )
    note = f"{result['saved']:.1%} of the numbers of all linears saved, factors counted; seconds on a busy machine"
    goals = {0.2: ("about 26", "<= 4.4"), 0.4: (None, "<= 5.5")}.get(given.ratio, (None, None))
    what = f"stories260K, whitened SVD, -{given.ratio:.0%} of the linears' numbers, perplexity of stories 0-39"
    for end, goal in zip(("unhealed", "healed"), goals, strict=True):
        record(
            {
                "id": f"{name}-{end}", "what": f"{what}, {end}", "value": round(result[end]["perplexity"], 4),
                "goal": goal, "bytes": result["bytes"], "command": command, "note": note,
                "seconds": round(result["cut_seconds" if end == "unhealed" else "heal_seconds"]),
            }
        )  # fmt: skip


if __name__ == "__main__":
    main()
