"""What a tuned model learned, as a LoRA adapter for its base: extraction over two checkpoints, matrix by matrix.

Knows checkpoints; the pair of factors of one matrix, and the PEFT folder, are `methods.lora_extract`'s.
"""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from inhouse.compress.merge import Opened, check_alike, floats_of, open_floats
from inhouse.compress.methods.lora_extract import Extracted, extract, write_peft
from inhouse.core.errors import ConflictError, UnsupportedError, UsageError
from inhouse.core.progress import Progress, silent
from inhouse.store.store import Store

SAME = 1e-7  # share of a matrix's norm below which a difference is none


@dataclass(frozen=True, slots=True)
class Adapter:
    """What was written: matrices changed, the largest share of a difference that the rank leaves out, and tensors that
    differ and that no adapter of linears can carry."""

    folder: Path
    matrices: int
    worst: float
    left_out: tuple[str, ...]


def extract_adapter(
    base: str, tuned: str, folder: Path, rank: int, *, store: Store, progress: Progress = silent
) -> Adapter:
    """Writes the adapter of that rank that makes `tuned` of `base`, as a PEFT folder.

    Raises UsageError (rank, nothing differs), ConflictError (the folder exists), UnsupportedError for models that
    differ in more than values.
    """
    if rank < 1:
        raise UsageError(f"rank is {rank}, must be at least 1", param="rank")
    if folder.exists():
        raise ConflictError(f"{folder} is there already", remedy="Name a folder that is not")
    with ExitStack() as stack:
        root, other = open_floats(base, store, stack), open_floats(tuned, store, stack)
        check_alike(root, other)
        linears = _linears(root)
        left_out: list[str] = []
        pairs = list(_pairs(root, other, linears, rank, left_out, progress))
    try:
        count = write_peft(folder, pairs, base=base)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Adapter(folder, count, max(pair.error for pair in pairs), tuple(left_out))


def _linears(model: Opened) -> set[str]:
    """Tensors of the checkpoint that are one plain linear of the layers each."""
    described = model.described
    derived = described.family.derive(described.spec, set(described.source))
    weights = described.programs().weights
    found = {}
    for name, derive in derived.items():
        whole = not derive.transpose and derive.outputs() is None
        if name in weights and weights[name].kind == "linear" and name != "head.weight" and whole:
            found[derive.source] = name
    if not found:
        raise UnsupportedError(f"{described.family.name} has no linear that an adapter could change on its own")
    return set(found)


def _pairs(
    root: Opened, other: Opened, linears: set[str], rank: int, left_out: list[str], progress: Progress
) -> Iterator[Extracted]:
    names = list(root.described.source)
    for done, name in enumerate(names, 1):
        old, new = (torch.from_numpy(floats_of(model, name)) for model in (root, other))
        if name in linears:
            pair = extract(name.removesuffix(".weight"), old, new, rank, least=SAME)
            if pair is not None:
                yield pair
        elif not torch.equal(old, new):
            left_out.append(name)
        progress("extract", done, len(names))
