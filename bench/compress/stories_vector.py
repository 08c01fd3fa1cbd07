"""stories260K in vector codes: one set of codebooks for all matrices, every byte counted, scored by the native engine.

    python -m bench.compress.stories_vector [--books 2] [--rows 128] [--record]

Calibrated on stories from number 100 on; no gradients. Codebooks are shared because those of one matrix (2 KiB a book)
would outweigh its codes in a model 64 wide.
"""

import argparse
import json
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from bench.compress.results import record
from bench.compress.scoring import score
from bench.compress.teacher_text import SCORED, model_folder, sample_stories

from inhouse.compress.pipeline import compress
from inhouse.compress.recipe import parse_recipe
from inhouse.store.home import Home
from inhouse.store.store import Store

STORIES = 300  # that rows are drawn from


def measure(books: int, rows: int) -> dict[str, Any]:
    """Compresses into a store of its own and scores what was stored."""
    with TemporaryDirectory(prefix="vector-") as folder:
        text = Path(folder) / "stories.txt"
        text.write_text("\n<|endoftext|>\n".join(sample_stories()[SCORED : SCORED + STORIES]))
        recipe = parse_recipe(
            {
                "calibration": {"texts": [str(text)], "samples": rows, "length": 256, "mode": "documents"},
                "stages": [{"quantize": {"method": "vector-shared", "books": books}}],
            }
        )
        os.environ["INHOUSE_HOME"] = str(Path(folder) / "home")  # the pipeline's own sessions look there as well
        home, began = Home.find(), time.process_time()
        done = compress(str(model_folder()), "vector", recipe, home=home)
        seconds = time.process_time() - began
        with Store(home) as store:
            found = score(store.folder(store.catalog.resolve(done.ref)))
    return {"bytes": done.result["proof"]["nbytes"], "seconds": seconds, **found.to_dict()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--books", type=int, default=2)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--record", action="store_true", help="put the figure into docs/compression-results.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(given.books, given.rows)
    found["bits"] = 8 * found["bytes"] / 260032
    print(json.dumps(found, indent=1))
    if given.record:
        goal = "<= 29 at 3.0 bits without gradients" if given.books == 2 else None
        record(
            {
                "id": f"vector-{given.books}", "goal": goal, "value": round(found["perplexity"], 4),
                "what": f"stories260K, vector codes of {given.books} shared codebooks, perplexity of stories 0-39",
                "bytes": found["bytes"], "seconds": round(found["seconds"]),
                "command": f"python -m bench.compress.stories_vector --books {given.books} --rows {given.rows}",
                "note": f"{found['bits']:.2f} bits a weight over all tensors, codebooks and norms counted; native; "
                "seconds of processor time, the pipeline's own measurements included",
            }
        )  # fmt: skip


if __name__ == "__main__":
    main()
