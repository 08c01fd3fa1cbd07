"""stories260K quantised without gradients: the issue's table, made again through `inhouse compress` and `inhouse eval`.

    python -m bench.compress.stories_quant [q8 q50 q45 q3 q2] [--home build/quant-home] [--record]

Prints a JSON object for each size: bytes of all tensors as stored, perplexity of stories 0-39 by the native engine
with int8 activations, divergence from the float model, seconds of the compression (processor time; by the clock).
Calibration sees stories 100 to 299 alone; recipes are in bench/compress/recipes.
"""

import argparse
import gzip
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.compress.results import record
from bench.compress.teacher_text import model_folder, realdata

SEPARATOR = "<|endoftext|>"
FIRST, LAST = 100, 300  # stories of calibration; 0-99 are for scoring only
SIZES: dict[str, tuple[str, int | None, float | None, str]] = {
    # name: (what, most bytes, greatest perplexity, goal in words)
    "q8": ("8 bit", None, None, "KLD <= 1e-3, top-1 >= 98.5 %"),
    "q50": ("5.0 bits a weight", 169_000, 3.63, "<= 3.63 in <= 169,000 bytes and 2 minutes"),
    "q45": ("4.5 bits a weight", 152_500, 3.71, "<= 3.71 in <= 152,500 bytes and 2 minutes"),
    "q3": ("3 bit, 4.0 bits a weight", 130_016, 4.70, "<= 4.70 in <= 130,016 bytes and 2 minutes"),
    "q2": ("2 bit, 3.0 bits a weight", 97_512, 29.0, "<= 29 in <= 97,512 bytes and 2 minutes"),
}


def calibration_text(file: Path) -> None:
    """Writes the stories that calibration may see."""
    text = gzip.decompress((realdata() / "text" / "tinystories_sample_2MiB.txt.gz").read_bytes()).decode()
    stories = [story.strip() for story in text.split(SEPARATOR) if story.strip()]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"\n{SEPARATOR}\n".join(stories[FIRST:LAST]))
    (file.parent / "stories_scored.txt").write_text(f"\n{SEPARATOR}\n".join(stories[:40]))


def inhouse(home: Path, *arguments: str) -> Any:
    """The command's JSON. Raises CalledProcessError where it fails."""
    environment = {**os.environ, "INHOUSE_HOME": str(home)}
    run = subprocess.run(
        [sys.executable, "-m", "inhouse", *arguments, "--json"], env=environment, capture_output=True, text=True
    )
    if run.returncode:
        sys.stderr.write(run.stderr)
        run.check_returncode()
    return json.loads(run.stdout)


def child_seconds() -> float:
    """Processor time of all finished children."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(name: str, home: Path, build: Path) -> dict[str, Any]:
    """One size: compressed anew, then scored."""
    began, spent = time.monotonic(), child_seconds()
    recipe = f"bench/compress/recipes/stories_{name}.yaml"
    made = inhouse(home, "compress", str(model_folder()), f"stories-{name}", "--recipe", recipe, "--restart")
    wall, cpu = time.monotonic() - began, child_seconds() - spent
    reference, text = str(model_folder()), str(build / "stories_scored.txt")
    scores = inhouse(
        home, "eval", made["ref"], "--reference", reference, "--text", text, "--protocol", "stories"
    )  # fmt: skip
    tensors = inhouse(home, "show", made["ref"], "--tensors")
    rows = tensors if isinstance(tensors, list) else tensors["tensors"]
    return {
        "size": name,
        "bytes": sum(row["bytes"] for row in rows),
        "seconds": round(cpu, 1),
        "wall": round(wall, 1),
        **scores,
    }


def save(result: dict[str, Any]) -> None:
    """Into docs/compression-results.json."""
    name = result["size"]
    what, _, _, goal = SIZES[name]
    value = result["perplexity"]
    record(
        {
            "id": f"quant-{name}", "what": f"stories260K without gradients, {what}: perplexity of stories 0-39",
            "value": round(value, 4), "goal": goal, "bytes": result["bytes"], "seconds": result["seconds"],
            "command": f"python -m bench.compress.stories_quant {name} --record",
            "note": f"KLD {result['kld_mean']:.5f}, top-1 {100 * result['top1']:.2f} %; seconds are processor time of "
            f"the whole command on one thread ({result['wall']:.0f} s by the clock, the machine shared with others)",
        }
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", nargs="*", default=list(SIZES))
    parser.add_argument("--home", type=Path, default=Path("build/quant-home"))
    parser.add_argument("--record", action="store_true", help="put the figures into docs/compression-results.json")
    given = parser.parse_args()
    calibration_text(Path("build/stories_calibration.txt"))
    for name in given.sizes:
        result = measure(name, given.home.resolve(), Path("build"))
        print(json.dumps(result), flush=True)
        if given.record:
            save(result)


if __name__ == "__main__":
    main()
