"""`--target-size` and `--max-kld`: measures whole recipes and takes the best that keeps the limit.

Every candidate is run, written as it would be stored, and compared with the model through the engine; what was measured
is kept in a file, so that a search that was killed goes on, and one that was finished answers again without measuring.
Sizes are those of the stored tensors. Knows candidates and the pipeline's parts; the version itself is then made by the
pipeline, under the ordinary gate.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from inhouse.compress import finish
from inhouse.compress.calibrate import read_texts
from inhouse.compress.candidates import Candidate, candidates, chosen
from inhouse.compress.evaluate import compare_pieces
from inhouse.compress.fingerprint import surroundings
from inhouse.compress.generated import sample_documents
from inhouse.compress.own_text import OwnText
from inhouse.compress.pipeline import prepare
from inhouse.compress.plan import predict
from inhouse.compress.recipe import Recipe, parse_recipe
from inhouse.compress.runs import MEASURED, SEARCHES, held_folder
from inhouse.compress.stages import StageRun
from inhouse.compress.work import Work
from inhouse.core.errors import CapacityError, InhouseError, NotFoundError, UsageError
from inhouse.core.progress import Progress, silent
from inhouse.core.settings import load_settings
from inhouse.engine.session import Session
from inhouse.load.locate import content_digest, locate
from inhouse.model.spec import ModelSpec
from inhouse.store.home import Home
from inhouse.store.refs import check_name
from inhouse.store.writing import atomic_file

LEAST = 20  # candidates that are measured
SEQUENCES, TOKENS, SEED = 8, 256, 700_001  # of the model's own text that judges candidates; the gate draws other text


@dataclass(frozen=True, slots=True)
class Limit:
    """Exactly one of them."""

    nbytes: int | None = None
    max_kld: float | None = None

    def keeps(self, nbytes: int, kld: float) -> bool:
        return nbytes <= self.nbytes if self.nbytes is not None else kld <= (self.max_kld or 0.0)


@dataclass(frozen=True, slots=True)
class Measured:
    """What a candidate came to; `error` where it could not be run."""

    name: str
    nbytes: int = 0
    kld: float = 0.0
    plain: bool = False
    error: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """The search's result: the recipe of the best candidate, and all that were measured."""

    recipe: Recipe
    best: Measured
    measured: Sequence[Measured]

    @property
    def front(self) -> list[Measured]:
        """The candidates that no other beats in both size and divergence, by size."""
        good = [m for m in self.measured if not m.error]
        return sorted((m for m in good if not any(_beats(o, m) for o in good)), key=lambda m: m.nbytes)

    def to_dict(self) -> dict[str, Any]:
        """For the report and `--json`."""
        front = {m.name for m in self.front}
        return {"best": self.best.name, "candidates": [asdict(m) | {"front": m.name in front} for m in self.measured]}


def _beats(a: Measured, b: Measured) -> bool:
    return a.nbytes <= b.nbytes and a.kld <= b.kld and (a.nbytes, a.kld) != (b.nbytes, b.kld)


def search(
    model: str,
    name: str,
    limit: Limit,
    base: Mapping[str, Any],
    *,
    resume: bool | None = None,
    home: Home | None = None,
    progress: Progress = silent,
) -> Found:
    """Finds the recipe: of least divergence within `limit.nbytes`, or of least size within `limit.max_kld`.

    Args:
        base: the recipe's other parts (calibration, budget, gates); no stages.
        resume: True: only go on with what an earlier search of the same name measured; False: measure anew; None: go
            on where model, texts, code, libraries and machine are the same. The limit may be another.

    Raises:
        CapacityError: no candidate can reach the size, said before any is run, with the least that can be reached;
            none of those measured keeps the limit; or the disk is full: what was measured is kept. UsageError: the
            model is no decoder with a head. NotFoundError: nothing to resume. ConflictError: another process searches.
    """
    home = home or Home.find()
    home.create()
    folder = home.data / SEARCHES / check_name(name)
    with held_folder(folder, name, MEASURED):
        if resume is False:
            (folder / MEASURED).unlink(missing_ok=True)
        pool, wanted = _pool(model, limit, base, folder, home)
        kept = _Kept(folder / MEASURED, _key(model, pool[0].document(base), home))
        if resume and not kept.done:
            raise NotFoundError(
                f"there is no unfinished search for {name}", remedy="Leave --resume out", param="resume"
            )
        _measure_missing(wanted, kept, model, base, folder, home, progress)
    measured = [kept.done[candidate.name] for candidate in wanted]
    best = _best(measured, limit)
    recipe = parse_recipe(next(c for c in pool if c.name == best.name).document(base))
    return Found(recipe, best, measured)


def _measure_missing(
    wanted: Sequence[Candidate], kept: "_Kept", model: str, base: Mapping[str, Any], folder: Path, home: Home,
    progress: Progress,
) -> None:  # fmt: skip
    """Measures the candidates that `kept` lacks; opens nothing where it lacks none."""
    missing = [candidate for candidate in wanted if candidate.name not in kept.done]
    if missing:
        threads = base.get("budget", {}).get("threads")
        own = OwnText(model, threads)
        with Session.open(model, load_settings({"threads": threads})) as reference:
            length = min(TOKENS, reference.engine.context_length)
            texts = [row for row in sample_documents(reference, SEQUENCES, length=length, seed=SEED) if len(row) > 1]
            for done, candidate in enumerate(missing, len(wanted) - len(missing)):
                progress("search", done, len(wanted))
                kept.add(*_measure(candidate, model, base, texts, reference, folder, home, own))
    progress("search", len(wanted), len(wanted))


