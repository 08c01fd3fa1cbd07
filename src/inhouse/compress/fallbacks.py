"""What was not done as asked: which tensor, what was asked, what was done instead, why; and the same in groups to read.

A unit's record has a list of such mappings under KEY. Knows no methods.
"""

from collections.abc import Iterable, Mapping
from typing import Any

KEY = "fallbacks"
NAMED = 3  # tensors that a group gives as examples


def fallback(tensor: str, asked: str, done: str, why: str) -> dict[str, str]:
    """One of them, as records, manifests and reports keep it."""
    return {"tensor": tensor, "asked": asked, "done": done, "why": why}


def of_records(records: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """Those of all units, in order."""
    return [dict(one) for record in records.values() for one in record.get(KEY, ())]


def grouped(found: Iterable[Mapping[str, str]]) -> list[str]:
    """A sentence for each kind: `gptq q4_k, done rtn q4_1, for 36 tensors (a, b, c and 33 more): why`."""
    kinds: dict[tuple[str, str, str], list[str]] = {}
    for one in found:
        kinds.setdefault((one["asked"], one["done"], one["why"]), []).append(one["tensor"])
    told = []
    for (asked, done, why), tensors in kinds.items():
        more = len(tensors) - NAMED
        names = ", ".join(tensors[:NAMED]) + (f" and {more} more" if more > 0 else "")
        count = f"{len(tensors)} tensors ({names})" if len(tensors) > 1 else names
        told.append(f"{asked} was asked for {count}, done: {done}: {why}")
    return told
