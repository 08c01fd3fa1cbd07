"""One matrix through one method: statistics or their lack, formats that do not fit, runs of rows, masks, factors.

Knows how a method of scope `matrix` is called and what its result becomes in a Work; knows no method.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from inhouse.compress.fallbacks import KEY, fallback
from inhouse.compress.method import Method
from inhouse.compress.recipe import Stage
from inhouse.compress.stats import LinearStats
from inhouse.compress.table import METHODS
from inhouse.compress.work import Work
from inhouse.core.errors import FormatError, UnsupportedError, UsageError
from inhouse.runtime.form import Form
from inhouse.runtime.packed import FORMATS, Packed, aligned_empty, is_float, pack_float, packed_nbytes
from inhouse.runtime.packed_sparse import sparse_formats, to_sparse
from inhouse.runtime.packed_stored import stored_nbytes_of

# What takes the place of a format whose super-blocks a matrix is no multiple of: as many bits, smaller groups.
NARROWER: Mapping[str, str] = {
    "q2_k": "u2_g32", "q3_k": "u3_g32", "q4_k": "q4_1", "q5_k": "q5_1", "q6_k": "q6_0", "iq4_xs": "iq4_nl",
    "tq2_0": "u2_g32",
}  # fmt: skip
OTHERWISE = "Leave the weight out by `exclude`, or give it another format or method by `overrides`"
SLAB_BYTES = 64 << 20  # of float32 rows that a method gets at once of a large matrix, where its rows are apart
SAME: Mapping[str, str] = {"q4_0": "i4_g32", "q8_0": "i8_g32"}  # the same tiles, and the name that sparse forms know
SPARSE = ("mask", "pairs", "columns")  # codings of formats that leave zeros out


@dataclass(slots=True)
class Chosen:
    """What is to be done to one matrix: a method's row, its options, a format as the recipe names it. `asked`: the
    first of all, in words."""

    row: Method
    options: Any
    format: str
    stats: LinearStats | None
    name: str = ""
    asked: str = ""
    record: dict[str, Any] = field(default_factory=dict)  # what the journal keeps of the unit

    def say(self, done: str, why: str, part: str = "") -> None:
        """Adds to what was not done as asked; `part`: of the matrix, where it is stored in several."""
        tensor = f"{self.name} ({part})" if part else self.name
        self.record.setdefault(KEY, []).append(fallback(tensor, self.asked, done, why))


@dataclass(frozen=True, slots=True)
class Source:
    """The floats of a matrix, read by rows so that a large one need not be in memory whole."""

    work: Work
    name: str
    floats: bool  # beneath its form

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.work.shape(self.name)
        return rows, columns

    def __getitem__(self, part: slice) -> Tensor:
        if part.stop is None:
            return self.work.float_value(self.name) if self.floats else self.work.value(self.name)
        return self.work.rows(self.name, part.start, part.stop, floats=self.floats)


def compress_matrix(work: Work, stage: Stage, name: str, stats: LinearStats | None) -> dict[str, Any]:
    """Does the stage's method to one matrix and puts the result; what is to be recorded of it. What a method raises
    names the matrix and what was asked of it."""
    try:
        return _compressed(work, stage, name, stats)
    except (UsageError, FormatError) as error:
        method, fmt, _ = stage.choice(name)
        message = f"{name} ({f'{method} {fmt}'.strip()}): {error.message}"
        raise type(error)(
            message, remedy=(error.remedy if isinstance(error, UsageError) else "") or OTHERWISE, param=name
        ) from None


def _compressed(work: Work, stage: Stage, name: str, stats: LinearStats | None) -> dict[str, Any]:
    method, fmt, options = stage.choice(name)
    chosen = with_statistics(Chosen(METHODS[method], options, fmt, stats, name, f"{method} {fmt}".strip()))
    form = work.form(name)
    if chosen.row.family == "quantize" and form is not None and _has_factors(form):
        turned = work.programs.weights[name].kind == "embedding"  # its `a` is read transposed, which codes are not
        made: Any = _factors(chosen, form, ("a",) if turned else ())
    else:
        under = chosen.row.family == "quantize" or chosen.row.takes_form
        made = _packed(chosen, Source(work, name, under), work.mask(name), form)
    _keep(work, name, chosen, made)
    return {"method": chosen.row.name, "format": _format_of(made, chosen), **chosen.record, **_findings(stats)}


def with_statistics(chosen: Chosen) -> Chosen:
    """The same, or the method's fallback where it needs statistics and there are none."""
    row, stats = chosen.row, chosen.stats
    if row.need(chosen.options) == "nothing" or (stats is not None and stats.count):
        return chosen
    why = "no calibration token reached it" if stats is not None else "its inputs are token ids"
    chosen.say(f"{row.fallback or row.name} {chosen.format}".strip() + " without statistics", why)
    if not row.fallback:
        return replace(chosen, stats=None)
    other = METHODS[row.fallback]
    return replace(chosen, row=other, options=other.options(**other.defaults), stats=None)


