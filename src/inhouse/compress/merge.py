"""Merging models: the same tensors of several checkpoints to one, streamed, as a new version of the store.

Knows checkpoints and the store; what becomes of one tensor is `methods.merging`'s. Memory holds one tensor of each
model at a time.
"""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from inhouse.compress.methods.merging import (
    BASE,
    LARGEST,
    MergeOptions,
    check_models,
    check_sum,
    first_other_token,
    merge,
)
from inhouse.core.errors import UnsupportedError, UsageError
from inhouse.core.progress import Progress, silent
from inhouse.load.describe import Described, describe, read_tokenizer
from inhouse.load.export import export_model
from inhouse.load.export_targets import as_bytes, narrowed
from inhouse.load.importer import Imported, import_model
from inhouse.load.locate import Located, locate
from inhouse.load.seen_texts import safetensors_metadata, seen_text
from inhouse.model.families.kv_cache import without_kv
from inhouse.store.safetensors import write_safetensors
from inhouse.store.source import materialise, side_files
from inhouse.store.store import Store
from inhouse.store.stored_source import StoredSource
from inhouse.store.writing import TensorData

FLOATS = ("F32", "F16", "BF16")
MOST = {"F32": LARGEST, "F16": 65504.0, "BF16": 3.3895313892515355e38}  # the largest value of each


@dataclass(frozen=True, slots=True)
class Ingredient:
    """A model to merge, and its weight."""

    reference: str
    weight: float


@dataclass(frozen=True, slots=True)
class Opened:
    """A float checkpoint, open."""

    located: Located
    described: Described


def parse_ingredient(text: str) -> Ingredient:
    """`MODEL:WEIGHT`, or `MODEL` with weight 1. The last part is the weight: `qwen:2:0.5` is version 2 at 0.5.

    Raises UsageError."""
    name, colon, weight = text.rpartition(":")
    if not colon:
        return Ingredient(text, 1.0)
    try:
        number = float(weight)
    except ValueError:
        raise UsageError(
            f"{text!r} has no weight after its last colon",
            remedy="Write MODEL:WEIGHT, such as qwen:2:0.5",
            param="model",
        ) from None
    if not abs(number) <= LARGEST:
        raise UsageError(
            f"--model {text}: the weight {weight} is not finite in float32",
            remedy="Give a weight such as 0.5",
            param="model",
        )
    return Ingredient(name, number)


def merge_models(
    base: str | None,
    models: Sequence[Ingredient],
    name: str,
    options: MergeOptions,
    *,
    store: Store,
    progress: Progress = silent,
) -> Imported:
    """Merges and imports the result under `name`; its tokenizer, template and config are the base's (without one, the
    first model's).

    Raises:
        UsageError: the method needs a base, or weights do not suit it.
        UnsupportedError: shapes, families or vocabularies differ, or a model is not of float safetensors; it is named.
    """
    check_models(options, [model.weight for model in models])
    if options.needs_base and base is None:
        raise UsageError(f"{options.method} needs the base that the models were tuned from", remedy=BASE, param="base")
    with ExitStack() as stack:
        first = base if base is not None else models[0].reference
        root = open_floats(first, store, stack)
        others = [open_floats(model.reference, store, stack) for model in models]
        for other in others:
            check_alike(root, other)
        use_base = base is not None and options.needs_base
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="merge-", dir=store.home.tmp))
        folder = Path(scratch) / "model"
        folder.mkdir()
        seen = seen_text([first, *(model.reference for model in models)], store.home)
        equal = _Equal([*([first] if use_base else []), *(model.reference for model in models)])
        _write(root, others, [model.weight for model in models], options, use_base, folder, seen, equal, progress)
        parts = " + ".join(f"{model.weight:g} {model.reference}" for model in models)
        parent = f"{root.located.name}:{root.located.version}" if root.located.version else None
        imported = import_model(
            folder, name, store=store, how="move", origin=f"{options.method} of {parts}", parent=parent,
            derived=f"merged: {options.method} of {parts}" if parent else None, progress=progress,
        )  # fmt: skip
        return replace(imported, notes=(*imported.notes, *equal.notes()))


