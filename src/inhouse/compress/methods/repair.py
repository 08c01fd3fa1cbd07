"""Low-rank repair of a quantised matrix: y = Q(W) x + b (a x), where b a is the best approximation of W - Q(W).

Best means least output error, by whitening with the inputs' second moment (LQER, Zhang et al. 2024, arXiv 2402.02446,
with a diagonal; EoRA, Liu et al. 2024, arXiv 2410.21271, with all of it). The side branch is stored with the matrix.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from inhouse.compress.pack_as import pack_as
from inhouse.compress.spectrum import cut, decompose, output_error
from inhouse.compress.stats import LinearStats
from inhouse.compress.values import Count, NotNegative
from inhouse.core.errors import UnsupportedError, UsageError
from inhouse.runtime.form import Form


@dataclass(frozen=True, slots=True)
class Repair:
    """Options."""

    rank: Count = 16
    method: str = "whitened"  # whitened (EoRA) | asvd (LQER's diagonal) | svd
    alpha: NotNegative = 1.0  # asvd: exponent of mean |x|
    factors: str = "bf16"


def repair(
    weight: Tensor, form: Form, options: Repair, gram: Tensor | None = None, mean_abs: Tensor | None = None
) -> Form:
    """`form` with a side branch that takes away most of its error; `form` itself where none makes it smaller (a
    matrix that is exact already).

    Args:
        weight: the matrix that was quantised, [out, in].
        form: what it became; without a side branch.
        gram, mean_abs: of the inputs; what the method needs.

    Raises UnsupportedError where the side branch would hold more numbers than the matrix, or there is one already.
    """
    if form.main is None or form.low_rank is not None:
        raise UnsupportedError("only a matrix without a side branch can be repaired", param="repair")
    if tuple(weight.shape) != form.shape:
        raise UsageError(f"the matrix is {list(weight.shape)}, its form {list(form.shape)}")
    quantised = torch.from_numpy(form.value())
    taken = decompose(weight - quantised, options.method, gram=gram, mean_abs=mean_abs, alpha=options.alpha)
    a, b = cut(taken, min(options.rank, taken.right.shape[0]))
    repaired = replace(form, low_rank=(pack_as(a, options.factors), pack_as(b, options.factors)))
    better = output_error(weight, torch.from_numpy(repaired.value()), gram)
    return repaired if better < output_error(weight, quantised, gram) else form


def repaired(
    weight: Tensor, stats: LinearStats | None, options: Repair, fmt: str = "", *, form: Form | None = None
) -> tuple[Form, dict[str, Any]]:
    """As the table of methods calls it: the form of a matrix that was quantised, with its side branch. `fmt`, where it
    is given, is the format of the factors. What cannot be repaired (floats, a matrix too small for that rank) stays as
    it is, and the record says so. Raises UsageError for a matrix that no stage has quantised."""
    if form is None:
        raise UsageError("only a stored form can be repaired", remedy="Put `repair` after `quantize`", param="repair")
    if fmt:
        options = replace(options, factors=fmt)
    gram, mean_abs = (None, None) if stats is None else (stats.gram, stats.mean_abs)
    if gram is None:
        options = replace(options, method="svd" if mean_abs is None else "asvd")
    try:
        found = repair(weight, form, options, gram, mean_abs)
    except UnsupportedError as error:
        return form, {"fallback": {"done": "not repaired", "why": error.message}}
    if found is form:
        return form, {"fallback": {"done": "not repaired", "why": "a side branch made it no better"}}
    return found, {}
