"""K and V as codes: which KV types there are, and the rewrite that gives a Program's full attention a coded group and a
group of recent positions. Knows sizes and Programs; the arithmetic is native/src/ops/attention_codes-inl.h and
`torch_coded`.

K has a scale and a minimum for each channel over the sixteen positions of a block, V for each position and VALUE_GROUP
elements (KIVI, arXiv 2402.02750). A block becomes codes in the step that computes its last position, from the f16 form
that the recent group keeps. A query at position p reads the blocks that end at or before p - RECENT as codes and all
later ones as f16: the rule knows nothing but positions, so chunks, batches and prefix hits change no bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from inhouse.core.errors import UnsupportedError
from inhouse.runtime.executor import KV_DTYPES
from inhouse.runtime.program import Attr, Op, Program, ProgramSet, StateGroup, StateKind

RECENT = 128  # positions before a query that are read as f16 at least
RECENT_DTYPE = "f16"
CODED_KV: Mapping[str, tuple[int, int]] = {"int4": (4, 4), "k=int8,v=int4": (8, 4), "k=int4,v=int8": (4, 8)}
KV_TYPES = (*KV_DTYPES, *CODED_KV)


def element_type(kv_dtype: str) -> str:
    """The key of KV_DTYPES in which a KV type keeps what is not codes. Raises UnsupportedError for an unknown type."""
    if kv_dtype in CODED_KV:
        return RECENT_DTYPE
    if kv_dtype not in KV_DTYPES:
        raise UnsupportedError(f"no KV type {kv_dtype!r}; there are {', '.join(KV_TYPES)}", param="kv_dtype")
    return kv_dtype


def code_state(programs: ProgramSet, kv_dtype: str) -> ProgramSet:
    """`programs` with codes where `kv_dtype` is one of CODED_KV, else unchanged. Groups of a window stay as they are,
    since they are bounded. Raises UnsupportedError where no attention op can read codes."""
    if kv_dtype not in CODED_KV:
        return programs
    kinds = _Kinds.of(programs)
    if not kinds.coded:
        raise UnsupportedError(
            f"KV type {kv_dtype} is for causal attention over all positions, which no layer of this model has",
            remedy=f"Use {', '.join(KV_DTYPES)}.",
            param="kv_dtype",
        )
    k_bits, v_bits = CODED_KV[kv_dtype]
    groups: list[StateGroup] = []
    for group in programs.groups:
        if group.name not in kinds.coded:
            groups.append(group)
            continue
        groups.append(replace(group, k_bits=k_bits, v_bits=v_bits))
        groups.append(replace(group, name=recent_name(group.name), kind=StateKind.WINDOW, window=RECENT + 1))
    made = {name: _program(program, kinds.coded) for name, program in programs.programs.items()}
    return replace(programs, programs=made, groups=tuple(groups))


def recent_name(group: str) -> str:
    """The group of recent positions beside `group`."""
    return f"{group}.recent"


@dataclass(frozen=True, slots=True)
class _Kinds:
    """Which state groups can be coded: all their ops attend causally, over all positions, to K and V of their own."""

    coded: frozenset[str]

    @classmethod
    def of(cls, programs: ProgramSet) -> "_Kinds":
        paged = {g.name for g in programs.groups if g.kind is StateKind.PAGED and not g.k_bits}
        read = {op.attrs["group"] for op in _grouped(programs) if op.kind == "attention"}
        unfit = {op.attrs["group"] for op in _grouped(programs) if not _plain(op)}
        return cls(frozenset(name for name in paged & read - unfit if isinstance(name, str)))


def _grouped(programs: ProgramSet) -> list[Op]:
    return [op for program in programs.programs.values() for op in program.ops if "group" in op.attrs]


def _plain(op: Op) -> bool:
    a = op.attrs
    if op.kind != "attention":
        return False
    return a["mask"] == "causal" and not (a["window"] or a["cross"] or a["v_from_k"] or a["recent"])


def _program(program: Program, coded: frozenset[str]) -> Program:
    ops = tuple(_with_recent(op) if op.attrs.get("group") in coded else op for op in program.ops)
    return replace(program, ops=ops)


def _with_recent(op: Op) -> Op:
    attrs: dict[str, Attr] = {**op.attrs, "recent": recent_name(str(op.attrs["group"]))}
    return replace(op, attrs=attrs)
