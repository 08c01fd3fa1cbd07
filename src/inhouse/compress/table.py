"""The table of methods: every technique under the name that recipes use. Add a row here and its page in `methods`."""

import difflib
from collections.abc import Mapping

from inhouse.compress.method import Method
from inhouse.compress.methods.gptq import GptqOptions, gptq
from inhouse.compress.methods.lowrank import LowRank, lowrank
from inhouse.compress.methods.rank_budget import RankBudget, rank_budget
from inhouse.compress.methods.rounding import RoundingOptions, rounding
from inhouse.compress.methods.rtn import RtnOptions, rtn
from inhouse.core.errors import UsageError

METHODS: Mapping[str, Method] = {
    row.name: row
    for row in (
        Method(
            "round", "quantize", "matrix", rounding, RoundingOptions, paper="Frantar et al. 2022, arXiv 2210.17323",
            rows_apart=True, summary="nearest code; the baseline",
        ),
        Method(
            "rtn", "quantize", "matrix", rtn, RtnOptions, rows_apart=True,
            needs=lambda options: "moments" if options.importance else "nothing",
            paper="Frantar et al. 2022, arXiv 2210.17323", summary="nearest code, scales by weighted least squares",
        ),
        Method(
            "gptq", "quantize", "matrix", gptq, GptqOptions, needs="gram", rows_apart=True, fallback="rtn",
            paper="Frantar et al. 2022, arXiv 2210.17323", summary="errors fed back column by column, static act-order",
        ),
        Method(
            "svd", "lowrank", "matrix", lowrank, LowRank, defaults={"method": "svd"},
            paper="Eckart and Young 1936", summary="truncated SVD",
        ),
        Method(
            "asvd", "lowrank", "matrix", lowrank, LowRank, needs="moments", defaults={"method": "asvd"},
            paper="Yuan et al. 2023, arXiv 2312.05821", summary="SVD of columns scaled by their inputs' size",
        ),
        Method(
            "svd-llm", "lowrank", "matrix", lowrank, LowRank, needs="gram", defaults={"method": "whitened"},
            paper="Wang et al. 2024, arXiv 2403.07378", summary="whitened SVD: least output error of a rank",
        ),
        Method(
            "rank-budget", "lowrank", "model", rank_budget, RankBudget, needs="gram",
            paper="Wang et al. 2025, arXiv 2503.12340", summary="whitened SVD, ranks shared out by measured loss",
        ),
    )
}  # fmt: skip


def method(name: str, family: str | None = None) -> Method:
    """The row of that name (of that family). Raises UsageError with the nearest right one."""
    rows = {row.name: row for row in METHODS.values() if family is None or row.family == family}
    if name not in rows:
        near = difflib.get_close_matches(name, rows, 1)
        remedy = f"Did you mean {near[0]}?" if near else f"There are {', '.join(sorted(rows))}"
        raise UsageError(f"there is no method {name!r}{f' for {family}' if family else ''}", remedy=remedy, param=name)
    return rows[name]
