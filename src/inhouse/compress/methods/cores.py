"""Tensor cores: embeddings as tensor trains, stacks of experts as Tucker cores between matrices that they share.

TT-SVD (Oseledets 2011; of embeddings Hrinchuk et al. 2020, arXiv 1901.10787) and HOOI (De Lathauwer et al. 2000), as
`compress.tensors` has them. Stored as cores and run as cores: a train gives a token's row as a product of slices, a
stack becomes linear, experts, linear. Both are refused where the cores would hold as many numbers as the matrices.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from inhouse.compress.calibrate import Calibration
from inhouse.compress.pack_as import pack_as
from inhouse.compress.tensors import (
    near_factors,
    tensor_train,
    train_numbers,
    train_products,
    tucker,
    tucker_numbers,
)
from inhouse.compress.values import Natural, Part, Range
from inhouse.compress.work import Work
from inhouse.core.errors import UnsupportedError, UsageError
from inhouse.model.rewrite_cores import check_untied
from inhouse.runtime.cores import MAX_TABLES, stack_of
from inhouse.runtime.form import Form


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """ratio: share of the table's numbers to save; rank: instead of it. tables: of the train. factors: their format."""

    ratio: Part = 0.5
    rank: Natural = 0
    tables: Annotated[int, Range(2, MAX_TABLES)] = 2
    factors: str = "bf16"

    def __post_init__(self) -> None:
        if not 2 <= self.tables <= MAX_TABLES or not 0.0 < self.ratio < 1.0:
            raise UsageError(f"a train of {self.tables} tables that saves {self.ratio}", param="tables")


@dataclass(frozen=True, slots=True)
class TuckerOptions:
    """ratio: share of the numbers of each stack to save. factors: format of cores and what they share."""

    ratio: Part = 0.3
    factors: str = "bf16"

    def __post_init__(self) -> None:
        if not 0.0 < self.ratio < 1.0:
            raise UsageError(f"ratio is {self.ratio}, must lie between 0 and 1", param="ratio")


def train_form(table: Tensor, options: TrainOptions) -> Form:
    """A table [rows, width] as a tensor train. Raises UnsupportedError where no rank, or not the one asked for, is
    smaller than the table."""
    rows, widths, rank = train_shape((table.shape[0], table.shape[1]), options)
    found = tensor_train(table, rows, widths, rank)
    tables = tuple(pack_as(core.flatten(1).float(), options.factors) for core in found.cores)
    return Form(None, train=tables, widths=tuple(widths), rows=table.shape[0])


def train_shape(shape: tuple[int, int], options: TrainOptions) -> tuple[list[int], list[int], int]:
    """(factors of the rows, of the width, rank) of a table's train. Raises UnsupportedError as `train_form`."""
    whole = shape[0] * shape[1]
    rows = near_factors(shape[0], options.tables, exact=False)
    widths = near_factors(shape[1], options.tables, exact=True)
    rank = options.rank or _train_rank(rows, widths, int((1.0 - options.ratio) * whole))
    numbers = train_numbers(rows, widths, rank) if rank else train_numbers(rows, widths, 1)
    if numbers >= whole or not rank:
        raise UnsupportedError(
            f"a train of rank {max(rank, 1)} holds {numbers} numbers, the table {list(shape)} holds {whole}; "
            f"{options.ratio:.0%} were to be saved",
            remedy="Use a smaller rank or ratio, or leave the table as it is", param="rank",
        )  # fmt: skip
    return rows, widths, rank


def train_check(work: Work, name: str, fmt: str, options: TrainOptions) -> None:
    """Raises UnsupportedError for a model whose embedding cannot become such a train."""
    embedding = "embed.weight"
    if embedding not in work.programs.weights:
        raise UnsupportedError(f"the model has no {embedding}", param=embedding)
    rows, width = work.shape(embedding)
    factors = train_shape((rows, width), options)
    try:
        check_untied(work.programs, embedding)
    except UnsupportedError as error:
        times = train_products(*factors) / (rows * width)
        raise UnsupportedError(
            f"{error.message}: through its cores they would take {times:.3g} times the multiplications",
            remedy=error.remedy, param=embedding,
        ) from None  # fmt: skip


