"""What flows through a model on a text: moments of the inputs of linears and norms, and how much each layer changes.

One pass of whole sequences over the plain Program, batch by batch; weights may be mapped files. Structured pruning and
folding of neurons ask for it; methods that quantise layer after layer have the block executor's own statistics.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inhouse.core.errors import UsageError
from inhouse.core.progress import Progress, silent
from inhouse.runtime.program import Op, Program
from inhouse.runtime.torch_dense import forward
from inhouse.runtime.torch_program import TorchValue

NORMS = ("rms_norm", "layer_norm")


@dataclass(slots=True)
class Moments:
    """Sums over rows of an input, f64; `gram` only where it was asked for."""

    total: Tensor  # [in]
    squares: Tensor  # [in]
    gram: Tensor | None = None  # [in, in], sum of x x^T
    count: int = 0

    def add(self, x: Tensor) -> None:
        """Takes rows [n, in]."""
        wide = x.double()
        self.total += wide.sum(0)
        if self.gram is None:
            self.squares += wide.square().sum(0)
        else:
            self.gram += wide.T @ wide
            self.squares = self.gram.diagonal().clone()
        self.count += len(x)

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def mean_square(self) -> Tensor:
        return self.squares / self.count

    @property
    def mean_gram(self) -> Tensor:
        """Raises UsageError where no Gram matrix was kept."""
        if self.gram is None:
            raise UsageError("no Gram matrix was kept of this input")
        return self.gram / self.count


@dataclass(slots=True)
class Seen:
    """What a pass found, by canonical name of the weight that reads the input."""

    inputs: dict[str, Moments] = field(default_factory=dict)  # of linears and norms; shared where they read one value
    cosines: dict[int, float] = field(default_factory=dict)  # layer -> sum over tokens of cos(input, output)
    equal: dict[int, bool] = field(default_factory=dict)  # layer -> whether its output was its input, bit by bit
    tokens: int = 0

    def influence(self, layers: int) -> Tensor:
        """Block influence 1 - mean cos(input, output) of each layer (ShortGPT, arXiv 2403.03853), f64 [layers]; exactly
        0 for a layer that changes nothing."""
        found = [0.0 if self.equal[i] else 1.0 - self.cosines[i] / self.tokens for i in range(layers)]
        return torch.tensor(found, dtype=torch.float64)


class _Observer:
    """Takes what an evaluation shows, one batch at a time."""

    def __init__(self, seen: Seen, grams: Collection[str]) -> None:
        self._seen, self._grams = seen, frozenset(grams)
        self._first: dict[int, Tensor] = {}
        self._last: dict[int, Tensor] = {}
        self.valid: Tensor | None = None  # bool [rows], where some are padding

    def __call__(self, op: Op, inputs: Sequence[TorchValue], outputs: Sequence[TorchValue]) -> None:
        x = inputs[0] if inputs else None
        if not isinstance(x, Tensor):
            return
        if op.layer >= 0:
            self._first.setdefault(op.layer, x)
            if isinstance(outputs[-1], Tensor):
                self._last[op.layer] = outputs[-1]
        if op.kind == "linears":
            self._add([name for name in op.weights[: len(op.weights) // 2]], x)
        elif op.kind in NORMS and op.attrs.get("heads", 1) == 1:
            self._add([op.weights[0]], x)

    def _add(self, names: list[str], x: Tensor) -> None:
        known = self._seen.inputs
        moments = next((known[name] for name in names if name in known), None)
        if moments is None:
            zeros = torch.zeros(x.shape[1], dtype=torch.float64)
            wanted = not self._grams.isdisjoint(names)
            gram = torch.zeros((x.shape[1], x.shape[1]), dtype=torch.float64) if wanted else None
            moments = Moments(zeros, zeros.clone(), gram)
        known |= dict.fromkeys(names, moments)
        moments.add(x if self.valid is None or len(x) != len(self.valid) else x[self.valid])

    def finish(self) -> None:
        """The batch is through: compares each layer's output with its input."""
        seen = self._seen
        for layer, before in self._first.items():
            after = self._last[layer]
            if self.valid is not None:
                before, after = before[self.valid], after[self.valid]
            a, b = before.double(), after.double()
            cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(1e-300)
            seen.cosines[layer] = seen.cosines.get(layer, 0.0) + float(cosine.sum())
            seen.equal[layer] = seen.equal.get(layer, True) and torch.equal(before, after)
        self._first, self._last = {}, {}


def observe(
    program: Program,
    weights: Mapping[str, Tensor],
    tokens: Tensor,
    *,
    lengths: Tensor | None = None,
    grams: Collection[str] = (),
    batch: int = 8,
    progress: Progress = silent,
) -> Seen:
    """Runs the text through the model.

    Args:
        weights: canonical name -> tensor, constants among them.
        tokens: int64 [n, length]; lengths: int64 [n], tokens of each row that count, the rest is padding on the right
            (None: all count). Only for models that look to the left alone, or rows without padding.
        grams: canonical names whose inputs' Gram matrix is wanted.
        batch: sequences that run at once.

    Raises UsageError for a text without tokens.
    """
    if tokens.dim() != 2 or not tokens.numel():
        raise UsageError("there is no text to calibrate on", remedy="Give a text", param="calibration")
    seen = Seen()
    watcher = _Observer(seen, grams)
    with torch.no_grad():
        for start in range(0, len(tokens), batch):
            part = tokens[start : start + batch]
            if lengths is not None:
                place = torch.arange(tokens.shape[1])
                watcher.valid = (place[None] < lengths[start : start + batch, None]).flatten()
            forward(program, part, weights, observe=watcher)
            watcher.finish()
            seen.tokens += part.numel() if watcher.valid is None else int(watcher.valid.sum())
            progress("observing", min(start + batch, len(tokens)), len(tokens))
    return seen
