"""Rounding with feedback: one column after another, what each lost made up by those not yet rounded.

The core of GPTQ (Frantar, Ashkboos, Hoefler, Alistarh 2022, arXiv 2210.17323) over any grid, for the pages that build
on it. Static act-order: groups keep their place, only the order of rounding follows the inputs' energy, so nothing is
slower at run time. Errors are fed back in lazy blocks. Damping rises until the Gram matrix factors; if it never does
the matrix is plainly rounded and the result says so. Then, if asked for, scales are re-solved and codes re-rounded in
turn on the same loss. Pure.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from inhouse.compress.grids import Grid, Params, Search
from inhouse.compress.quadratic import descend, inverse_factor, losses, resolve, settled
from inhouse.compress.values import Count, Natural, NotNegative
from inhouse.core.errors import UsageError


@dataclass(frozen=True, slots=True)
class GptqOptions:
    """act_order: round inputs of most energy first. damping: share of the mean diagonal added to it. block: columns
    between lazy updates. groups: `static` fits scales to the weights as given, `updated` to what they have become when
    their group's turn comes (not with act_order). refine: rounds of re-solving scales and re-rounding afterwards."""

    act_order: bool = True
    damping: NotNegative = 0.01
    block: Count = 128
    search: Search = "wls"
    groups: Literal["static", "updated"] = "static"
    refine: Natural = 0


class Rounded(NamedTuple):
    """Codes uint8 [out, in], their params, and what was done otherwise than asked ("": nothing); `plain`: why nothing
    was fed back at all."""

    codes: Tensor
    params: Params
    note: str
    plain: str = ""


def gptq_codes(weight: Tensor, gram: Tensor, grid: Grid, options: GptqOptions) -> Rounded:
    """Codes and params. Weights that are exactly 0 stay 0 where the grid has a 0; weights of dead inputs are plainly
    rounded (nothing is known of them). gram: f32 or f64 [in, in], the mean of x x^T."""
    if options.groups == "updated" and (options.act_order or not grid.one_level):
        raise UsageError("groups: updated goes with act_order: false and a one-level format", param="groups")
    weight = weight.detach().to(torch.float32)
    if not len(weight) or not bool(torch.isfinite(gram).all()):
        return _plain(weight, gram, grid, options, "the Gram matrix is not finite")
    hessian, dead = settled(gram)
    energy = hessian.diagonal().float().clone()
    order = torch.arange(grid.inputs)
    if options.act_order:
        order = torch.argsort(energy, descending=True, stable=True)
        hessian = hessian[order][:, order]
    factor = inverse_factor(hessian, options.damping)
    del hessian
    if factor is None:
        return _plain(weight, gram, grid, options, "the Gram matrix does not factor")
    params = grid.fit(weight, energy, options.search)
    codes = _sweep(weight, factor.upper, grid, params, order, options, energy)
    note = f"damping raised to {factor.damping:g}" if factor.damping > options.damping * 1.001 else ""
    if bool(dead.any()):
        note = "; ".join(filter(None, (note, f"{int(dead.sum())} dead inputs plainly rounded")))
    if options.refine:
        codes, params = refined(weight, settled(gram)[0], grid, params, codes, options.refine)
    return Rounded(codes, params, note)


def refined(
    weight: Tensor, gram: Tensor, grid: Grid, params: Params, codes: Tensor, rounds: int
) -> tuple[Tensor, Params]:
    """Scales re-solved for the codes, codes re-rounded for the scales, `rounds` times; no row's loss rises."""
    index = grid.index()
    for _ in range(rounds):
        params = resolve(weight, gram, grid, params, codes)
        found = descend(weight, gram, grid, params, codes, 1)
        better = losses(weight - grid.decode(found, params, index), gram) < losses(
            weight - grid.decode(codes, params, index), gram
        )
        if not bool(better.any()):
            break
        codes = torch.where(better[:, None], found, codes)
    return codes, params


def _plain(weight: Tensor, gram: Tensor, grid: Grid, options: GptqOptions, why: str) -> Rounded:
    energy = gram.diagonal().float().nan_to_num(0.0, 0.0, 0.0).clamp(min=0)
    params = grid.fit(weight, energy, options.search)
    return Rounded(grid.round(weight, params, grid.index()), params, f"{why}: plainly rounded", why)


def _sweep(
    weight: Tensor, upper: Tensor, grid: Grid, params: Params, order: Tensor, options: GptqOptions, energy: Tensor
) -> Tensor:
    """The one pass over the columns in `order`; upper: [in, in] in that order."""
    index = grid.index()[order]
    columns = weight.T[order].contiguous()  # [in, out]: a column is one run of memory
    kept = columns != 0 if grid.keeps_zero else None
    codes = torch.empty(columns.shape, dtype=torch.uint8)
    for start in range(0, grid.inputs, options.block):
        stop = min(start + options.block, grid.inputs)
        run = columns[start:stop]
        errors = torch.empty_like(run)
        local = upper[start:stop, start:stop]
        for j in range(stop - start):
            at = start + j
            if options.groups == "updated" and at % grid.group == 0:
                _refit(grid, params, columns, upper, errors, start, at, energy, options)
            wanted = run[j] if kept is None else run[j] * kept[at]
            code = grid.round(wanted[:, None], params, index[at : at + 1])
            value = grid.decode(code, params, index[at : at + 1])[:, 0]
            codes[at] = code[:, 0]
            errors[j] = (run[j] - value) / local[j, j]
            if j + 1 < stop - start:
                run[j + 1 :].addr_(local[j, j + 1 :], errors[j], alpha=-1)
        if stop < grid.inputs:
            columns[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    unsorted = torch.empty_like(codes)
    unsorted[order] = codes
    return unsorted.T.contiguous()


def _refit(
    grid: Grid, params: Params, columns: Tensor, upper: Tensor, errors: Tensor, start: int, at: int,
    energy: Tensor, options: GptqOptions,
) -> None:  # fmt: skip
    """Fits the group that begins at column `at` to what its columns have become, those beyond the block included."""
    stop = min(at + grid.group, grid.inputs)
    end = min(start + options.block, grid.inputs)
    now = columns[at:stop].clone()
    if stop > end:  # what this block owes the columns after it
        now[end - at :] -= upper[start:at, end:stop].T @ errors[: at - start]
    group = at // grid.group
    grid.put_group(params, group, grid.fit_group(now.T, energy[at:stop], options.search))
