"""Binding: every canonical weight of a model from its checkpoint, nothing missing and nothing left over.

Knows families' derivations and packed formats; does not know where the model came from or where packed weights are
kept. Work in progress is bounded: as many matrices as there are threads, whatever the model's size.
"""

import os
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import UnsupportedError, UsageError
from inhouse.core.progress import Progress, silent
from inhouse.core.tensors import CodedSource, Coding, TensorSource
from inhouse.load.packing import PLAIN, QUANTIZE, Part, make_weight, plan_part
from inhouse.load.packing_coded import format_note
from inhouse.model.build import Spec
from inhouse.model.families.family import Derive, Family, none_left
from inhouse.runtime.executor import Weight
from inhouse.runtime.program import ProgramSet
from inhouse.store.stored_source import StoredSource

MAX_THREADS = 8  # packing is bound by memory long before


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be bound, in the order of the forward pass, and what cannot be done as asked."""

    parts: tuple[Part, ...]
    notes: tuple[str, ...]
    columns: Mapping[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    """Canonical name -> order of the input columns, of matrices that keep another than the model's (act-order)."""

    @property
    def formats(self) -> dict[str, str]:
        """Canonical name -> packed format, of all matrices."""
        return {part.spec.name: part.format for part in self.parts if part.format != "vector"}


def plan_binding(
    source: TensorSource, spec: Spec, family: Family, programs: ProgramSet, wish: str | None = None
) -> Plan:
    """Decides every weight's source and format from names, shapes and types alone.

    Args:
        wish: None, `q8`, `q6` or `q4`: what float matrices are packed as. Tensors that are quantised in the file stay
            what they are, and a note says so.

    Raises:
        FormatError: tensors are missing or left over, or one has another shape than the config says; it names them.
        UnsupportedError: a type without a packed form. UsageError: an unknown wish.
    """
    if wish is not None and wish not in QUANTIZE:
        raise UsageError(f"unknown quantisation {wish!r}", remedy="Use q8, q6 or q4.", param="quantize")
    own = source if isinstance(source, StoredSource) else None
    derived = family.derive(spec, set(source)) if own is None else _as_named(own, programs)
    lacking = [name for name in programs.weights if name not in derived]
    if lacking:
        raise UnsupportedError(f"the family {family.name} does not derive {', '.join(lacking[:5])}", param=lacking[0])
    coded = source if isinstance(source, CodedSource) else None
    parts = tuple(
        plan_part(
            weight, derived[name], source.info(derived[name].source), wish or "", _coding(coded, derived[name]),
            "" if own is None else own.coded(derived[name].source),
        )
        for name, weight in programs.weights.items()
    )  # fmt: skip
    notes = (*_notes(parts, wish), *_coded_notes(parts), *(coded.notes() if coded else ()))
    return Plan(parts, notes, {} if coded is None and own is None else _columns(coded or own, parts))


def _as_named(source: StoredSource, programs: ProgramSet) -> dict[str, Derive]:
    """Canonical names stand for themselves; the `at` of an embedding's side branch is its `a`, transposed."""
    derived: dict[str, Derive] = {}
    for name, weight in programs.weights.items():
        derived[name] = Derive(name, weight.shape, weight.shape)
        if name.endswith(".at.weight") and name not in source:
            stem = name.removesuffix(".at.weight")
            derived[name] = Derive(f"{stem}.a.weight", weight.shape[::-1], weight.shape, transpose=True)
    used = {derive.source for derive in derived.values()}
    none_left([name for name in used if name not in source], "lacks", "Compress the model again, or fetch it whole")
    none_left([name for name in source if name not in used], "has, beyond the model's own,", "Check config.json")
    return derived


def _coding(source: CodedSource | None, derive: Derive) -> Coding | None:
    return None if source is None else source.coding(derive.source)


def _columns(source: CodedSource | StoredSource | None, parts: Sequence[Part]) -> dict[str, npt.NDArray[np.int64]]:
    """Raises UnsupportedError where a table of rows keeps its columns in an order of their own."""
    found: dict[str, npt.NDArray[np.int64]] = {}
    for part in parts:
        own = isinstance(source, StoredSource) and part.format != "vector" and not part.derive.transpose
        order = source.columns(part.info.name) if source is not None and (own or part.coding is not None) else None
        if order is None:
            continue
        if part.spec.kind != "linear":
            raise UnsupportedError(f"{part.info.name!r} is an embedding in act-order", param=part.info.name)
        found[part.spec.name] = order
    return found


def _coded_notes(parts: Sequence[Part]) -> Iterator[str]:
    """What is kept at more bits than the file's, one sentence for each way."""
    kept = [(part.info.dtype, format_note(part.coding, part.format)) for part in parts if part.coding is not None]
    for (dtype, note), count in Counter(pair for pair in kept if pair[1]).items():
        yield f"{count} matrices ({dtype}) {note}"


def _notes(parts: Sequence[Part], wish: str | None) -> Iterator[str]:
    matrices = [part for part in parts if part.format != "vector"]
    if wish:
        kept = [part for part in matrices if not part.quantize and part.info.dtype not in PLAIN]
        if kept:
            types = ", ".join(sorted({part.info.dtype for part in kept}))
            yield (
                f"{len(kept)} of {len(matrices)} matrices were quantised in the file already ({types}) and were kept "
                f"as they are; {wish} was applied to the others"
            )
        if wish == "q4" and any(part.quantize == "q6" for part in matrices):
            yield "embedding and head were packed as q6, the other matrices as q4"
    rounded = [part.info.name for part in parts if part.info.dtype == "F64"]
    if rounded:
        yield f"{len(rounded)} F64 tensors were rounded to F32: {', '.join(rounded[:3])}"


def bind(
    source: TensorSource,
    plan: Plan,
    *,
    progress: Progress = silent,
    threads: int | None = None,
) -> Iterator[tuple[Part, Weight]]:
    """The weights one by one, in the plan's order, packed by threads ahead of the consumer.

    Args:
        progress: told ("pack weights", bytes of the file done, bytes in all).

    Raises FormatError for a value that its format cannot hold.
    """
    total = sum(part.info.nbytes for part in plan.parts)
    workers = min(threads or os.cpu_count() or 1, MAX_THREADS)
    done = 0
    waiting: deque[tuple[Part, Future[Weight]]] = deque()
    parts = iter(plan.parts)
    with ThreadPoolExecutor(workers, "pack") as pool:
        try:
            while True:
                while len(waiting) <= workers and (part := next(parts, None)) is not None:
                    waiting.append((part, pool.submit(make_weight, part, source)))
                if not waiting:
                    return
                part, future = waiting.popleft()
                weight = future.result()
                done += part.info.nbytes
                progress("pack weights", done, total)
                yield part, weight
        finally:
            for _, future in waiting:
                future.cancel()