def _train_rank(rows: list[int], widths: list[int], budget: int) -> int:
    """The largest rank within the budget; 0 where there is none."""
    rank = 0
    while train_numbers(rows, widths, rank + 1) <= budget:
        rank += 1
        if train_numbers(rows, widths, rank + 1) == train_numbers(rows, widths, rank):
            break
    return rank


def tensor_train_embedding(
    work: Work, calibration: Calibration | None, options: TrainOptions, report: dict[str, Any]
) -> None:
    """The model's token embedding as a train. Raises UnsupportedError for a tied one, whose cores give no logits."""
    train_check(work, "", "", options)
    name = "embed.weight"
    table = work.value(name)
    form = train_form(table, options)
    work.put_form(name, form)
    gap = table - torch.from_numpy(form.value())
    numbers = sum(packed.shape[0] * packed.shape[1] for packed in form.train)
    report |= {"relative_error": float(gap.norm() / table.norm()), "saved": 1.0 - numbers / table.numel()}


def tucker_experts(work: Work, calibration: Calibration | None, options: TuckerOptions, report: dict[str, Any]) -> None:
    """Every stack of experts as Tucker cores. Raises UnsupportedError for a model without experts, for experts with
    biases, and where the cores would hold as many numbers as the matrices."""
    tucker_check(work, "", "", options)
    for stack, names in _stacks(work).items():
        values = torch.stack([work.value(name) for name in names])
        forms, error = tucker_forms(values, options)
        for name, form in zip(names, forms, strict=True):
            work.put_form(name, form)
        report[stack] = {"relative_error": error, "ranks": list(forms[0].main.shape) if forms[0].main else []}


def tucker_check(work: Work, name: str, fmt: str, options: TuckerOptions) -> None:
    """Raises UnsupportedError for a model whose experts cannot become such cores."""
    stacks = _stacks(work)
    if not stacks:
        raise UnsupportedError(
            "the model has no experts; Tucker cores are for stacks of them",
            remedy="Leave the stage out; svd, svd-llm or rank-budget factorise other matrices", param="method",
        )  # fmt: skip
    for stack, names in stacks.items():
        if any(name.removesuffix(".weight") + ".bias" in work.programs.weights for name in names):
            raise UnsupportedError(f"experts of {stack} have biases, which cores do not", param=stack)
        rows, columns = work.shape(names[0])
        shape = (len(names), rows, columns)
        tucker_ranks(shape, int((1.0 - options.ratio) * math.prod(shape)))


def _stacks(work: Work) -> dict[str, list[str]]:
    """Stack -> its matrices, in the order of the experts."""
    stacks: dict[str, list[str]] = {}
    for name in work.matrices():
        if stack_of(name):
            stacks.setdefault(stack_of(name), []).append(name)
    return stacks


def tucker_forms(stack: Tensor, options: TuckerOptions) -> tuple[list[Form], float]:
    """Forms of the matrices of a stack [n, out, in], and the relative error. Raises UnsupportedError as above."""
    shape = (stack.shape[0], stack.shape[1], stack.shape[2])
    ranks = tucker_ranks(shape, int((1.0 - options.ratio) * stack.numel()))
    found = tucker(stack, ranks)
    left, right = (pack_as(part.float(), options.factors) for part in (found.left, found.right))
    forms = [Form(pack_as(core.float(), options.factors), outer=(left, right)) for core in found.cores]
    value = torch.stack([torch.from_numpy(form.value()) for form in forms])
    return forms, float((stack - value).norm() / stack.norm())


def tucker_ranks(shape: tuple[int, int, int], budget: int) -> tuple[int, int]:
    """Ranks in the proportion of the sides that hold at most `budget` numbers. Raises UnsupportedError where none do
    (few experts: what is shared weighs as much as what is saved)."""
    n, rows, columns = shape
    best: tuple[int, int] | None = None
    for a in range(1, rows + 1):
        b = max(1, round(a * columns / rows))
        if tucker_numbers(shape, (a, b)) <= budget:
            best = (a, b)
    if best is None or tucker_numbers(shape, best) >= n * rows * columns:
        raise UnsupportedError(
            f"cores of {n} matrices [{rows}, {columns}] that hold {budget} numbers have no rank",
            remedy="Ask for a smaller ratio, or leave the experts as they are", param="ratio",
        )  # fmt: skip
    return best
