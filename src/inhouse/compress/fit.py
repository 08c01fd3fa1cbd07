"""Learning what compression broke: AdamW over canonical weights through the whole-sequence torch executor.

One loop for healing after pruning or factorising (masks are held), distillation (any objective), quantization-aware
training (hooks put what is stored in a weight's place) and fine-tuning. Equal config, data, weights, torch and thread
count give equal bits, however often the run was killed and resumed. Knows no recipe, no model file and no text.
"""

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from inhouse.compress.features import Tap
from inhouse.compress.objective import CrossEntropy, Moment, Objective
from inhouse.core.errors import ExecutorError, UsageError
from inhouse.core.progress import Progress as Tell
from inhouse.core.progress import silent
from inhouse.runtime.program import Program, ProgramSet
from inhouse.runtime.torch_dense import forward
from inhouse.train.data import Batch, BatchOrder, Dataset, make_batch
from inhouse.train.loop import CHECKPOINT, Progress, TrainConfig, rate_at, read_checkpoint, write_checkpoint

SAVE_EVERY = 100  # steps between checkpoints


@dataclass(frozen=True, slots=True, kw_only=True)
class FitConfig(TrainConfig):
    """What decides what a run computes. Learning is short and starts from good weights, so decay is off."""

    learning_rate: float = 1e-3
    warmup: int = 20
    weight_decay: float = 0.0
    extra_rate: float = 1.0  # learning rate of hooks' and objectives' own parameters, as a factor
    validate_every: int = 100  # steps; with validation data


class WeightHook(Protocol):
    """What stands in a weight's place in the forward pass, differentiable: fake quantization, a low-rank form."""

    def parameters(self) -> Mapping[str, Tensor]:
        """Leaf tensors that are learned beside the weight."""

    def __call__(self, weight: Tensor) -> Tensor:
        """The weight as the model will have it, of the same shape."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What is learned, and what holds it.

    Args:
        masks: canonical name -> bool of the weight's shape; False entries are zero, always.
        hooks: canonical name -> WeightHook.
        learns: whether a canonical name is learned; low-rank-only training is a test of its ending.
        program: another `step` Program to run, such as one with `quantize_rows` in it; None: the plain one.
    """

    masks: Mapping[str, Tensor] = field(default_factory=dict)
    hooks: Mapping[str, WeightHook] = field(default_factory=dict)
    learns: Callable[[str], bool] = lambda _: True
    program: Program | None = None


@dataclass(frozen=True, slots=True)
class FitResult:
    """What a run ended with: the best on validation, or the last step without validation data."""

    weights: dict[str, Tensor]  # canonical name -> weight, hooks not applied, masks held
    extra: dict[str, Tensor]  # parameters of hooks (`NAME:key`) and of the objective (`objective:key`)
    step: int  # of these weights
    steps: int  # run in all
    finished: bool  # all steps done, rather than out of time
    seconds: float
    losses: list[float]  # training loss of each step
    validation: list[tuple[int, float]]  # (step, objective on the validation data); step 0 is the start
    best: float | None  # the least of them


