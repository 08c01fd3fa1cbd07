"""stories260K with half of its weights zero: pruned in one true-sequential pass, healed with the masks held.

    python -m bench.compress.teacher_text --out build/teacher_text.npz
    python -m bench.compress.stories_pruned --method sparsegpt --sparsity 0.5 --minutes 10 [--record]

Prints one JSON object: perplexity of stories 0-39 of the stored model by the native engine, before and after healing.
Every linear of the layers is pruned (35 matrices); `--embedding` prunes the tied embedding, which is the head too, with
them. Statistics and healing see stories from number 100 on and text that the float model wrote itself; what is learned
is the float model's own distribution (forward KL). The healed model is scored as floats and as stored: codes of
`--store`, with a bitmask or as 2:4 where that takes fewer bytes; zeros are counted in what is read back from disk.

`--minutes` is the time by the clock of the whole command, measuring included: a few steps are timed, and as many are
planned as the rest allows (at most `--steps`), so that the learning rate has come down when the time is over.
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
from bench.compress.timed import planned_steps
from torch import Tensor

from inhouse.compress.activations import observe
from inhouse.compress.blocks import BlockRunner, Tap
from inhouse.compress.calibrate import Calibration
from inhouse.compress.fit import FitConfig, FitResult, Fitter, Setup, fit
from inhouse.compress.grids import Grid
from inhouse.compress.matrix import sparsest
from inhouse.compress.objective import Response
from inhouse.compress.pack_as import pack_as
from inhouse.compress.sparsity import masked, zeros_of
from inhouse.compress.table import method
from inhouse.compress.teacher import LiveTeacher
from inhouse.compress.work import Work
from inhouse.load.describe import describe
from inhouse.runtime.form import Form
from inhouse.runtime.packed import is_float
from inhouse.store.stored_model import write_stored
from inhouse.store.stored_source import StoredSource

SCORING = 45.0  # seconds by the clock that are kept for writing and scoring three models
MOMENTS, HELD = 200, 48  # stories from number 100 on: for statistics, then to choose the best step by
GOALS = {("sparsegpt", "0.5"): ("about 14.6", "<= 4.05"), ("wanda", "0.5"): ("about 18", "<= 4.05"),
         ("sparsegpt", "2:4"): (None, "<= 4.40"), ("wanda", "2:4"): (None, "<= 4.40")}  # fmt: skip


def prune(work: Work, calibration: Calibration, given: argparse.Namespace) -> None:
    """Puts pruned weights and masks, op by op, each seeing what the pruned ones before it make."""
    row = method(given.method, "prune")
    options = row.options(sparsity=given.sparsity, **({"refit": given.refit} if given.refit else {}))

    def visit(tap: Tap) -> None:
        for name in tap.names:
            if name == "embed.weight" and not given.embedding:
                continue
            value = work.value(name)
            made = row.run(value, tap.stats[name], options, "")
            made = masked(value, made) if made.dtype is torch.bool else made
            work.put(name, made)
            work.put_mask(name, made != 0)

    BlockRunner(work, calibration, given.run / "blocks").run(visit)
    work.save("prune")


def take(work: Work, start: Path, folder: Path) -> None:
    """Puts the weights of a model that an earlier run healed; its zeros are the masks."""
    shutil.rmtree(folder, ignore_errors=True)
    with Work.open(str(start), folder) as earlier:
        for name in work.names():
            value = earlier.value(name)
            work.put(name, value)
            if name.startswith("layers.") and value.dim() == 2:
                work.put_mask(name, value != 0)
    work.save("start")


def heal(
    work: Work, weights: Mapping[str, Tensor], teacher: Mapping[str, Tensor], given: argparse.Namespace, until: float
) -> FitResult:
    """Everything that is not masked learns until `until` (monotonic seconds); the float model's answers are the
    goal."""
    programs = work.programs
    drawn = teacher_text(given.text)
    texts = [drawn.ids[a:b].tolist() for a, b in zip(drawn.starts[:-1], drawn.starts[1:], strict=True)]
    stories = training_stories(work.tokenizer)[MOMENTS:]
    data, held = as_dataset(texts + stories[HELD:]), as_dataset(stories[:HELD])
    masks = {name: mask for name in programs.weights if (mask := work.mask(name)) is not None}
    own = {name: weights[name] for name in programs.weights}
    objective, setup = Response(LiveTeacher(programs, teacher)), Setup(masks=masks)

    def config(steps: int) -> FitConfig:
        return FitConfig(
            steps=steps, batch_tokens=given.batch, learning_rate=given.rate, warmup=40, final_rate=0.02,
            validate_every=max(1, min(200, steps // 4)),
        )  # fmt: skip

    def trial(steps: int) -> Fitter:
        return Fitter(programs, own, data, config(steps), objective=objective, setup=setup)

    steps = planned_steps(trial, until, given.steps)
    return fit(
        programs, own, data, config(steps), objective=objective, setup=setup, validation=held,
        minutes=(until - time.monotonic()) / 60,
        progress=tell,
    )  # fmt: skip


def squares(work: Work, weights: Mapping[str, Tensor], stories: list[list[int]]) -> dict[str, Tensor]:
    """Mean square of the inputs of each linear of the healed model: what rounding errors weigh by."""
    text = rows(stories[:64])
    seen = observe(work.program, {**weights, **work.constants()}, text.tokens, lengths=text.lengths)
    return {name: moments.mean_square.float() for name, moments in seen.inputs.items()}


def tell(label: str, done: int, total: int) -> None:
    if done % 50 == 0:
        print(f"{label} {done}/{total} {time.process_time():.0f} s", file=sys.stderr, flush=True)


def form_of(name: str, value: Tensor, fmt: str, importance: Tensor | None) -> Form:
    """Floats as they are; codes by weighted least squares, as bitmask, 2:4 or columns where that is smaller. The
    embedding, which is the head too, keeps 8 bits."""
    if name == "embed.weight":
        fmt = fmt.replace("i4", "i8")
    if value.shape[1] % 64:
        fmt = fmt.replace("g64", "row")
    plain = pack_as(value, fmt) if is_float(fmt) else Grid(fmt, value.shape[1]).quantize(value, importance)
    return Form(sparsest(plain)[0])


def write(
    work: Work, weights: Mapping[str, Tensor], fmt: str, folder: Path, stats: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The stored model; its bytes, formats, and the zeros of what is read back."""
    shutil.rmtree(folder, ignore_errors=True)
    forms = {n: form_of(n, weights[n], fmt, stats.get(n)) for n in work.programs.weights if weights[n].dim() == 2}
    vectors = {n: np.array(weights[n].detach(), np.float32) for n in work.programs.weights if weights[n].dim() == 1}
    files = {path.name: path for path in model_folder().glob("*.json") if path.name != "config.json"}
    stored = write_stored(folder, work.config, forms.items(), vectors.items(), {}, files)
    zeros, numbers = {}, {}
    source = describe(folder).source
    assert isinstance(source, StoredSource)
    for name in forms:
        value = torch.from_numpy(source.form(name).value())
        zeros[name], numbers[name] = zeros_of(value), value.numel()
    source.close()
    linears = [name for name in forms if name.startswith("layers.")]
    return {
        "bytes": stored.nbytes, "formats": sorted({str(f.main.format) for f in forms.values() if f.main}),
        "least_zeros": min(zeros[n] / numbers[n] for n in linears),
        "embedding_zeros": zeros["embed.weight"] / numbers["embed.weight"],
    }  # fmt: skip


