"""The whole model under a budget of bytes: measured sensitivities, the knapsack, a local search, then one pass.

1. Every group of matrices is rounded with feedback to every format, alone; the mean KL divergence of the model with
   just that group rounded is its loss. 2. The knapsack shares the budget out. 3. A local search swaps formats where the
   divergence of the whole falls. 4. Embedding and head are rounded, then layer after layer along two paths (drift), and
   the last norm's gain is re-solved on the logits. No gradients. Holds the model as floats in memory: for models larger
   than that, give formats by `overrides` and use gptq or gptaq.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from inhouse.compress.blocks import Block, BlockRunner
from inhouse.compress.calibrate import Calibration
from inhouse.compress.drift import DriftOptions, drift_layer
from inhouse.compress.feedback import GptqOptions, gptq_codes
from inhouse.compress.graph import fusion_groups, matrices_of
from inhouse.compress.grids import Grid, fitting
from inhouse.compress.mixed import Group, Plan, local_search, plan_bytes, share_out
from inhouse.compress.values import Count, Natural, NotNegative
from inhouse.compress.work import Work
from inhouse.core.errors import UsageError
from inhouse.core.progress import Progress
from inhouse.runtime.form import Form
from inhouse.runtime.packed_stored import stored_nbytes
from inhouse.runtime.program import Op
from inhouse.runtime.torch_dense import forward

FORMATS = ("u2_row", "u2_g32", "u3_row", "u3_g32", "i4_row", "i4_g32", "q5_0", "q6_0", "q8_0")


@dataclass(frozen=True, slots=True)
class AutoOptions:
    """bytes: of all tensors as stored, vectors included; or bits: the same a parameter. formats: what may be chosen.
    rows: calibration rows that losses are measured on. trials: measurements of the local search. uniform: no knapsack,
    the first of `formats` for all. embedding: how much an error of the embedding's own rows counts beside one of the
    logits, in mean energies of the head's input."""

    bytes: Natural = 0
    bits: NotNegative = 0.0
    formats: tuple[str, ...] = FORMATS
    rows: Count = 24
    trials: Natural = 60
    uniform: bool = False
    embedding: NotNegative = 1.0
    drift: DriftOptions = field(default_factory=DriftOptions)


