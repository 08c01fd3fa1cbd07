"""Which whole recipes a search tries: bits, ranks, sparsity, width and depth. Knows recipes as documents; measures
nothing."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Bits a weight, scales included, and the format; from many to few.
LADDER = (
    (8.5, "q8_0"), (6.5, "q6_0"), (6.0, "q5_1"), (5.0, "q4_1"), (4.5, "q4_0"), (4.25, "i4_g64"), (3.75, "u3_g32"),
    (3.375, "u3_g64"), (2.75, "u2_g32"), (2.375, "u2_g64"),
)  # fmt: skip
HEADS = ("embed.weight", "head.weight")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One recipe. `bits`: roughly what it comes to, a weight; `plain`: rounding alone."""

    name: str
    stages: tuple[Mapping[str, Any], ...]
    bits: float
    plain: bool = False

    def document(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """The whole recipe, with what the search was given beside stages."""
        return {**base, "stages": [dict(stage) for stage in self.stages]}


def _codes(method: str, fmt: str, head: str = "") -> dict[str, Any]:
    wider = {name: {"method": "rtn", "format": head} for name in HEADS} if head else {}
    return {"quantize": {"method": method, "format": fmt, **({"overrides": wider} if wider else {})}}


def candidates(layers: int) -> Iterator[Candidate]:
    """Every recipe that may be tried, for a model of so many layers."""
    for bits, fmt in LADDER:
        yield Candidate(f"rtn {fmt}", (_codes("rtn", fmt),), bits, plain=True)
        yield Candidate(f"gptq {fmt}", (_codes("gptq", fmt),), bits)
        if bits < 5:
            yield Candidate(f"gptq {fmt}, head 6", (_codes("gptq", fmt, "q6_0"),), bits + 0.4)
    for bits, fmt in LADDER[:7]:
        for share in (0.1, 0.2):
            cut = {"lowrank": {"method": "svd-llm", "ratio": share, "exclude": list(HEADS)}}
            yield Candidate(f"rank -{share:.0%}, gptq {fmt}", (cut, _codes("gptq", fmt)), bits * (1 - share))
        for share in (0.125, 0.25):
            cut = {"prune": {"method": "structured", "ffn": share}}
            yield Candidate(f"width -{share:.1%}, gptq {fmt}", (cut, _codes("gptq", fmt)), bits * (1 - 0.6 * share))
        if layers > 2:
            cut = {"prune": {"method": "structured", "layers": 1}}
            share = 1 / layers
            yield Candidate(f"one layer away, gptq {fmt}", (cut, _codes("gptq", fmt)), bits * (1 - 0.85 * share))
    for sparsity in ("2:4", 0.5):
        cut = {"prune": {"method": "sparsegpt", "sparsity": sparsity}}
        for bits, fmt in (LADDER[0], LADDER[4]):
            name = f"sparse {sparsity}, rtn {fmt}"
            yield Candidate(name, (cut, _codes("rtn", fmt)), bits / 2 + 1)


def chosen(pool: list[Candidate], bits: float | None, least: int) -> list[Candidate]:
    """The candidates worth measuring: those nearest to the wished bits a weight (None: all over the ladder, plain
    rounding first), `least` of them or more; plain rounding near the wish is always among them."""
    if bits is None:
        spread = sorted(pool, key=lambda c: (not c.plain, c.bits))
        plain = [c for c in spread if c.plain]
        rest = sorted((c for c in spread if not c.plain), key=lambda c: c.bits)
        step = max(1, len(rest) // max(1, least - len(plain)))
        return plain + rest[::step]
    by_distance = sorted(pool, key=lambda c: (abs(c.bits - bits * 0.97), c.name))
    first = [c for c in by_distance if c.plain][:3]
    others = [c for c in by_distance if c not in first]
    return first + others[: max(0, least - len(first))]