def measure(work: Work, given: argparse.Namespace) -> dict[str, Any]:
    begun, processor = time.monotonic(), time.process_time()
    teacher = {name: tensor.clone() for name, tensor in work.weights().items()}
    stories = training_stories(work.tokenizer)
    if given.start is None:
        prune(work, rows(stories[:MOMENTS]), given)
    else:
        take(work, given.start, given.run / "start")
    prune_seconds = time.monotonic() - begun
    weights = {name: tensor.clone() for name, tensor in work.weights().items()}
    found: dict[str, Any] = {"prune_seconds": round(prune_seconds, 1)}
    found["unhealed"] = write(work, weights, "f32", given.run / "unhealed", {})
    found["unhealed"] |= score(given.run / "unhealed").to_dict()
    print(json.dumps(found), file=sys.stderr, flush=True)
    if given.steps:
        result = heal(work, weights, teacher, given, begun + 60 * given.minutes - SCORING)
        found |= {"steps": result.steps, "best_step": result.step, "heal_seconds": round(result.seconds)}
        found |= {"validation": result.validation[-3:]}
        for name, fmt in (("healed", "f32"), ("stored", given.store)):
            found[name] = write(work, result.weights, fmt, given.run / name, squares(work, result.weights, stories))
            found[name] |= score(given.run / name).to_dict()
    found |= {"seconds": round(time.monotonic() - begun), "cpu_seconds": round(time.process_time() - processor)}
    return found


