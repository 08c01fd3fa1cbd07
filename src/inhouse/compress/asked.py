"""What a user asks for, at the terminal or from Python, as a checked recipe: a recipe, a short name, or a limit that a
search keeps. Knows the parts; prints nothing."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inhouse.compress.recipe import Recipe, load_recipe, parse_recipe
from inhouse.compress.search import Found, Limit, search
from inhouse.compress.shorts import SHORTS, short_recipe
from inhouse.core.errors import UsageError
from inhouse.core.progress import Progress, silent
from inhouse.core.settings import parse_size

Asked = str | Path | Mapping[str, Any]


def check_one(**given: object) -> str:
    """The name of the only one that is not None. Raises UsageError unless exactly one is."""
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        said = "none is given" if not names else f"{' and '.join(names)} are given"
        raise UsageError(f"give one of {', '.join(given)}; {said}", param="recipe")
    return names[0]


def asked_recipe(
    recipe: Asked | None, to: str | None, texts: Sequence[str | Path], ram: str | int | None, threads: int | None
) -> Recipe:
    """A recipe file, a mapping, or a short name (`to`, or a `recipe` that names one), with what is given beside it in
    place of what it says itself. Raises UsageError."""
    if isinstance(recipe, Mapping):
        document = dict(recipe)
    elif recipe is None or str(recipe) in SHORTS or not Path(recipe).exists():
        document = short_recipe(str(to if recipe is None else recipe))
    else:
        document = load_recipe(Path(recipe))
    for key, given in _beside(texts, ram, threads).items():
        said = document.get(key) or {}
        if given and isinstance(said, Mapping):  # what is no mapping is named as that when it is read
            document[key] = {**said, **given}
    return parse_recipe(document)


def search_recipe(
    model: str, name: str, target_size: str | int | None, max_kld: float | None, texts: Sequence[str | Path],
    ram: str | int | None, threads: int | None, progress: Progress = silent, resume: bool | None = None,
) -> Found:  # fmt: skip
    """The recipe of least divergence within `target_size` (bytes, or `1.2GB`), or of least size within `max_kld` (mean
    nats a token). `resume` as `search` has it. Raises UsageError, CapacityError, NotFoundError, ConflictError."""
    if max_kld is not None and not (math.isfinite(max_kld) and max_kld > 0):
        raise UsageError(f"max_kld is {max_kld}, must be above 0", param="max_kld")
    size = parse_size(target_size, "target_size", 1) if target_size is not None else None
    return search(model, name, Limit(size, max_kld), _beside(texts, ram, threads), resume=resume, progress=progress)


def _beside(texts: Sequence[str | Path], ram: str | int | None, threads: int | None) -> dict[str, dict[str, Any]]:
    """The parts of a recipe that flags say."""
    budget = {key: value for key, value in (("ram", ram), ("threads", threads)) if value is not None}
    return {"budget": budget, **({"calibration": {"texts": [str(text) for text in texts]}} if texts else {})}
