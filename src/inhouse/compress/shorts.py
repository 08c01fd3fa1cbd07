"""Recipes that have a name: what `--to q4` means. Embedding and head keep six bits where the rest has fewer: every
token passes through them and they lose most."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from inhouse.core.errors import UsageError

_HEAD = {"embed.weight": {"method": "rtn", "format": "q6_0"}, "head.weight": {"format": "q6_0"}}
# name -> (options of the one `quantize` stage, what it is)
SHORTS: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "q8": ({"method": "round", "format": "q8_0"}, "8-bit codes in groups of 32"),
    "q6": ({"method": "round", "format": "q6_0"}, "6-bit codes in groups of 32"),
    "q5": ({"method": "gptq", "format": "q5_1", "overrides": _HEAD}, "5-bit codes by GPTQ; embedding and head 6"),
    "q4": ({"method": "gptq", "format": "q4_0", "overrides": _HEAD}, "4-bit codes by GPTQ; embedding and head 6"),
    "q3": ({"method": "gptq", "format": "u3_g32", "overrides": _HEAD}, "3-bit codes by GPTQ; embedding and head 6"),
    "q2": ({"method": "gptq", "format": "u2_g32", "overrides": _HEAD}, "2-bit codes by GPTQ; embedding and head 6"),
    "fp8": ({"method": "rtn", "format": "f8_e4m3_row", "importance": False}, "8-bit floats, a scale for each row"),
    "nf4": ({"method": "rtn", "format": "nf4_g64", "importance": False}, "the 16 levels of NF4, groups of 64"),
    "mxfp4": ({"method": "rtn", "format": "mxfp4", "importance": False}, "4-bit floats, power-of-two scales"),
    "bf16": ({"method": "round", "format": "bf16"}, "16-bit floats"),
    "f16": ({"method": "round", "format": "f16"}, "16-bit floats"),
}


def short_recipe(name: str, calibration: Sequence[str] = ()) -> dict[str, Any]:
    """The recipe of a short name as a document. Raises UsageError with the nearest right one."""
    if name not in SHORTS:
        near = difflib.get_close_matches(name, SHORTS, 1)
        remedy = f"Did you mean {near[0]}?" if near else f"There are {', '.join(SHORTS)}"
        raise UsageError(f"there is no recipe called {name!r}", remedy=remedy, param="to")
    document: dict[str, Any] = {"stages": [{"quantize": dict(SHORTS[name][0])}]}
    if calibration:
        document["calibration"] = {"texts": list(calibration)}
    return document