def fitting(fmt: str, shape: tuple[int, ...]) -> tuple[str, str]:
    """(the format, or one of as many bits where the matrix is no multiple of its super-blocks; why that).
    Raises UnsupportedError where there is none. Sparse formats are asked for by their plain base."""
    base = FORMATS[fmt].base if FORMATS[fmt].coding in SPARSE else fmt
    try:
        packed_nbytes(base, (shape[0], shape[1]))
        return fmt, ""
    except UnsupportedError as error:
        other = NARROWER.get(fmt)
        if other is None:
            raise
        return other, error.message


def _packed(chosen: Chosen, weight: Source, mask: Tensor | None, form: Form | None) -> Any:
    """The method's result, in a sparse format where the recipe names one."""
    fmt = chosen.format
    if fmt:
        fmt, why = fitting(fmt, weight.shape)
        if why:
            chosen.say(f"{chosen.row.name} {fmt}", why)
    wanted = fmt if fmt and FORMATS[fmt].coding in SPARSE else ""
    made = _call(chosen, weight, FORMATS[fmt].base if wanted else fmt, mask, form)
    if not isinstance(made, Form) or made.main is None:
        return made
    if wanted:
        return replace(made, main=to_sparse(made.main, wanted))
    return made  # `finish` stores it sparse where that takes fewer bytes; until then stages see plain codes


def sparsest(main: Packed) -> tuple[Packed, str]:
    """The matrix in whichever of its plain and sparse forms is stored in the fewest bytes; and where that is the plain
    one, why."""
    plain = Packed(SAME[main.format], main.shape, main.data) if main.format in SAME else main
    names = sparse_formats(plain.format)
    if not names:
        return main, f"{main.format} has no sparse form that holds the same values"
    best, least = main, 0
    for name in names:
        try:
            other = to_sparse(plain, name)
        except UsageError:
            continue  # not two of four
        size = stored_nbytes_of(other)
        least = min(least or size, size)
        if size < stored_nbytes_of(best):
            best = other
    return best, "" if best is not main else f"{stored_nbytes_of(main)} bytes, sparse {least}"


def sparsest_floats(value: npt.NDArray[np.float32], main: Packed) -> tuple[Packed, str]:
    """The same for floats: `main` holds `value`, float32 [out, in], as it is or rounded. What bf16 holds exactly is
    stored as bf16 or as columns of it, where that takes fewer bytes."""
    held = main.dequantize() if main.format != "f32" else value
    narrow = pack_float(held, "bf16")
    if not np.array_equal(narrow.dequantize(), held):
        return main, (
            f"columns hold bf16, and {main.format} values are not all exact in it (a stage `quantize: {{method: round, "
            "format: bf16}` after it rounds them)"
        )
    sparse, why = sparsest(narrow)
    return (sparse, "") if stored_nbytes_of(sparse) < stored_nbytes_of(main) else (main, why)


def _has_factors(form: Form) -> bool:
    """Whether it is more than one matrix."""
    return form.low_rank is not None or form.outer is not None or bool(form.train)


