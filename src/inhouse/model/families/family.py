"""What a family row is: names that models give themselves, how their config reads, and where weights come from."""

import fnmatch
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import FormatError, UnsupportedError
from inhouse.model.build import Spec, weight_specs
from inhouse.model.families.fields import Fields
from inhouse.model.spec import ModelSpec
from inhouse.runtime.program import WeightSpec


@dataclass(frozen=True, slots=True)
class HeadOrder:
    """Rows of q or k in another order within each head than the canonical one, whose rotary pairs are (i, i + dim / 2).
    A permutation of rows, hence lossless on packed rows.

    pairs: the file keeps pairs side by side, (2i, 2i + 1); GGUF writes Llama so. two_part: the file has two halves that
    are rotated apart, each with pairs (i, i + dim / 4) (ChatGLM-6B).
    """

    heads: int
    head_dim: int
    kind: str = "pairs"  # pairs | two_part

    def index(self) -> npt.NDArray[np.int64]:
        """int64 [heads * head_dim]: canonical row j is source row index[j]."""
        rows = np.arange(self.heads * self.head_dim, dtype=np.int64)
        if self.kind == "two_part":
            return rows.reshape(self.heads, 2, 2, self.head_dim // 4).swapaxes(1, 2).reshape(-1)
        return rows.reshape(self.heads, self.head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a fused tensor: the tensor is `groups` equal groups of rows, and of each `start..start + count` is taken.

    A plain range is one group. [heads, 3, dim] (BLOOM, GPT-NeoX) and [key-value heads, q.. k v] (Falcon, InternLM2)
    are a group for each key-value head; every other row (gpt-oss) is a group of two.
    """

    groups: int
    stride: int  # rows of a group
    start: int
    count: int

    def index(self) -> npt.NDArray[np.int64]:
        """int64 [groups * count]: row j of what is taken is source row index[j]."""
        first = np.arange(self.groups, dtype=np.int64)[:, None] * self.stride + self.start
        return (first + np.arange(self.count, dtype=np.int64)).reshape(-1)


def _composed(*taken: Rows | HeadOrder | None) -> npt.NDArray[np.int64] | None:
    """The rows that are left when one is taken after the other; None if none takes anything."""
    index: npt.NDArray[np.int64] | None = None
    for step in taken:
        if step is not None:
            index = step.index() if index is None else index[step.index()]
    return index


@dataclass(frozen=True, slots=True)
class Derive:
    """How one canonical weight comes from a tensor of the file: axes before the rows' become rows; `part` of
    them is taken and transposed; of that `rows` are taken, in `order`; the result is reshaped to `shape`.

    Rows may be taken and ordered of any type; transposing is for plain dtypes only.
    """

    source: str  # tensor name in the file
    source_shape: tuple[int, ...]  # what that tensor must be, before anything is taken
    shape: tuple[int, ...]  # what comes out
    part: Rows | None = None
    transpose: bool = False
    rows: Rows | None = None
    order: HeadOrder | None = None
    unit_rows: bool = False  # each row divided by its L2 norm, in the file's own type; plain dtypes only
    heads: int = 0  # transposed in as many blocks of rows, each on its own; 0: at once

    def index(self) -> npt.NDArray[np.int64] | None:
        """Source rows in canonical order, of a weight that is not transposed; None for all of them as they are."""
        return _composed(self.part, self.rows, self.order)

    def outputs(self) -> npt.NDArray[np.int64] | None:
        """Outputs of the file's matrix, wherever its axis lies, that are the weight's rows, in order; None for all."""
        return _composed(self.rows, self.order) if self.transpose else self.index()

    def take(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The weight out of the whole source tensor; contiguous, a view where nothing moves."""
        if array.ndim > max(1, len(self.shape)):
            array = array.reshape(-1, *self.shape[1:]) if not self.transpose else array.reshape(-1, array.shape[-1])
        if not self.transpose:
            index = self.index()
            return np.ascontiguousarray(array if index is None else array[index]).reshape(self.shape)
        if self.part is not None:
            array = array[self.part.index()]
        if self.heads:
            return np.ascontiguousarray(array.reshape(self.heads, -1, array.shape[-1]).swapaxes(1, 2)).reshape(
                self.shape
            )
        for step in (self.rows, self.order):
            if step is not None:
                array = array[:, step.index()]
        return np.ascontiguousarray(array.T).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class Fused:
    """A tensor of the file that holds several canonical weights, or lies transposed: the value of a names table.

    `of`: the canonical weights in it, in their order along the rows, without layer prefix and suffix
    (("attn.q", "attn.k", "attn.v")); () for a tensor of its own. `groups`: what it is grouped by: nothing (one block
    after the other), `kv_heads` ([key-value heads, q.. k v]), `heads`, or `rows` (they alternate row by row).
    `experts`: it holds those of every expert, expert by expert along the first axis; the canonical name then has a
    number for the expert.
    `vector`: a matrix of one row, kept as a vector.
    """

    name: str
    of: tuple[str, ...] = ()
    groups: str = ""
    transpose: bool = False  # the file keeps [in, out]
    experts: bool = False
    row: bool = False  # the file keeps a vector [n] as [1, n]
    vector: bool = False

    def derive(self, spec: Spec, canonical: str, source: str, weights: Mapping[str, WeightSpec]) -> Derive:
        """Where the weight `canonical` of `spec` lies in the tensor `source`."""
        shape = weights[canonical].shape
        transpose = self.transpose and len(shape) == 2
        rows, total = self._rows(spec, canonical, weights)
        whole = (shape[1], total) if transpose else (1, total) if self.row else (total, *shape[1:])
        part = None
        if self.vector:
            whole = shape[1:]
        if self.experts:
            each, numbers = whole[0], [int(n) for n in re.findall(r"\d+", canonical)]
            count = spec.moe.experts if isinstance(spec, ModelSpec) and spec.moe else 1
            part = Rows(1, count * each, numbers[-1] * each, each)
            whole = (count, *whole)
        return Derive(source, whole, shape, part=part, transpose=transpose, rows=rows)

    def _rows(self, spec: Spec, canonical: str, weights: Mapping[str, WeightSpec]) -> tuple[Rows | None, int]:
        """Which rows of the tensor (of one expert of it) are the weight's, None: all; and how many it has."""
        count = weights[canonical].shape[0]
        stem, dot, suffix = canonical.rpartition(".")
        ours = next((name for name in self.of if stem.endswith(name)), None)
        if ours is None:
            return None, count
        prefix = stem.removesuffix(ours)
        sizes = [weights[f"{prefix}{name}{dot}{suffix}"].shape[0] for name in self.of]
        heads, kv_heads = getattr(spec, "heads", 1), getattr(spec, "kv_heads", 1)
        groups = {"": 1, "kv_heads": kv_heads, "heads": heads, "rows": sizes[0]}[self.groups]
        start = sum(sizes[: self.of.index(ours)])
        return Rows(groups, sum(sizes) // groups, start // groups, count // groups), sum(sizes)


Place = str | Fused | tuple[str | Fused, ...]  # of several, the first that the checkpoint has


@dataclass(frozen=True, slots=True)
class Tensors:
    """What the reader of a config may know of the file's tensors."""

    names: Collection[str] = ()
    rope_factors: tuple[float, ...] = ()  # contents of GGUF's `rope_freqs.weight`
    longrope: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())  # of `rope_factors_short` and `rope_factors_long`


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the table of families."""

    name: str
    architectures: tuple[str, ...]  # Hugging Face `architectures[0]`
    gguf: tuple[str, ...]  # GGUF `general.architecture`
    from_hf: Callable[[Fields, Tensors], Spec]
    from_gguf: Callable[[Fields, Tensors], Spec]
    hf_names: Mapping[str, Place]  # canonical name -> tensor, both with {i} for the layer, {e} for the expert
    gguf_names: Mapping[str, Place]
    mixture: bool = False  # of two rows of one GGUF architecture, the one whose models have experts
    gguf_pairs: bool = False  # GGUF keeps q and k with rotary pairs side by side
    hf_order: str = ""  # HeadOrder of q and k in Hugging Face checkpoints; "": canonical
    unit_head: bool = False  # the head's rows are normalised (Baichuan 2)
    claims: Callable[[Fields], bool] = lambda fields: True  # where several families share an architecture's name
    prefix: str = ""  # of Hugging Face names, which some checkpoints leave out (`transformer.`)
    ignored: tuple[str, ...] = ()  # patterns of tensors that carry nothing the spec does not say; {layers}: how many

    def derive(self, spec: Spec, names: Collection[str]) -> dict[str, Derive]:
        """Canonical name -> where it comes from, for every weight of `spec`, in the order of the forward pass.

        Raises FormatError naming the tensors that are missing from `names`, or left over in it.
        """
        gguf = _name(self.gguf_names["embed.weight"]) in names
        table, ignored = (self.gguf_names, _GGUF_IGNORED) if gguf else (self.hf_names, ())
        bare = not gguf and _name(table["embed.weight"]) not in names and self._bare(table["embed.weight"]) in names
        out: dict[str, Derive] = {}
        weights = weight_specs(spec)
        for canonical in weights:
            place, source = self._place(table, canonical, names, bare)
            fused = place if isinstance(place, Fused) else Fused(place)
            derive = fused.derive(spec, canonical, source, weights)
            unit = self.unit_head and canonical == "head.weight"
            out[canonical] = replace(derive, order=self._order(spec, canonical, gguf), unit_rows=unit)
        used = {derive.source for derive in out.values()}
        none_left([name for name in used if name not in names], "lacks", "Fetch the whole model again")
        ignored = tuple(p.replace("{layers}", str(getattr(spec, "layers", ""))) for p in (*self.ignored, *ignored))
        left = [name for name in names if name not in used and not _matches(name, ignored)]
        none_left(
            left, f"has, beyond what {self.name} uses,", "The model is not what its config says; check config.json"
        )
        return out

    def places(self, spec: Spec, *, gguf: bool) -> dict[str, Derive]:
        """Canonical name -> where checkpoints of one format have it by default, whatever is in any file; weights that
        the format has no name for are left out."""
        table, weights = self.gguf_names if gguf else self.hf_names, weight_specs(spec)
        out: dict[str, Derive] = {}
        for canonical in weights if table else ():
            try:
                place, source = self._place(table, canonical, (), bare=False)
            except (KeyError, UnsupportedError):
                continue
            fused = place if isinstance(place, Fused) else Fused(place)
            derive = fused.derive(spec, canonical, source, weights)
            out[canonical] = replace(derive, order=self._order(spec, canonical, gguf))
        return out

    def _place(
        self, table: Mapping[str, Place], canonical: str, names: Collection[str], bare: bool
    ) -> tuple[str | Fused, str]:
        """The place of a weight, and the tensor's name there."""
        numbers = re.findall(r"\d+", canonical)
        pieces = re.split(r"\d+", canonical)
        key = "".join(a + b for a, b in zip(pieces, ("{i}", "{e}", "")[: len(numbers)] + ("",), strict=True))
        if key not in table:
            raise UnsupportedError(f"the family {self.name} has no name for {canonical}", param=canonical)
        place = table[key]
        layer, expert = (*numbers, "", "")[:2]
        choices = place if isinstance(place, tuple) else (place,)
        sources = [
            (self._bare(one) if bare else _name(one)).replace("{i}", layer).replace("{e}", expert) for one in choices
        ]
        found = next((at for at, source in enumerate(sources) if source in names), 0)
        return choices[found], sources[found]

    def _bare(self, place: Place) -> str:
        return _name(place).removeprefix(self.prefix)

    def _order(self, spec: Spec, canonical: str, gguf: bool) -> HeadOrder | None:
        part = re.fullmatch(r"layers\.\d+\.attn\.([qk])\.(weight|bias)", canonical)
        kind = ("pairs" if self.gguf_pairs else "") if gguf else self.hf_order
        if not kind or part is None or not isinstance(spec, ModelSpec):
            return None
        return HeadOrder(spec.heads if part.group(1) == "q" else spec.kv_heads, spec.head_dim, kind)


def _name(place: Place) -> str:
    place = place[0] if isinstance(place, tuple) else place
    return place if isinstance(place, str) else place.name


# Read into the spec (Tensors.rope_factors, Tensors.longrope); see ropes.rope_from_gguf.
_GGUF_IGNORED = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def none_left(names: Collection[str], verb: str, remedy: str) -> None:
    """Raises FormatError naming tensors, unless there are none."""
    if names:
        first, plural = sorted(names), "" if len(names) == 1 else "s"
        shown = ", ".join(first[:5]) + (f" and {len(first) - 5} more" if len(first) > 5 else "")
        raise FormatError(f"the checkpoint {verb} {len(first)} tensor{plural}: {shown}", remedy=remedy, param=first[0])