class _Model:
    """The model in memory, its losses measured against itself as it was."""

    def __init__(self, work: Work, calibration: Calibration, rows: int) -> None:
        self.program, self.weights = work.program, work.weights()
        self.tokens = calibration.tokens[:rows]
        lengths = calibration.lengths[:rows]
        self.at = torch.nonzero((torch.arange(self.tokens.shape[1])[None] < lengths[:, None]).flatten()).flatten()
        self.reference = torch.log_softmax(self.logits(self.weights), -1)

    def logits(self, weights: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return forward(self.program, self.tokens, weights, rows=self.at)["logits"].float()

    def divergence(self, weights: Mapping[str, Tensor]) -> float:
        """Mean KL(before || with these weights) in nats a token."""
        found = torch.log_softmax(self.logits(weights), -1)
        return float((self.reference.exp() * (self.reference - found)).sum(-1).mean())


def auto(
    work: Work, calibration: Calibration, options: AutoOptions, report: dict[str, Any], progress: Progress
) -> None:
    """Model scope: rounds every matrix within the budget. Raises UsageError for a budget that cannot be met."""
    names = [name for name in work.matrices() if work.value(name).ndim == 2]
    shapes = {name: work.shape(name) for name in names}
    groups = fusion_groups(work.program, names)
    budget = _budget(work, options, names)
    model = _Model(work, calibration, options.rows)
    grams = _grams(work, model, calibration, options)
    gptq = GptqOptions(options.drift.gptq.act_order, options.drift.gptq.damping, options.drift.gptq.block, refine=1)
    rounded: dict[tuple[str, str], Tensor] = {}
    losses: dict[tuple[Group, str], float] = {}
    formats = options.formats[:1] if options.uniform else options.formats
    for done, group in enumerate(groups):
        progress("sensitivities", done, len(groups))
        for fmt in formats:
            if all(fitting(fmt, shapes[name][1]) for name in group):
                for name in group:
                    rounded[name, fmt] = _alone(model.weights[name], grams[name], fmt, gptq)
                losses[group, fmt] = model.divergence({**model.weights, **{n: rounded[n, fmt] for n in group}})
    lacking = [group[0] for group in groups if not any(of == group for of, _ in losses)]
    if lacking:
        raise UsageError(f"none of the formats fits {lacking[0]}", param="formats")

    def measure(plan: Plan) -> float:
        return model.divergence({**model.weights, **{n: rounded[n, fmt] for g, fmt in plan.items() for n in g}})

    plan = share_out(groups, losses, shapes, budget)
    first = measure(plan)
    found, swaps = first, 0
    if options.trials > 1 and not options.uniform:
        plan, found, swaps = local_search(plan, losses, shapes, budget, measure, options.trials)
    chosen = {name: fmt for group, fmt in plan.items() for name in group}
    report |= {"formats": chosen, "bytes": plan_bytes(plan, shapes), "budget": budget, "knapsack": first,
               "searched": found, "swaps": swaps}  # fmt: skip
    report["finished"] = _finish(work, calibration, model, grams, chosen, options, report, progress)


def _budget(work: Work, options: AutoOptions, names: list[str]) -> int:
    """Bytes for matrices: the whole less what vectors and tables take."""
    counts = {name: work.value(name).numel() for name in work.names()}
    parameters = sum(counts.values())
    whole = options.bytes or int(options.bits * parameters / 8)
    if whole <= 0 and not options.uniform:
        raise UsageError("auto needs a budget", remedy="Give bytes or bits", param="bytes")
    vectors = sum(4 * count for name, count in counts.items() if name not in names)
    least = sum(_least(work.shape(name), options.formats) for name in names)
    if whole and whole < least + vectors:
        asked = f"bytes: {whole}" if options.bytes else f"bits: {options.bits:g} ({whole} bytes)"
        floor = least + vectors
        raise UsageError(
            f"{asked} cannot be reached: in the smallest of the formats the matrices take {least} bytes, and norms and "
            f"other vectors, which stay floats, {vectors} bytes: {floor} bytes in all, "
            f"{8 * floor / parameters:.2f} bits a parameter",
            remedy=f"Give bytes: {floor} or more, or formats of fewer bits", param="bytes" if options.bytes else "bits",
        )  # fmt: skip
    return (whole or 1 << 62) - vectors


def _least(shape: tuple[int, ...], formats: Sequence[str]) -> int:
    """Bytes of a matrix in the smallest of the formats that fit it."""
    return min((stored_nbytes(fmt, (shape[0], shape[1])) for fmt in formats if fitting(fmt, shape[1])), default=0)


def _grams(work: Work, model: _Model, calibration: Calibration, options: AutoOptions) -> dict[str, Tensor]:
    """Mean x x^T in front of every matrix with the weights as they are, f64; of an embedding that is read by token
    alone the identity, of a tied one both."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    valid = torch.empty(0)

    def observe(op: Op, inputs: Any, outputs: Any) -> None:
        for name in matrices_of(op) if op.kind == "linears" else ():
            x = inputs[0][valid] if len(inputs[0]) == len(valid) else inputs[0]
            x = x.double()
            sums[name] = sums.get(name, 0) + x.T @ x
            counts[name] = counts.get(name, 0) + len(x)

    with torch.no_grad():
        for at in range(0, len(calibration.tokens), 32):
            tokens, lengths = calibration.tokens[at : at + 32], calibration.lengths[at : at + 32]
            valid = (torch.arange(tokens.shape[1])[None] < lengths[:, None]).flatten()
            forward(model.program, tokens, model.weights, observe=observe)
    grams = {name: total / max(counts[name], 1) for name, total in sums.items()}
    looked_up = {op.weights[0] for op in work.program.ops if op.kind == "embed"}
    for name in work.matrices():
        if name in looked_up or name not in grams:
            width = work.shape(name)[-1]
            own = grams.get(name, torch.zeros(width, width, dtype=torch.float64))
            size = float(own.diagonal().mean()) or 1.0
            grams[name] = own + options.embedding * size * torch.eye(width, dtype=torch.float64)
    return grams


def _alone(weight: Tensor, gram: Tensor, fmt: str, options: GptqOptions) -> Tensor:
    grid = Grid(fmt, weight.shape[1])
    done = gptq_codes(weight, gram, grid, options)
    return grid.decode(done.codes, done.params, grid.index())


def _finish(
    work: Work, calibration: Calibration, model: _Model, grams: Mapping[str, Tensor], chosen: Mapping[str, str],
    options: AutoOptions, report: dict[str, Any], progress: Progress,
) -> float:  # fmt: skip
    """Rounds for good; the divergence of the whole in the end."""
    inside = {name for op in work.program.ops if op.layer >= 0 and op.kind == "linears" for name in matrices_of(op)}
    for name in [name for name in chosen if name not in inside]:
        grid = Grid(chosen[name], work.shape(name)[1])
        done = gptq_codes(work.value(name), grams[name], grid, options.drift.gptq)
        work.put_form(name, Form(grid.pack(done.codes, done.params)))
    report["layers"] = {}

    def visit(block: Block) -> None:
        report["layers"][str(block.layer)] = drift_layer(work, block, lambda name: chosen[name], options.drift)

    BlockRunner(work, calibration, work.folder).run_blocks(visit, progress)
    if options.drift.norms:
        _last_norm(work, model)
    return model.divergence(work.weights())


def _last_norm(work: Work, model: _Model) -> None:
    """Re-solves the gain in front of the head so that logits, centred, are nearest to the original ones."""
    ops = work.program.ops
    head = next((op for op in reversed(ops) if op.kind == "linears" and op.layer < 0), None)
    norm = next((op for op in ops if head is not None and op.outputs and op.outputs[0].id == head.inputs[0].id), None)
    if head is None or norm is None or norm.kind != "rms_norm":
        norm = next((op for op in reversed(ops) if op.kind == "rms_norm" and op.layer < 0), None)
    if head is None or norm is None or int(norm.attrs["heads"]) != 1:
        return
    gain, matrix = norm.weights[0], matrices_of(head)[0]
    seen: list[Tensor] = []

    def observe(op: Op, inputs: Any, outputs: Any) -> None:
        if op is norm:
            seen.append(outputs[0])

    for weights in (model.weights, work.weights()):
        with torch.no_grad():
            forward(model.program, model.tokens, weights, observe=observe)
    old, new = (x[model.at].double() if len(x) != len(model.at) else x.double() for x in seen)
    first, second = (w[matrix].double() - w[matrix].double().mean(0) for w in (model.weights, work.weights()))
    left = (second.T @ second) * (new.T @ new)
    right = ((second.T @ first) * (new.T @ old)).sum(1)
    ridge = 1e-3 * left.diagonal().mean()
    factors = torch.linalg.solve(left + ridge * torch.eye(len(left), dtype=torch.float64), right + ridge)
    offset = float(norm.attrs["offset"])
    before = work.value(gain)
    was = model.divergence(work.weights())
    work.put(gain, (before + offset) * factors.float().clamp(0.5, 2.0) - offset)
    if model.divergence(work.weights()) > was:
        work.put(gain, before)
