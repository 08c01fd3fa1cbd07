"""What a family row is: names that models give themselves, how their config reads, and where weights come from."""

import fnmatch
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import FormatError
from inhouse.model.build import weight_specs
from inhouse.model.families.fields import Fields
from inhouse.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class HeadOrder:
    """Rows of q or k whose file keeps the rotary pairs side by side: (2i, 2i + 1) in each head, where the canonical
    order has (i, i + head_dim / 2). GGUF writes Llama so. A permutation of rows, hence lossless on packed rows."""

    heads: int
    head_dim: int

    def index(self) -> npt.NDArray[np.int64]:
        """int64 [heads * head_dim]: canonical row j is source row index[j]."""
        rows = np.arange(self.heads * self.head_dim, dtype=np.int64)
        return rows.reshape(self.heads, self.head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


@dataclass(frozen=True, slots=True)
class Derive:
    """How one canonical weight comes from a tensor of the file: take `rows`, then `order`, then `transpose`."""

    source: str  # tensor name in the file
    source_shape: tuple[int, ...]  # what that tensor must be, before anything is taken
    shape: tuple[int, ...]  # what comes out
    rows: tuple[int, int] | None = None  # start, stop
    order: HeadOrder | None = None
    transpose: bool = False  # plain dtypes only


@dataclass(frozen=True, slots=True)
class Tensors:
    """What the reader of a config may know of the file's tensors."""

    names: Collection[str] = ()
    rope_factors: tuple[float, ...] = ()  # contents of GGUF's `rope_freqs.weight`


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the table of families."""

    name: str
    architectures: tuple[str, ...]  # Hugging Face `architectures[0]`
    gguf: tuple[str, ...]  # GGUF `general.architecture`
    from_hf: Callable[[Fields, Tensors], ModelSpec]
    from_gguf: Callable[[Fields, Tensors], ModelSpec]
    hf_names: Mapping[str, str]  # canonical name -> tensor name, both with {i} for the layer
    gguf_names: Mapping[str, str]
    gguf_pairs: bool = False  # GGUF keeps q and k with rotary pairs side by side
    ignored: tuple[str, ...] = ()  # patterns of tensors that carry nothing the spec does not say

    def derive(self, spec: ModelSpec, names: Collection[str]) -> dict[str, Derive]:
        """Canonical name -> where it comes from, for every weight of `spec`, in the order of the forward pass.

        Raises FormatError naming the tensors that are missing from `names`, or left over in it.
        """
        gguf = self.gguf_names["embed.weight"] in names
        table, ignored = (self.gguf_names, _GGUF_IGNORED) if gguf else (self.hf_names, ())
        out: dict[str, Derive] = {}
        for canonical, weight in weight_specs(spec).items():
            layer = re.search(r"\d+", canonical)
            pattern = table[re.sub(r"\d+", "{i}", canonical, count=1)]
            source = pattern.format(i=layer.group()) if layer else pattern
            order = self._order(spec, canonical) if gguf else None
            out[canonical] = Derive(source, weight.shape, weight.shape, order=order)
        used = {derive.source for derive in out.values()}
        _none([name for name in used if name not in names], "lacks", "Fetch the whole model again")
        left = [name for name in names if name not in used and not _matches(name, (*self.ignored, *ignored))]
        _none(left, f"has, beyond what {self.name} uses,", "The model is not what its config says; check config.json")
        return out

    def _order(self, spec: ModelSpec, canonical: str) -> HeadOrder | None:
        part = re.fullmatch(r"layers\.\d+\.attn\.([qk])\.(weight|bias)", canonical)
        if not self.gguf_pairs or part is None:
            return None
        return HeadOrder(spec.heads if part.group(1) == "q" else spec.kv_heads, spec.head_dim)


# `rope_freqs.weight` is read into the spec (Tensors.rope_factors); see decoder.from_gguf.
_GGUF_IGNORED = ("rope_freqs.weight",)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _none(names: Collection[str], verb: str, remedy: str) -> None:
    if names:
        first, plural = sorted(names), "" if len(names) == 1 else "s"
        shown = ", ".join(first[:5]) + (f" and {len(first) - 5} more" if len(first) > 5 else "")
        raise FormatError(f"the checkpoint {verb} {len(first)} tensor{plural}: {shown}", remedy=remedy, param=first[0])