class Fitter:
    """One run; `run` goes on from the folder's checkpoint if there is one.

    Args:
        programs: the model; its `step` Program is run unless `setup` brings another.
        weights: canonical name -> float tensor of every weight (constants excluded). They are copied.
        data, validation: sequences with the positions that are learned.
        objective: what is made small; None: cross-entropy.
        judge: what validation measures; None: the objective.
        folder: of the checkpoint; None: nothing is kept.

    Raises UsageError for steps < 1, masks or hooks of unknown names or shapes, nothing to learn; ConflictError and
    FormatError for a checkpoint of another run or a damaged one.
    """

    def __init__(
        self,
        programs: ProgramSet,
        weights: Mapping[str, Tensor],
        data: Dataset,
        config: FitConfig,
        *,
        objective: Objective | None = None,
        setup: Setup | None = None,
        validation: Dataset | None = None,
        judge: Objective | None = None,
        folder: Path | None = None,
    ) -> None:
        self._setup = setup or Setup()
        self._program = self._setup.program or programs.programs["step"]
        self._config, self._data, self._validation, self._folder = config, data, validation, folder
        self._objective = objective or CrossEntropy()
        self._judge = judge or self._objective
        _check(config, weights, self._setup)
        self._masks = {name: mask.to(torch.float32) for name, mask in self._setup.masks.items()}
        self.weights = {n: w.detach().clone().float().requires_grad_(self._setup.learns(n)) for n, w in weights.items()}
        self.extra = _extra(self._setup.hooks, self._objective)
        self._constants = {n: torch.from_numpy(a) for n, a in programs.constants.items()}
        self._hold()
        self._optimiser = self._make_optimiser()
        self._learned = [p for group in self._optimiser.param_groups for p in group["params"]]
        self.progress = Progress()
        self._judged: list[tuple[int, float]] = []
        self._best: dict[str, Any] | None = None
        self._order = BatchOrder(data.lengths, config.batch_tokens, seed=config.seed)
        self._fingerprint = self._describe()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            if self.checkpoint.exists():
                self._restore()

    @property
    def checkpoint(self) -> Path:
        assert self._folder is not None
        return self._folder / CHECKPOINT

    def run(self, *, minutes: float = math.inf, progress: Tell = silent, label: str = "training") -> FitResult:
        """Trains until the last step or until `minutes` have passed, saving every SAVE_EVERY steps and at the end.

        `progress` is told (label, steps done, steps). Raises ExecutorError when the loss is no longer a number.
        """
        begun, config = time.monotonic(), self._config
        if self._validation is not None and not self._judged:
            self._validate()
        while self.progress.step < config.steps and time.monotonic() - begun < 60.0 * minutes:
            self._step()
            done = self.progress.step
            if self._validation is not None and (done % config.validate_every == 0 or done == config.steps):
                self._validate()
            if done % SAVE_EVERY == 0:
                self._save()
            progress(label, done, config.steps)
        self._save()
        if self._validation is not None and self._judged[-1][0] != self.progress.step:
            self._validate()  # after the checkpoint: a resumed run judges at the steps an unbroken one judges at
        return self._result(time.monotonic() - begun)

    def effective(self) -> dict[str, Tensor]:
        """Every weight as the forward pass has it, hooks applied."""
        hooks = self._setup.hooks
        return {name: hooks[name](w) if name in hooks else w for name, w in self.weights.items()}

    def _make_optimiser(self) -> torch.optim.AdamW:
        config = self._config
        learned = [w for w in self.weights.values() if w.requires_grad]
        extra = [p for p in self.extra.values() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [w for w in learned if w.dim() > 1], "weight_decay": config.weight_decay, "factor": 1.0},
            {"params": [w for w in learned if w.dim() == 1], "weight_decay": 0.0, "factor": 1.0},
            {"params": extra, "weight_decay": 0.0, "factor": config.extra_rate},
        ]
        groups = [group for group in groups if group["params"]]
        if not groups:
            raise UsageError("nothing is learned", remedy="Let at least one weight change", param="learns")
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)

    def _step(self) -> None:
        config, step = self._config, self.progress.step
        chosen = self._order.at(step)
        batch = make_batch(self._data, chosen, noise=config.noise, vocab=config.noise_vocab, seed=(config.seed, step))
        for group in self._optimiser.param_groups:
            group["lr"] = rate_at(step, config) * group["factor"]
        loss = self._objective(self._moment(batch, self._data, chosen, self._objective))
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ExecutorError(f"the loss is {value} at step {step}", remedy="Lower the learning rate and resume")
        self._optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self._learned, config.clip)
        self._optimiser.step()
        self._hold()
        self.progress.step += 1
        self.progress.tokens += int(self._data.lengths[chosen].sum())
        self.progress.losses.append(value)

    def _hold(self) -> None:
        """Adam moves weights whose gradient is zero by its momentum: pruned ones are put back after every step."""
        with torch.no_grad():
            for name, mask in self._masks.items():
                self.weights[name].mul_(mask)

    def _moment(self, batch: Batch, data: Dataset, chosen: Any, objective: Objective) -> Moment:
        tokens, rows, targets = (torch.from_numpy(a) for a in (batch.tokens, batch.rows, batch.targets))
        tap = Tap(tokens.shape) if objective.features else None
        with torch.autocast("cpu", torch.bfloat16, enabled=self._config.autocast):
            logits = forward(self._program, tokens, self.effective() | self._constants, rows=rows, observe=tap)[
                "logits"
            ]
        row, offset = rows // tokens.shape[1], rows % tokens.shape[1]
        at = torch.from_numpy(data.starts[chosen])[row] + offset
        lengths = torch.from_numpy(data.lengths[chosen])
        features = None if tap is None else tap.features()
        return Moment(self.progress.step, tokens, lengths, rows, targets, at, logits.float(), features)

    def judge(self) -> float:
        """The judge's mean over the validation data, every learned token counting alike."""
        assert self._validation is not None
        total, count, data = 0.0, 0, self._validation
        order = BatchOrder(data.lengths, self._config.batch_tokens, seed=0)
        with torch.no_grad():
            seen, step = 0, 0
            while seen < len(data):
                chosen = order.at(step)
                batch = make_batch(data, chosen)
                value = float(self._judge(self._moment(batch, data, chosen, self._judge)))
                total, count = total + value * batch.rows.size, count + batch.rows.size
                seen, step = seen + chosen.size, step + 1
        return total / count

    def _validate(self) -> None:
        """Judges, and keeps the best weights."""
        value = self.judge()
        self._judged.append((self.progress.step, value))
        if self._best is None or value < self._best["value"]:
            kept = {name: weight.detach().clone() for name, weight in self.weights.items()}
            extra = {name: value.detach().clone() for name, value in self.extra.items()}
            self._best = {"value": value, "step": self.progress.step, "weights": kept, "extra": extra}

    def _result(self, seconds: float) -> FitResult:
        best = self._best or {"value": None, "step": self.progress.step, "weights": self.weights, "extra": self.extra}
        with torch.no_grad():  # hooks hold these very tensors: what they export is what was chosen
            for name, value in self.extra.items():
                value.copy_(best["extra"][name])
        return FitResult(
            {name: weight.detach().clone() for name, weight in best["weights"].items()},
            {name: value.detach().clone() for name, value in best["extra"].items()},
            best["step"], self.progress.step, self.progress.step >= self._config.steps, seconds,
            list(self.progress.losses), list(self._judged), best["value"],
        )  # fmt: skip

    def _describe(self) -> dict[str, Any]:
        """All that decides the run; a checkpoint of another is refused."""
        digest = hashlib.sha256()
        for name in sorted(self.weights):
            digest.update(name.encode() + self.weights[name].detach().numpy().tobytes())
            digest.update(b"learned" if self.weights[name].requires_grad else b"frozen")
        for name in sorted(self._masks):
            digest.update(name.encode() + self._masks[name].numpy().tobytes())
        for name in sorted(self.extra):
            digest.update(name.encode() + self.extra[name].detach().numpy().tobytes())
        config = asdict(self._config) | {"betas": list(self._config.betas)}
        validation = "" if self._validation is None else self._validation.digest()
        return {
            "config": config, "data": self._data.digest(), "validation": validation, "weights": digest.hexdigest(),
            "objective": self._objective.describe(), "judge": self._judge.describe(),
        }  # fmt: skip

    def _save(self) -> None:
        if self._folder is None:
            return
        state = {
            "weights": {name: weight.detach() for name, weight in self.weights.items()},
            "extra": {name: value.detach() for name, value in self.extra.items()},
            "optimiser": self._optimiser.state_dict(),
            "progress": asdict(self.progress),
            "judged": [list(pair) for pair in self._judged],
            "best": self._best,
        }
        write_checkpoint(self.checkpoint, self._fingerprint, state)

    def _restore(self) -> None:
        state = read_checkpoint(self.checkpoint, self._fingerprint, torch.device("cpu"))
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(state["weights"][name])
            for name, value in self.extra.items():
                value.copy_(state["extra"][name])
        self._optimiser.load_state_dict(state["optimiser"])
        self.progress = Progress(**state["progress"])
        self._judged = [(int(step), float(value)) for step, value in state["judged"]]
        self._best = state["best"]


