"""The proof that a written checkpoint is the model that was in memory: opened again, compared, and run.

Knows how to open and run; the model in memory is the caller's, given as two functions. Needs no torch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import FormatError, UnavailableError
from inhouse.core.progress import Progress, silent
from inhouse.load.bind import plan_binding
from inhouse.load.describe import describe
from inhouse.load.model import LoadedModel, open_model
from inhouse.model.build import weight_specs
from inhouse.model.spec import ModelSpec
from inhouse.runtime.form import Form
from inhouse.runtime.step import BLOCK_SIZE, Step
from inhouse.store.source import materialise
from inhouse.store.stored_source import StoredSource

F32 = npt.NDArray[np.float32]
LOGITS_TOLERANCE = 1e-3  # of the largest logit: f32 sums in another order differ by 1e-5 of it and less
MAX_TOKENS = 256
RUN_ELEMENTS = 1 << 22  # of a matrix, decoded at once


@dataclass(frozen=True, slots=True)
class Proof:
    """What held: `tensors` canonical weights were equal to the last bit; `logits_error` is the largest difference over
    the largest logit (None: not run), on `tokens` tokens by `executor`."""

    tensors: int
    nbytes: int
    logits_error: float | None = None
    tokens: int = 0
    executor: str = ""


def prove(
    folder: Path,
    value: Callable[[str], F32 | Form],
    logits: Callable[[npt.NDArray[np.int64]], F32] | None = None,
    tokens: npt.NDArray[np.int64] | None = None,
    *,
    executor: str = "native",
    tolerance: float = LOGITS_TOLERANCE,
    progress: Progress = silent,
) -> Proof:
    """Opens what `write_stored` wrote and compares it with the model in memory.

    Args:
        value: canonical name -> the form that was written, or what it must decode to, f32 [out, in] or [n]; one call a
            weight. Of forms only a run of rows is decoded at a time.
        logits: int64 [L] -> f32 [L, vocab] of the model in memory, float activations.
        tokens: int64 [L], at most MAX_TOKENS; with `logits` of a decoder the model is opened and run on them with float
            activations and f32 KV.
        executor: `native`, or `torch` where that is not installed.

    Raises FormatError naming the first tensor that is missing, left over or differs, or the first token whose logits
    differ by more than `tolerance` of the largest.
    """
    described = describe(folder)
    source = described.source
    try:
        if not isinstance(source, StoredSource):
            raise FormatError(f"{folder} is no checkpoint of our own form")
        plan_binding(source, described.spec, described.family, described.programs())
        names = list(weight_specs(described.spec))
        with described.guard():
            for done, name in enumerate(names):
                _compare(source, name, value(name))
                progress("prove", done + 1, len(names))
        nbytes = sum(source.info(name).nbytes for name in source)
    finally:
        source.close()
    if logits is None or tokens is None or not isinstance(described.spec, ModelSpec) or described.spec.headless:
        return Proof(len(names), nbytes)
    used = tokens[: min(MAX_TOKENS, described.spec.context_length)]
    found, by = _run(folder, used, executor)
    return Proof(len(names), nbytes, _logits_error(found, logits(used), tolerance), len(used), by)


def _compare(source: StoredSource, name: str, wanted: F32 | Form) -> None:
    matrix = name in source.ranks or name in source.trains or len(source.info(name).shape) == 2
    found = source.form(name) if matrix else materialise(source, name)
    if found.shape != wanted.shape:
        raise FormatError(f"{name} was written as {list(found.shape)}, it is {list(wanted.shape)}", param=name)
    step = max(1, RUN_ELEMENTS // max(1, found.shape[-1])) if len(found.shape) > 1 else found.shape[0]
    apart = all(not isinstance(one, Form) or _is_plain(one) for one in (found, wanted))
    for start in range(0, found.shape[0], step if apart else max(1, found.shape[0])):
        part = slice(start, start + step if apart else None)
        ours, theirs = _rows(found, part), _rows(wanted, part)
        if not np.array_equal(ours, theirs):
            off = float(np.abs(ours - theirs).max())
            raise FormatError(
                f"{name} reads back otherwise than it was written, by up to {off:g}",
                remedy="This is a fault of the writer, or of the disk; compress again.",
                param=name,
            )


def _is_plain(form: Form) -> bool:
    """Whether rows of it can be decoded without the others."""
    return form.main is not None and form.low_rank is None and form.columns is None and form.outer is None


def _rows(weight: F32 | Form, part: slice) -> F32:
    if not isinstance(weight, Form):
        return weight[part]
    if part.stop is None or weight.main is None:
        return weight.value()
    return weight.main.rows(np.arange(part.start, min(part.stop, weight.shape[0])))


def _run(folder: Path, tokens: npt.NDArray[np.int64], executor: str) -> tuple[F32, str]:
    """Logits [L, vocab] of the checkpoint, and the executor that gave them."""
    options = {"activations": "float", "kv_dtype": "f32", "cache": False}
    try:
        model = open_model(str(folder.resolve()), executor=executor, **options)  # type: ignore[arg-type]
    except UnavailableError:
        if executor == "torch":
            raise
        return _run(folder, tokens, "torch")
    try:
        return logits_of(model, tokens), model.executor.name
    finally:
        model.close()


def logits_of(model: LoadedModel, tokens: npt.NDArray[np.int64], adapter: int = 0) -> F32:
    """Logits [L, vocab] of one sequence int64 [L], run in one step; the executor's state is made anew for it."""
    count = len(tokens)
    blocks = -(-count // BLOCK_SIZE)
    groups = [group.name for group in model.programs.groups]
    model.executor.allocate(dict.fromkeys(groups, blocks))
    step = Step(
        tokens=tokens.astype(np.int32),
        positions=np.arange(count, dtype=np.int32),
        sequences=np.zeros(count, np.int32),
        lengths=np.array([count], np.int32),
        tables=dict.fromkeys(groups, np.arange(blocks, dtype=np.int32)[None, :]),
        sampled=np.arange(count, dtype=np.int32),
        adapters=np.array([adapter], np.int32),
    )
    return np.array(model.executor.run("step", step)["logits"], np.float32)


def _logits_error(found: F32, wanted: F32, tolerance: float) -> float:
    """The largest difference over the largest logit."""
    if found.shape != wanted.shape:
        raise FormatError(f"the written model gives logits {found.shape}, the one in memory {wanted.shape}")
    most = float(np.abs(wanted).max(initial=0.0)) or 1.0
    rows = np.abs(found - wanted).max(axis=1) / most
    worst = float(rows.max(initial=0.0))
    if not math.isfinite(worst) or worst > tolerance:
        at = int(np.argmax(~(rows <= tolerance)))
        raise FormatError(
            f"the written model's logits differ from the one in memory by {worst:.2g} of the largest, allowed are "
            f"{tolerance:.2g}; first at token {at}",
            remedy="Report this with the recipe: weights are equal, so what runs them is not.",
        )
    return worst