def _time(found: Mapping[str, Any]) -> str:
    return (
        f"; best of {found['steps']} steps on held-out stories: {found['best_step']}; seconds by the clock of the whole"
        f" command, scoring included ({found['cpu_seconds']} s of processor time, one thread, a busy machine)"
    )


def save(found: Mapping[str, Any], given: argparse.Namespace) -> None:
    command = (
        f"python -m bench.compress.stories_pruned --method {given.method} --sparsity {given.sparsity}"
        f"{' --embedding' if given.embedding else ''}{f' --refit {given.refit}' if given.refit else ''} "
        f"--minutes {given.minutes:g} --steps {given.steps} --batch {given.batch} --rate {given.rate:g}"
    )
    where = "every linear and the tied embedding" if given.embedding else "every linear of the layers"
    stem = f"pruned-{given.method}{'-refit' if given.refit else ''}-{given.sparsity.replace(':', 'of')}"
    stem += "-embedding" if given.embedding else ""
    goals = GOALS.get((given.method, given.sparsity), (None, None))
    for part, goal in (("unhealed", goals[0]), ("healed", goals[1]), ("stored", goals[1])):
        if part not in found:
            continue
        one = found[part]
        record(
            {
                "id": f"{stem}-{part}", "goal": goal, "bytes": one["bytes"], "command": command,
                "value": round(one["perplexity"], 4),
                "what": f"stories260K, {given.method} {given.sparsity} of {where}, {part}, perplexity of stories 0-39",
                "note": f"{one['least_zeros']:.2%} zeros in the fullest linear, stored as {', '.join(one['formats'])}"
                + ("" if part == "unhealed" else _time(found)),
                "seconds": round(found["prune_seconds"]) if part == "unhealed" else found["seconds"],
            }
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="sparsegpt", choices=("magnitude", "wanda", "sparsegpt"))
    parser.add_argument("--sparsity", default="0.5")
    parser.add_argument("--refit", type=int, default=0)
    parser.add_argument("--embedding", action="store_true")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--steps", type=int, default=1200, help="0: do not heal")
    parser.add_argument("--batch", type=int, default=3072)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument(
        "--store", default="i8_g64", help="format of the stored model; bitmask or 2:4 where that is smaller"
    )
    parser.add_argument("--start", type=Path, help="heal once more what an earlier run healed (its folder `healed`)")
    parser.add_argument("--run", type=Path)
    parser.add_argument("--text", type=Path, default=Path("build/teacher_text.npz"))
    parser.add_argument("--record", action="store_true", help="put the figures into docs/compression-results.json")
    given = parser.parse_args()
    stem = f"{given.method}-{given.sparsity.replace(':', 'of')}"
    given.run = given.run or Path(f"build/pruned-{stem}{'-embedding' if given.embedding else ''}")
    shutil.rmtree(given.run / "work", ignore_errors=True)
    torch.set_num_threads(1)
    with Work.open(str(model_folder()), given.run / "work") as work:
        found = measure(work, given)
    print(json.dumps(found, indent=1))
    if given.record:
        save(found, given)


if __name__ == "__main__":
    main()
