"""Runs one recipe again and again, each time killed (-9) at another point and then resumed; prints what came out.

    python -m tests.compress.killing MODEL RECIPE.yaml SCRATCH POINT...

A POINT is `line:N` (just after the N-th line of the journal is durable), `tear:N` (half of that line written),
`blob:N` (half of the N-th blob written) or `time:SECONDS`. Every run is a fork of this process, which has imported
everything and opened nothing, so that a kill costs no imports. Prints {point: {digest, killed}} as JSON.
"""

import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inhouse.compress import journal as journals
from inhouse.compress.pipeline import compress
from inhouse.compress.recipe import load_recipe, parse_recipe
from inhouse.store.home import Home
from inhouse.store.store import Store


def forked(action: Callable[[], None]) -> int:
    """Runs the action in a child; its wait status."""
    child = os.fork()
    if not child:
        status = 1
        try:
            action()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point: str) -> None:
    """From here on this process dies at that point."""
    kind, _, number = point.partition(":")
    if kind == "time":
        threading.Timer(float(number), die).start()
        return
    left = int(number)
    append, write = journals.Journal.append, journals.Journal.write

    def counted_append(self: journals.Journal, line: Any) -> None:
        nonlocal left
        left -= 1
        if kind == "tear" and left == 0:
            text = json.dumps(line)
            with open(self.folder / journals.JOURNAL, "a") as file:
                file.write(text[: len(text) // 2])
            die()
        append(self, line)
        if left == 0:
            die()

    def counted_write(self: journals.Journal, pieces: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            (self.data / "99999999.bin").write_bytes(bytes(1000))
            die()
        return write(self, pieces)

    if kind == "blob":
        journals.Journal.write = counted_write  # type: ignore[method-assign]
    else:
        journals.Journal.append = counted_append  # type: ignore[method-assign]


def digest(home: Home) -> str:
    """Of the version that was made."""
    with Store(home) as store:
        return store.catalog.resolve("small").digest


def main() -> None:
    """See the module."""
    model, recipe_file, scratch = sys.argv[1:4]
    torch.set_num_threads(1)
    recipe = parse_recipe(load_recipe(Path(recipe_file)))
    found: dict[str, dict[str, Any]] = {}
    for at, point in enumerate(sys.argv[4:]):
        home = Home(Path(scratch) / f"home{at}", Path(scratch) / f"home{at}" / "cache")

        def run(home: Home = home, point: str | None = None) -> None:
            if point:
                arm(point)
            compress(model, "small", recipe, home=home)

        began = time.monotonic()
        killed = forked(lambda point=point: run(point=point)) if point != "none" else 0  # type: ignore[misc]
        rest = forked(run)
        found[point] = {"killed": os.WIFSIGNALED(killed), "rest": rest, "seconds": time.monotonic() - began}
        if rest == 0:
            found[point]["digest"] = digest(home)
        shutil.rmtree(home.data, ignore_errors=True)
    print(json.dumps(found))


if __name__ == "__main__":
    assert np.__version__
    main()
