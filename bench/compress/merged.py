"""Two fine-tunes of stories260K that have different texts, their merges, and the deltas between all of these.

    python -m bench.compress.merged [--steps 300] [--run FOLDER] [--deltas]

One learns Shakespeare, the other Wikipedia, by the recipe's own stage `finetune`. Each merge is scored on parts of both
texts that nothing was trained on, and on stories 0-39. Deltas are those of the bf16 exports, and of 1 % of the values
edited. Writes `merge/...` and `delta/...` into docs/compression-results.json. A command that was cut off goes on with
what lies in FOLDER; `--deltas` leaves the merges out.
"""

import argparse
import gzip
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench.compress.results import record
from bench.compress.teacher_text import model_folder, realdata

from inhouse.compress.evaluate import evaluate
from inhouse.compress.merge import Ingredient, merge_models
from inhouse.compress.methods.merging import MergeOptions
from inhouse.compress.pipeline import compress
from inhouse.compress.recipe import parse_recipe
from inhouse.core.settings import load_settings
from inhouse.engine.session import Session
from inhouse.load.delta import make
from inhouse.load.export import export_model
from inhouse.load.locate import DEMO_FOLDER
from inhouse.store.home import Home
from inhouse.store.safetensors import open_safetensors, write_safetensors
from inhouse.store.store import Store
from inhouse.store.writing import from_bytes

COMMAND = "python -m bench.compress.merged"
HELD = 30_000  # characters at the end of each text that are scored
TEXTS = {"shakespeare": "tinyshakespeare.txt.gz", "wikipedia": "wikitext-2.valid.txt.gz"}
LEARNED = 400_000  # characters at the beginning that are learned from
METHODS: Mapping[str, dict[str, Any]] = {
    "linear": {}, "slerp": {}, "task_arithmetic": {"scale": 0.7}, "ties": {"density": 0.6},
    "dare_ties": {"density": 0.5},
}  # fmt: skip
RATE = 1e-3  # of learning
LIGHT_RATE, LIGHT_STEPS = 1e-5, 40  # weights end about a thousandth away


def read(name: str) -> str:
    return gzip.decompress((realdata() / "text" / name).read_bytes()).decode()


def tuned(name: str, text: str, rate: float, steps: int, folder: Path, home: Home) -> Path:
    """stories260K fine-tuned on a text, as a Hugging Face folder of f32."""
    corpus, out = folder / f"{name}.txt", folder / name
    if not corpus.exists():
        corpus.write_text(text)
    compress(
        str(model_folder()), name,
        parse_recipe({
            "calibration": {"texts": [str(corpus)], "samples": 512, "length": 256, "mode": "windows"},
            "stages": [{"finetune": {"steps": steps, "rate": rate, "warmup": min(20, steps)}}],
        }),
        home=home,
    )  # fmt: skip
    return exported(name, out, "f32", home)


def exported(model: str, out: Path, wish: str, home: Home) -> Path:
    """A Hugging Face folder of the model, made unless an earlier command made it."""
    if not out.exists():
        export_model(model, "safetensors", out, wish=wish, home=home)
    return out


def perplexities(model: str | Path, texts: Mapping[str, str]) -> dict[str, float]:
    """Of each text; `stories` by its own protocol."""
    with Session.open(str(model), load_settings({"threads": 1, "max_sequences": 1}), cache=False) as session:
        protocols = {name: "stories" if name == "stories" else "window:256" for name in texts}
        return {name: round(evaluate(session, text, protocols[name]).perplexity, 3) for name, text in texts.items()}


def delta(title: str, old: Path, new: Path, folder: Path, home: Home, goal: float | None, note: str) -> None:
    """Records the size of a delta."""
    file = folder / f"{title}.delta"
    with Store(home) as store:
        made = make(str(old), str(new), file, store=store)
    tensors = (new / "model.safetensors").stat().st_size
    record({
        "id": f"delta/{title}", "what": f"delta in bf16, {title}: share of the new file of weights",
        "value": round(made.nbytes / tensors, 4), "goal": goal, "bytes": made.nbytes, "command": COMMAND, "note": note,
    })  # fmt: skip