def fit(
    programs: ProgramSet,
    weights: Mapping[str, Tensor],
    data: Dataset,
    config: FitConfig,
    *,
    objective: Objective | None = None,
    setup: Setup | None = None,
    validation: Dataset | None = None,
    judge: Objective | None = None,
    folder: Path | None = None,
    minutes: float = math.inf,
    progress: Tell = silent,
) -> FitResult:
    """Trains and gives the best weights; arguments and errors as of `Fitter` and `Fitter.run`."""
    fitter = Fitter(
        programs, weights, data, config, objective=objective, setup=setup, validation=validation, judge=judge,
        folder=folder,
    )  # fmt: skip
    return fitter.run(minutes=minutes, progress=progress)


def _extra(hooks: Mapping[str, WeightHook], objective: Objective) -> dict[str, Tensor]:
    found = {f"{name}:{key}": value for name, hook in hooks.items() for key, value in hook.parameters().items()}
    return found | {f"objective:{key}": value for key, value in objective.parameters().items()}


def _check(config: FitConfig, weights: Mapping[str, Tensor], setup: Setup) -> None:
    if config.steps < 1:
        raise UsageError(f"steps is {config.steps}, must be at least 1", param="steps")
    unknown = sorted((set(setup.masks) | set(setup.hooks)) - set(weights))
    if unknown:
        raise UsageError(f"there is no weight {unknown[0]!r} to mask or quantise", param=unknown[0])
    for name, mask in setup.masks.items():
        if mask.shape != weights[name].shape:
            shapes = f"{list(mask.shape)}, the weight {list(weights[name].shape)}"
            raise UsageError(f"the mask of {name} is {shapes}", param=name)