class _Equal:
    """Which of the models that are merged hold the same values, found while they are read."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._pairs = list(combinations(range(len(names)), 2))

    def see(self, tensors: Sequence[torch.Tensor]) -> None:
        """The same tensor of each model, in the order of the names."""
        self._pairs = [(a, b) for a, b in self._pairs if torch.equal(tensors[a], tensors[b])]

    def notes(self) -> list[str]:
        """One sentence for all, or one for each two."""
        if len(self._names) > 1 and len(self._pairs) == len(self._names) * (len(self._names) - 1) // 2:
            return [f"{' and '.join(self._names)} hold the same values: there was nothing to merge"]
        return [f"{self._names[a]} and {self._names[b]} hold the same values" for a, b in self._pairs]


def open_floats(reference: str, store: Store, stack: ExitStack) -> Opened:
    """A model as float tensors of a Hugging Face folder: its own, or, where it was fine-tuned, pruned or cut here and
    holds floats alone, an export of it that lasts as long as `stack`. Raises UnsupportedError for codes and factors."""
    located = locate(reference, store.home)
    described = describe(located.path)
    stack.callback(described.source.close)
    source = described.source
    if isinstance(source, StoredSource):
        factors = [*source.ranks, *source.trains, *source.stacks]
        coded = [*factors, *(name for name in source if source.coded(name))]
        if coded:
            kind = "of factors" if factors else source.coded(coded[0])
            raise UnsupportedError(
                f"merging needs floats, and {coded[0]!r} of {reference} is {kind}",
                remedy="Merge first, then compress what came of it", param="model",
            )  # fmt: skip
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="merge-", dir=store.home.tmp))
        export_model(reference, "safetensors", Path(scratch) / "model", home=store.home)
        described = describe(Path(scratch) / "model")
        stack.callback(described.source.close)
    elif source.format != "safetensors" or not described.path.is_dir():
        raise UnsupportedError(
            f"merging reads safetensors folders, {reference} is {source.format}",
            remedy="Merge the Hugging Face folders, then export", param="model",
        )  # fmt: skip
    return Opened(located, described)


def check_alike(a: Opened, b: Opened) -> None:
    """Raises UnsupportedError naming the first difference that a merge would turn into nonsense."""
    names = f"{a.located.name} and {b.located.name}"
    one, two = read_tokenizer(a.described), read_tokenizer(b.described)
    if (token := first_other_token(one, two)) is not None:
        raise UnsupportedError(
            f"{names} have different vocabularies ({one.vocab_size} and {two.vocab_size} tokens, id {token} differs "
            "first)", remedy="Merge models of one tokenizer; rows of other tokens have nothing to do with one another",
        )  # fmt: skip
    left, right = ({name: m.described.source.info(name) for name in m.described.source} for m in (a, b))
    if left.keys() != right.keys():
        odd = sorted(left.keys() ^ right.keys())
        raise UnsupportedError(f"{names} have different tensors: {odd[0]!r} is in one only", param=odd[0])
    for name, info in left.items():
        if info.shape != right[name].shape:
            raise UnsupportedError(f"{name!r} is {info.shape} and {right[name].shape} in {names}", param=name)
        if info.dtype not in FLOATS or right[name].dtype not in FLOATS:
            raise UnsupportedError(f"{name!r} is {info.dtype}; merging needs floats", param=name)
    if without_kv(a.described.spec) != without_kv(b.described.spec):  # what is cached is no part of a merge
        raise UnsupportedError(f"{names} are computed differently: their configs disagree beyond sizes")


def _write(
    root: Opened, others: Sequence[Opened], weights: Sequence[float], options: MergeOptions, use_base: bool,
    folder: Path, seen: str, equal: _Equal, progress: Progress,
) -> None:  # fmt: skip
    source = root.described.source
    total = sum(source.info(name).nbytes for name in source)
    done = 0

    def reading(name: str) -> Callable[[], npt.NDArray[np.uint8]]:
        def read() -> npt.NDArray[np.uint8]:
            nonlocal done
            done += source.info(name).nbytes
            progress("merge", done, total)
            base = torch.from_numpy(floats_of(root, name)) if use_base else None
            tensors = [torch.from_numpy(floats_of(other, name)) for other in others]
            equal.see([*([base] if base is not None else []), *tensors])
            merged, kind = merge(name, base, tensors, weights, options), source.info(name).dtype
            check_sum(name, merged, weights, MOST[kind])
            return as_bytes(narrowed(merged.numpy(), kind, name))

        return read

    tensors = [TensorData(source.info(name), reading(name)) for name in source]
    write_safetensors(folder / "model.safetensors", tensors, safetensors_metadata(seen))
    for file in side_files(root.described.path):
        if not file.name.endswith((".safetensors", ".index.json")):
            target = folder / file.relative_to(root.described.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)


def floats_of(model: Opened, name: str) -> npt.NDArray[np.float32]:
    """A tensor as float32 of the checkpoint's shape, the caller's own."""
    return np.array(materialise(model.described.source, name), np.float32)