def edited(model: Path, out: Path, share: float) -> Path:
    """A bf16 folder with that share of its values drawn anew."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for file in model.iterdir():
        if file.name != "model.safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    source, random = open_safetensors(model / "model.safetensors"), np.random.default_rng(0)
    tensors = []
    for name in source:
        info, raw = source.info(name), np.array(source.raw(name)).reshape(-1).view(np.uint16)
        which = random.random(raw.size) < share
        fresh = torch.from_numpy(random.normal(0, 0.1, int(which.sum()))).bfloat16().view(torch.uint16).numpy()
        raw[which] = fresh
        tensors.append(from_bytes(name, info.dtype, info.shape, raw.view(np.uint8)))
    write_safetensors(out / "model.safetensors", tensors, {"format": "pt"})
    source.close()
    return out


def moved(old: Path, new: Path) -> str:
    """How far two folders are apart, relative to the size of the weights."""
    a, b = (open_safetensors(path / "model.safetensors") for path in (old, new))
    gap, size = 0.0, 0.0
    for name in a:
        one, two = (np.array(source.raw(name)).view(np.float32).astype(np.float64) for source in (a, b))
        gap, size = gap + float(((one - two) ** 2).sum()), size + float((one**2).sum())
    for source in (a, b):
        source.close()
    return f"stories260K; weights moved by {(gap / size) ** 0.5:.2g} of their norm"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--run", type=Path, default=Path("build/merged"))
    parser.add_argument("--deltas", action="store_true", help="only the deltas")
    given = parser.parse_args()
    steps, folder = given.steps, given.run / str(given.steps)
    torch.set_num_threads(1)
    whole = {name: read(file) for name, file in TEXTS.items()}
    scored = {name: text[-HELD:] for name, text in whole.items()} | {"stories": read("tinystories_sample_2MiB.txt.gz")}
    home = Home(folder / "home", folder / "cache")
    home.create()
    base = exported(str(model_folder()), folder / "base", "f32", home)
    learned = {name: text[:LEARNED] for name, text in whole.items()}
    models = {name: tuned(name, text, RATE, steps, folder, home) for name, text in learned.items()}
    light = tuned("light", learned["shakespeare"], LIGHT_RATE, LIGHT_STEPS, folder, home)
    if not given.deltas:
        merges(base, models, scored, steps, folder, home)
    deltas(base, models, light, folder, home)


def merges(
    base: Path, models: Mapping[str, Path], scored: Mapping[str, str], steps: int, folder: Path, home: Home
) -> None:
    """Scores the base, both fine-tunes, and every merge of them."""
    alone = {"base": base, **models}
    for name, path in alone.items():
        record({
            "id": f"merge/0-{name}", "what": f"perplexity before merging: {name}", "value": perplexities(path, scored),
            "command": COMMAND, "note": "" if name == "base" else f"stories260K, {steps} steps on {name}",
        })  # fmt: skip
    for method, more in METHODS.items():
        chosen = [Ingredient(str(path), 0.5 if method == "linear" else 1.0) for path in models.values()]
        first: str | None = None if method == "linear" else str(base)
        if method == "slerp":
            first, chosen = chosen[0].reference, chosen[1:]
        began = time.perf_counter()
        with Store(home) as store:
            made = merge_models(
                first, chosen, f"merge-{method}".replace("_", "-"), MergeOptions(method, **more), store=store
            )
            seconds = time.perf_counter() - began
            found = perplexities(store.folder(made.version), scored)
        record({
            "id": f"merge/{method}", "what": f"perplexity of {' and '.join(models)} merged: {method}", "value": found,
            "seconds": round(seconds, 2), "command": COMMAND,
            "note": ", ".join(f"{key} {value}" for key, value in more.items()),
        })  # fmt: skip


def deltas(base: Path, models: Mapping[str, Path], light: Path, folder: Path, home: Home) -> None:
    """Sizes of deltas between bf16 exports."""
    narrow = {}
    for name, path in {"base": base, "light": light, **models}.items():
        narrow[name] = exported(str(path), folder / f"{name}-bf16", "bf16", home)
    one_percent = edited(DEMO_FOLDER, folder / "edited", 0.01)
    delta("1 % of the values edited", DEMO_FOLDER, one_percent, folder, home, 0.02, "the demo model")
    delta("a light fine-tune", narrow["base"], narrow["light"], folder, home, 0.16, moved(base, light))
    for name, path in models.items():
        delta(f"fine-tuned on {name}", narrow["base"], narrow[name], folder, home, None, moved(base, path))


if __name__ == "__main__":
    main()
