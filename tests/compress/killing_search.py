"""Searches for a recipe that are killed (-9) at several points and then given again; prints what came of each as JSON.

    python -m tests.compress.killing_search MODEL SCRATCH

Every run is a fork of this process, as in `tests.compress.killing`. A candidate is `first`, `second` ... in the order
in which it is measured. Prints {point: {"killed", "found", "measured"}}: whether the first run was killed, what the
second found, and how many candidates it measured.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from inhouse.compress import finish, search
from inhouse.compress.candidates import Candidate, candidates
from inhouse.store.home import Home
from tests.compress.killing import die, forked

LIMIT = 120_000
TOLD = "told.json"


def few(layers: int) -> Iterator[Candidate]:
    """Four candidates, so that it does not take long."""
    wanted = ("rtn q8_0", "rtn q4_0", "rtn i4_g64", "gptq q4_0")
    return (one for one in candidates(layers) if one.name in wanted)


def armed(after: int, inside: bool) -> None:
    """From here on this process dies when so many candidates are measured: once the next has been written (`inside`),
    or at once."""
    measure, write = search._measure, finish.write
    done = 0

    def counted(*given: Any) -> Any:
        nonlocal done
        if done == after and not inside:
            die()
        found = measure(*given)
        done += 1
        return found

    def written(*given: Any) -> Any:
        made = write(*given)
        if done == after and inside:
            die()
        return made

    search._measure = counted  # type: ignore[assignment]
    finish.write = written  # type: ignore[assignment]


def searched(model: str, home: Home, folder: Path, resume: bool | None = None) -> None:
    """One search; what it found goes to a file."""
    measured: list[str] = []
    measure = search._measure

    def counted(candidate: Candidate, *given: Any) -> Any:
        measured.append(candidate.name)
        return measure(candidate, *given)

    search._measure = counted  # type: ignore[assignment]
    base = {"calibration": {"samples": 4, "length": 16}, "budget": {"threads": 1}}
    found = search.search(model, "best", search.Limit(LIMIT), base, home=home, resume=resume)
    folder.mkdir(exist_ok=True)
    (folder / TOLD).write_text(json.dumps({"found": found.to_dict(), "measured": measured}))


def main() -> None:
    """See the module."""
    model, scratch = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    search.LEAST, search.SEQUENCES = 4, 2
    search.candidates = few  # type: ignore[attr-defined]
    found: dict[str, Any] = {}
    for point, (after, inside, resume) in {
        "none": (None, False, None), "between": (2, False, True), "inside": (3, True, None)
    }.items():  # fmt: skip
        home, told = Home(scratch / point, scratch / point / "cache"), scratch / f"{point}.told"

        def disturbed(home: Home = home, told: Path = told, after: int | None = after, inside: bool = inside) -> None:
            armed(after or 0, inside)
            searched(model, home, told)

        killed = forked(disturbed) if after is not None else 0
        rest = forked(lambda home=home, told=told, resume=resume: searched(model, home, told, resume))  # type: ignore[misc]
        assert rest == 0, point
        found[point] = {"killed": killed == 9, **json.loads((told / TOLD).read_text())}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
