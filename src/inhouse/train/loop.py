"""The training loop: AdamW over a Program run by the torch executor's whole-sequence mode, resumable to the bit.

Knows batches of ids and canonical weights; knows no text, no file format of models and no command line.
"""

import math
import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inhouse.core.errors import ConflictError, ExecutorError, FormatError, UsageError
from inhouse.runtime.program import Program, ProgramSet
from inhouse.runtime.torch_dense import forward
from inhouse.store.writing import atomic_file
from inhouse.train.data import Batch, BatchOrder, Dataset, make_batch

CHECKPOINT_VERSION = 1
CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """All that decides what a run computes; a checkpoint of another config is refused."""

    steps: int
    batch_tokens: int = 4096  # padded tokens of a batch
    learning_rate: float = 2e-3  # at the end of the warm-up
    final_rate: float = 0.05  # share of it left at the last step
    warmup: int = 100  # steps
    weight_decay: float = 0.1  # of matrices; vectors have none
    clip: float = 1.0  # largest norm of the gradient
    betas: tuple[float, float] = (0.9, 0.98)
    noise: float = 0.0  # probability that a token of a question is replaced
    noise_vocab: int = 0  # ids that noise may touch and give: 0..noise_vocab-1
    autocast: bool = False  # matrix products in bfloat16
    seed: int = 0


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did."""

    step: int  # steps done
    steps: int
    loss: float  # nats a learned token
    rate: float  # learning rate of the step
    tokens: int  # tokens run so far, padding left out
    seconds: float  # since this process began the run
    eta_s: float  # seconds left at this process's mean speed

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(slots=True)
class Progress:
    """Where a run stands; part of the checkpoint."""

    step: int = 0
    tokens: int = 0
    losses: list[float] = field(default_factory=list)  # one a step


def initial_weights(programs: ProgramSet, *, seed: int, layers: int, std: float = 0.02) -> dict[str, Tensor]:
    """Fresh float32 weights by canonical name: matrices normal with deviation `std` (those that end a residual branch
    less, by 1 / sqrt(2 layers), as in GPT-2), norms one, biases zero."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for spec in programs.weights.values():
        if spec.kind == "vector":
            weights[spec.name] = torch.zeros(spec.shape) if spec.name.endswith(".bias") else torch.ones(spec.shape)
            continue
        last = spec.name.endswith((".attn.o.weight", ".mlp.down.weight"))
        deviation = std / math.sqrt(2 * layers) if last else std
        weights[spec.name] = torch.randn(spec.shape, generator=generator) * deviation
    return weights