def _pool(
    model: str, limit: Limit, base: Mapping[str, Any], folder: Path, home: Home
) -> tuple[list[Candidate], list[Candidate]]:
    """All candidates, and those to measure. Raises CapacityError for a size that none can reach."""
    with Work.open(model, folder / "look", home=home) as work:
        if not isinstance(work.spec, ModelSpec) or work.spec.headless:
            raise UsageError(f"{work.spec.family} has no logits to compare", param="model")
        pool = list(candidates(work.spec.layers))
        parameters = sum(math.prod(work.shape(name)) for name in work.names())
        smallest = min(
            (predict(work, parse_recipe(c.document(base)))["bytes"] for c in pool if len(c.stages) == 1), default=0
        )
    shutil.rmtree(folder / "look", ignore_errors=True)
    if limit.nbytes is not None and limit.nbytes < smallest:
        raise CapacityError(
            f"{limit.nbytes} bytes cannot be reached: the smallest recipe tried takes {smallest}",
            remedy="Ask for more, or take layers or width away first (a recipe with structured pruning and healing)",
            wanted=limit.nbytes, least=smallest,
        )  # fmt: skip
    bits = 8 * limit.nbytes / parameters if limit.nbytes is not None else None
    return pool, chosen(pool, bits, LEAST)


def _measure(
    candidate: Candidate, model: str, base: Mapping[str, Any], texts: Sequence[list[int]], reference: Session,
    folder: Path, home: Home, own: OwnText,
) -> tuple[Measured, bool]:  # fmt: skip
    """Runs a candidate in a folder that is gone afterwards; also whether it would come to the same another time.

    Raises CapacityError where the disk or the memory ends while it runs."""
    scratch = folder / "candidate"
    shutil.rmtree(scratch, ignore_errors=True)
    began = False
    try:
        prepared = prepare(model, parse_recipe(candidate.document(base)), scratch / "run", home, own=own)
        began = True
        with prepared.work as work:
            for at, stage in enumerate(prepared.recipe.stages):
                StageRun(work, stage, f"{at}.{stage.kind}", prepared.calibration, prepared.memory).run()
            stored, _ = finish.write(work, scratch / "model", {"summary": candidate.name})
        with Session.open(str((scratch / "model").resolve()), load_settings({}), cache=False) as session:
            kld = compare_pieces(session, texts, "own", reference)[0].kld_mean or 0.0
        return Measured(candidate.name, stored.nbytes, round(kld, 9), candidate.plain), True
    except InhouseError as error:  # a candidate that this model's shapes do not allow is no candidate
        no_room = isinstance(error, CapacityError)
        if no_room and began:
            raise
        return Measured(candidate.name, plain=candidate.plain, error=error.message), not no_room
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _best(measured: Sequence[Measured], limit: Limit) -> Measured:
    good = [m for m in measured if not m.error]
    kept = [m for m in good if limit.keeps(m.nbytes, m.kld)]
    if kept:
        return min(kept, key=lambda m: (m.kld, m.nbytes) if limit.nbytes is not None else (m.nbytes, m.kld))
    nearest = min(good, key=lambda m: m.nbytes if limit.nbytes is not None else m.kld, default=None)
    if nearest is None:
        raise CapacityError("no candidate could be run", remedy=measured[0].error if measured else "")
    asked = f"{limit.nbytes} bytes" if limit.nbytes is not None else f"a divergence of {limit.max_kld:g}"
    raise CapacityError(
        f"none of {len(good)} measured recipes keeps {asked}; the nearest is {nearest.name}: {nearest.nbytes} bytes, "
        f"KL {nearest.kld:.5f}",
        remedy="Ask for less, or write a recipe that heals",
    )


class _Kept:
    """What was measured so far, on disk."""

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        self._path, self._key = path, key
        self.done: dict[str, Measured] = {}
        if path.is_file():
            try:
                document = json.loads(path.read_text("utf-8"))
                if document["key"] == key:
                    self.done = {entry["name"]: Measured(**entry) for entry in document["measured"]}
            except (ValueError, KeyError, TypeError):
                self.done = {}  # a file of another time: measured anew
        self._lasting = list(self.done.values())

    def add(self, measured: Measured, lasting: bool = True) -> None:
        """Takes it in; on disk only what would come to the same another time."""
        self.done[measured.name] = measured
        if lasting:
            self._lasting.append(measured)
            document = {"key": self._key, "measured": [asdict(m) for m in self._lasting]}
            with atomic_file(self._path) as file:
                file.write(json.dumps(document, indent=1).encode())


def _key(model: str, document: Mapping[str, Any], home: Home) -> dict[str, Any]:
    """What makes measurements comparable: the model, the recipe's other parts with the contents of its texts, and what
    else decides results."""
    recipe = parse_recipe(document)
    files = [file for group in recipe.calibration.files.values() for file in group]
    asked = {key: part for key, part in document.items() if key != "stages"}
    found: dict[str, Any] = json.loads(json.dumps({
        "model": content_digest(locate(model, home)), "asked": asked, "texts": [t.sha256 for t in read_texts(files)],
        "threads": recipe.threads or torch.get_num_threads(), **surroundings(),
    }, default=str))  # fmt: skip
    return found
