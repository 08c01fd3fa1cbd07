"""Every method of the table once, by recipe, on stories260K: bytes before and after, native or not, tokens a second.

    python -m bench.compress.methods [NAME...] --run FOLDER            makes them
    python -m bench.compress.methods [NAME...] --run FOLDER --speeds   times them, on a machine that does nothing else

With the options of STAGES the runs are short, and are no figure of how good a method can be. Each result goes into
docs/compression-results.json as `method/NAME`; docs/compression.md shows it in the table of methods. What FOLDER has is
not made again; `--speeds` takes seconds a method, so that it can be had in pieces while a machine is free.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench.compress.made_models import untied, upcycled
from bench.compress.results import FILE, record
from bench.compress.teacher_text import SCORED, model_folder, sample_stories
from bench.compress.turns import decodes_in_turns

from inhouse.compress.pipeline import compress
from inhouse.compress.recipe import parse_recipe
from inhouse.compress.table import METHODS
from inhouse.core.errors import InhouseError
from inhouse.load.describe import describe
from inhouse.load.locate import locate
from inhouse.store.home import Home
from inhouse.store.store import Store

# What a method needs beyond its defaults, so that it runs, and within a minute on one core.
STAGES: dict[str, dict[str, Any]] = {
    "round": {"format": "q4_0"},
    "rtn": {"format": "q4_0"},
    "gptq": {"format": "q4_0"},
    "gptaq": {"format": "q4_0"},
    "auto": {"bits": 4.5, "rows": 4, "trials": 2},
    "log": {"format": "log4_g32"},
    "vector": {"books": 1, "include": ["mlp"]},
    "vector-shared": {"books": 1, "include": ["mlp"]},
    "signround": {"format": "q4_0", "iters": 20},
    "qat": {"steps": 20, "format": "q4_0"},
    "distill": {"steps": 20},
    "finetune": {"steps": 20},
    "gradual": {"steps": 20},
    "structured": {"ffn": 0.25},
    "hqq": {"format": "u4_g64"},
    "window": {"window": 128, "sink": 16},
    "kv": {"k": "int8", "v": "int4"},
}
AFTER = {"prune": {"quantize": {"method": "round", "format": "q8_0"}}}  # zeros are stored as such among codes
BEFORE = {"repair": {"quantize": {"method": "rtn", "format": "u2_g32"}}}  # family -> a stage that must come first
ROUNDS = 15  # decodes of each of the two, in turns
MADE: dict[str, Callable[[Path], Path]] = {"tensor-train": untied, "tucker": upcycled}  # what stories260K has not


NOTES = {
    "tensor-train": "stories260K with a head of its own",
    "tucker": "stories260K with four experts a layer made of its FFN",
    "window": "a decode of 200 tokens is hardly longer than the window",
    "kv": "K int8, V int4",
    "prune": "then rounded to 8 bits, which alone would take 285,152 bytes",
}


def document(name: str, texts: Path, models: str) -> dict[str, Any]:
    """The recipe that shows one method."""
    row = METHODS[name]
    own = {"models": [models], "weights": [0.5]} if row.family == "merge" else STAGES.get(name, {})
    first = [BEFORE[row.family]] if row.family in BEFORE else []
    return {
        "calibration": {"texts": [str(texts)], "samples": 32, "length": 128, "mode": "documents"},
        "stages": [
            *first,
            {row.family: {"method": name, **own}},
            *([AFTER[row.family]] if row.family in AFTER else []),
        ],
    }


def measure(name: str, home: Home, texts: Path) -> dict[str, Any]:
    """Runs the method; the entry, without speeds."""
    model = _model(name, home)
    recipe = parse_recipe(document(name, texts, model))
    began = time.perf_counter()
    done = compress(model, _new(name), recipe, home=home)
    seconds = time.perf_counter() - began if done.fresh else done.result["seconds"]
    before = stored_before(model)
    gate = done.result["gate"]
    cache = _cache(Path(done.result["report"]).with_suffix(".json"))
    return {
        "id": f"method/{name}", "what": recipe.summary(), "bytes": done.result["bytes"], "seconds": round(seconds, 1),
        "value": {"native": done.result["proof"]["executor"].startswith("native"), "bytes_before": before,
                  "kld_mean": gate["kld_mean"], **cache},
        "command": f"python -m bench.compress.methods {name} --run FOLDER",
        "note": "; ".join(filter(None, (NOTES.get(name, NOTES.get(METHODS[name].family, "")), "short options"))),
    }  # fmt: skip


def timed(name: str, home: Home) -> dict[str, Any]:
    """The entry of a method that was made, with speeds."""
    (entry,) = (one for one in json.loads(FILE.read_text()) if one["id"] == f"method/{name}")
    with Store(home) as store:
        made = str(store.folder(store.catalog.resolve(_new(name))))
        turns = decodes_in_turns(_model(name, home), made, ROUNDS)
    before, after = (statistics.median(side) for side in zip(*turns, strict=True))
    value = {**entry["value"], "speed_before": round(before), "speed": round(after)}
    told = [part for part in entry["note"].split("; ") if not part.startswith("time")]
    return {**entry, "value": value, "note": "; ".join([*told, f"times: {ROUNDS} decodes in turns, machine quiet"])}


def _model(name: str, home: Home) -> str:
    """What is compressed: stories260K, or what was made of it."""
    if name not in MADE:
        return str(model_folder())
    folder = home.data / f"model-{name}"
    return str(folder if folder.exists() else MADE[name](folder))


def _new(name: str) -> str:
    return f"method-{name.replace('_', '-')}"


def _cache(report: Path) -> dict[str, int]:
    """Bytes of one more token of context before and after, where they differ."""
    found = json.loads(report.read_text())["speed"]
    before, after = found["before"]["kv_token"], found["after"]["kv_token"]
    return {"token_before": before, "token": after} if before != after else {}


def stored_before(model: str) -> int:
    """Bytes of all tensors of the opened model."""
    source = describe(locate(model).path).source
    try:
        return sum(source.info(name).nbytes for name in source)
    finally:
        source.close()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--run", type=Path, default=Path("build/methods"), metavar="FOLDER")
    parser.add_argument("--speeds", action="store_true", help="time what is there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    home = Home(given.run / "home", given.run / "cache")
    home.create()
    texts = given.run / "texts.txt"
    texts.write_text("<|endoftext|>".join(sample_stories()[SCORED:400]))
    failed: list[str] = []
    for name in given.names or METHODS:
        print(name, flush=True)
        try:
            record(timed(name, home) if given.speeds else measure(name, home, texts))
        except InhouseError as error:  # the others are measured all the same
            print(f"{name}: {error}", file=sys.stderr)
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