def rate_at(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a half cosine down to `final_rate` of the peak (SGDR without restarts, 1608.03983)."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    return config.learning_rate * (config.final_rate + (1.0 - config.final_rate) * cosine)


class Trainer:
    """One run. `run` goes on from `folder`'s checkpoint if there is one.

    Equal config, data, first weights, torch build and thread count give equal weights, however often the run was
    killed and resumed: every draw is a function of (seed, step), and the checkpoint holds all else.
    """

    def __init__(
        self,
        programs: ProgramSet,
        weights: Mapping[str, Tensor],
        data: Dataset,
        config: TrainConfig,
        folder: Path,
        device: str = "cpu",
    ) -> None:
        if config.steps < 1:
            raise UsageError(f"steps is {config.steps}, must be at least 1", param="steps")
        self._program: Program = programs.programs["step"]
        self._config, self._data, self._folder, self._device = config, data, folder, torch.device(device)
        self._fingerprint = {"config": asdict(config) | {"betas": list(config.betas)}, "data": data.digest()}
        self.weights = {n: w.detach().clone().to(self._device).requires_grad_() for n, w in weights.items()}
        self._constants = {n: torch.from_numpy(a).to(self._device) for n, a in programs.constants.items()}
        matrices = [w for w in self.weights.values() if w.dim() > 1]
        vectors = [w for w in self.weights.values() if w.dim() == 1]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self._optimiser = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
        self.progress = Progress()
        self._order = BatchOrder(data.lengths, config.batch_tokens, seed=config.seed)
        folder.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.exists():
            self._restore()

    @property
    def checkpoint(self) -> Path:
        return self._folder / CHECKPOINT

    def run(
        self,
        report: Callable[[StepReport], None] = lambda _: None,
        *,
        minutes: float = math.inf,
        save_every: int = 200,
    ) -> bool:
        """Trains until the last step or until `minutes` have passed; true once the last step is done.

        Saves every `save_every` steps and at the end. Raises ExecutorError when the loss is no longer a number.
        """
        begun, first = time.monotonic(), self.progress.step
        while self.progress.step < self._config.steps and time.monotonic() - begun < 60.0 * minutes:
            loss, rate = self._step()
            spent = time.monotonic() - begun
            done = self.progress.step - first
            left = (self._config.steps - self.progress.step) * spent / done
            report(StepReport(self.progress.step, self._config.steps, loss, rate, self.progress.tokens, spent, left))
            if self.progress.step % save_every == 0:
                self.save()
        self.save()
        return self.progress.step >= self._config.steps

    def _step(self) -> tuple[float, float]:
        config, step = self._config, self.progress.step
        chosen = self._order.at(step)
        batch = make_batch(self._data, chosen, noise=config.noise, vocab=config.noise_vocab, seed=(config.seed, step))
        rate = rate_at(step, config)
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        loss = self._loss(batch)
        self._optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.weights.values(), config.clip)
        self._optimiser.step()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ExecutorError(f"the loss is {value} at step {step}", remedy="Lower the learning rate and resume")
        self.progress.step += 1
        self.progress.tokens += int(self._data.lengths[chosen].sum())
        self.progress.losses.append(value)
        return value, rate

    def _loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy of the learned tokens, nats."""
        arrays = (batch.tokens, batch.rows, batch.targets)
        tokens, rows, targets = (torch.from_numpy(array).to(self._device) for array in arrays)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._config.autocast):
            logits = forward(self._program, tokens, self.weights | self._constants, rows=rows)["logits"]
        return torch.nn.functional.cross_entropy(logits.float(), targets)

    def save(self) -> None:
        """Writes the checkpoint, whole or not at all."""
        state = {
            "weights": {name: weight.detach().cpu() for name, weight in self.weights.items()},
            "optimiser": self._optimiser.state_dict(),
            "progress": asdict(self.progress),
        }
        write_checkpoint(self.checkpoint, self._fingerprint, state)

    def _restore(self) -> None:
        """Goes on from the checkpoint. Raises what `read_checkpoint` raises."""
        state = read_checkpoint(self.checkpoint, self._fingerprint, self._device)
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(state["weights"][name])
        self._optimiser.load_state_dict(state["optimiser"])
        self.progress = Progress(**state["progress"])


def write_checkpoint(path: Path, fingerprint: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Writes tensors and plain values with the fingerprint of the run they belong to, whole or not at all."""
    with atomic_file(path) as file:
        torch.save({"version": CHECKPOINT_VERSION, "fingerprint": dict(fingerprint), **state}, file)


def read_checkpoint(path: Path, fingerprint: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """What `write_checkpoint` wrote. Raises FormatError if it is damaged, ConflictError if it is another run's."""
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        version, found = state["version"], state["fingerprint"]
    except (OSError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise FormatError(f"{path.name} is damaged: {error}", remedy="Delete it and begin again") from error
    if version != CHECKPOINT_VERSION or found != fingerprint:
        changed = [k for k in fingerprint if found.get(k) != fingerprint[k]] or ["version"]
        raise ConflictError(
            f"{path.name} belongs to another run: {' and '.join(changed)} differ",
            remedy="Give another folder, or delete the checkpoint",
        )
    return state