def _factors(chosen: Chosen, form: Form, floats: Collection[str] = ()) -> Form:
    """A factorised matrix: each part in the format, where that makes it smaller. Statistics are of the inputs of those
    parts that the matrix's own inputs meet."""
    made: dict[str, Packed] = {}
    first = ("a",) if form.outer is None else ()  # what a stack shares must be the same for all of its matrices
    for which, packed in form.matrices():
        if which in floats:
            made[which] = packed
            chosen.say(f"stays {packed.format}", "this factor of an embedding is read transposed", f"factor {which}")
            continue
        met = which in first or (which == "" and form.outer is None)
        seen = replace(chosen, stats=chosen.stats if met else None, record={})
        apart = with_statistics(seen)
        fmt, _ = fitting(chosen.format, packed.shape)
        part = _call(apart, torch.from_numpy(packed.dequantize()), fmt, None, None)
        main = part.main if isinstance(part, Form) else None
        if main is None:
            raise UsageError(f"{apart.row.name} gives no codes for the factors of a matrix", param=apart.row.name)
        if stored_nbytes_of(main) < stored_nbytes_of(packed) or not is_float(packed.format):
            made[which] = main
        else:
            made[which] = packed
            chosen.say(f"stays {packed.format}", f"{fmt} would be larger", f"factor {which or 'main'}")
    return replace(
        form,
        main=made.get(""),
        low_rank=(made["a"], made["b"]) if form.low_rank is not None else None,
        outer=(made["left"], made["right"]) if form.outer is not None else None,
        train=tuple(made[f"core{at}"] for at in range(len(form.train))),
    )


def _call(chosen: Chosen, weight: Source | Tensor, fmt: str, mask: Tensor | None, form: Form | None) -> Any:
    """Calls the method; large matrices in runs of rows where it allows."""
    row = chosen.row
    step = max(16, SLAB_BYTES // (4 * weight.shape[1]) // 16 * 16)
    whole = not row.rows_apart or row.takes_form or step >= weight.shape[0]
    made: list[Any] = []
    for start in range(0, weight.shape[0], weight.shape[0] if whole else step):
        part = slice(start, None if whole else start + step)
        more: dict[str, Any] = {"form": form} if row.takes_form else {}
        if row.masks:
            more["mask"] = None if mask is None else mask[part]
        result = row.run(weight[part].contiguous(), chosen.stats, chosen.options, fmt, **more)
        if isinstance(result, tuple):
            result, said = result
            chosen.record |= {key: value for key, value in said.items() if key != "fallback"}
            if said.get("fallback"):
                chosen.say(said["fallback"]["done"], said["fallback"]["why"])
        made.append(result)
    return made[0] if len(made) == 1 else _stacked(made)


def _stacked(made: list[Any]) -> Any:
    """Results of runs of rows as that of the whole matrix; packed forms lie in tiles of 16 rows."""
    if not isinstance(made[0], Form):
        return torch.cat(made)
    mains = [form.main for form in made if form.main is not None and form.low_rank is None]
    if len(mains) < len(made):
        raise UsageError("a method whose rows are apart gave a form with a side branch", remedy="Report this")
    data = aligned_empty(sum(main.nbytes for main in mains))
    np.concatenate([main.data for main in mains], out=data)
    shape = (sum(main.shape[0] for main in mains), mains[0].shape[1])
    return Form(Packed(mains[0].format, shape, data), None, made[0].columns)


def _keep(work: Work, name: str, chosen: Chosen, made: Any) -> None:
    """Puts a Form, new floats or a mask; pruned weights stay 0, or it is said that they do not."""
    mask, pruning = work.mask(name), chosen.row.family == "prune"
    if isinstance(made, Form):
        value = torch.from_numpy(made.value()) if mask is not None or pruning else None
        work.put_form(name, made)
        if pruning and value is not None:
            work.put_mask(name, value != 0)
        elif mask is not None and value is not None:
            lost = int((value[~mask] != 0).sum())
            if lost and _has_factors(made):
                chosen.say(f"{lost} pruned weights are not 0", "a product of factors has no zeros to keep")
                work.put_mask(name, None)  # what comes later has none to hold
            elif lost:
                chosen.say(f"{lost} pruned weights are not 0", "the format has no 0 there")
    elif made.dtype is torch.bool:
        work.put(name, work.value(name) * made)
        work.put_mask(name, made)
    else:
        work.put(name, made)
        if pruning:
            work.put_mask(name, made != 0)


def _format_of(made: Any, chosen: Chosen) -> str:
    if not isinstance(made, Form):
        return chosen.format
    return "+".join(packed.format for _, packed in made.matrices())


def _findings(stats: LinearStats | None) -> dict[str, Any]:
    """What calibration found of a linear's inputs."""
    if stats is None:
        return {}
    dead = len(stats.dead) if stats.count else 0
    return {"tokens": stats.count, **({"dead": dead} if dead else {})}
