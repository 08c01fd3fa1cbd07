"""What a training run makes small: cross-entropy, agreement with a teacher (response, features, relations), any mix.

Knows a step's tensors and a teacher's signals; losses are pure functions of `losses`; knows no files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from inhouse.compress.features import Features
from inhouse.compress.losses import (
    Direction,
    TopK,
    angle_relation,
    attention_loss,
    distance_relation,
    divergence,
    hidden_loss,
    layer_relation,
    minilm_relation,
    similarity_relation,
    top_k_divergence,
)
from inhouse.core.errors import UsageError


@dataclass(frozen=True, slots=True)
class Moment:
    """One step of a student, as objectives see it."""

    step: int
    tokens: Tensor  # int64 [B, L], padded on the right
    lengths: Tensor  # int64 [B]
    rows: Tensor  # int64 [S], places in the flattened B * L whose next token is learned
    targets: Tensor  # int64 [S]
    at: Tensor  # int64 [S], the same places in the data set's ids
    logits: Tensor  # float32 [S, vocab], the student's
    features: Features | None = None  # if the objective asks for them

    def valid(self) -> Tensor:
        """bool [B, L]: no padding."""
        return torch.arange(self.tokens.shape[1])[None, :] < self.lengths[:, None]


@dataclass(frozen=True, slots=True)
class Signals:
    """What a teacher says of a moment: logits [S, vocab] or its likeliest tokens, and features if it was asked."""

    logits: Tensor | None = None
    top: TopK | None = None
    features: Features | None = None


class Teacher(Protocol):
    """Something that has an opinion on every learned position."""

    def signals(self, moment: Moment, features: bool = False) -> Signals:
        """Without gradient."""

    def describe(self) -> str:
        """What tells it from other teachers; part of a run's fingerprint."""


class Objective(Protocol):
    """A scalar to make small."""

    @property
    def features(self) -> bool:
        """Whether moments must bring the student's features."""

    def parameters(self) -> Mapping[str, Tensor]:
        """Leaf tensors that are learned beside the model (projections)."""

    def describe(self) -> str:
        """What tells it from other objectives; part of a run's fingerprint."""

    def __call__(self, moment: Moment) -> Tensor:
        """The mean over learned positions."""


class CrossEntropy:
    """Negative log-likelihood of the text's own next token, nats."""

    features = False

    def parameters(self) -> Mapping[str, Tensor]:
        return {}

    def describe(self) -> str:
        return "cross-entropy"

    def __call__(self, moment: Moment) -> Tensor:
        return F.cross_entropy(moment.logits, moment.targets)


class Response:
    """Agreement of next-token distributions (`losses.divergence`).

    Args:
        shared: ids 0 .. shared - 1 are compared and both sides renormalised over them (`teacher.shared_ids` says how
            many); None: all, which must be as many on both sides.
    """

    features = False

    def __init__(
        self,
        teacher: Teacher,
        *,
        direction: Direction = "forward",
        temperature: float = 1.0,
        beta: float = 0.5,
        shared: int | None = None,
    ) -> None:
        self._teacher, self._direction, self._temperature = teacher, direction, temperature
        self._beta, self._shared = beta, shared

    def parameters(self) -> Mapping[str, Tensor]:
        return {}

    def describe(self) -> str:
        options = f"{self._direction} T={self._temperature} beta={self._beta} shared={self._shared}"
        return f"response({self._teacher.describe()}, {options})"

    def __call__(self, moment: Moment) -> Tensor:
        found = self._teacher.signals(moment)
        ours = moment.logits[:, : self._shared]
        direction, temperature, beta = self._direction, self._temperature, self._beta
        if found.top is not None:
            return top_k_divergence(ours, found.top, direction=direction, temperature=temperature, beta=beta)
        assert found.logits is not None
        theirs = found.logits[:, : self._shared]
        return divergence(ours, theirs, direction=direction, temperature=temperature, beta=beta)


def layer_map(student: int, teacher: int) -> dict[int, int]:
    """Student layer -> teacher layer, evenly, the last to the last (the uniform strategy of TinyBERT)."""
    return {i: (i + 1) * teacher // student - 1 for i in range(student)}


class FeatureMatch:
    """Hidden states and attention maps like the teacher's.

    Args:
        layers: student layer -> teacher layer.
        widths: (student's, teacher's) hidden width; where they differ each layer learns a projection between them.
        hidden, attention: how much each counts; 0 leaves it out.
        kind: of `losses.hidden_loss`.
    """

    features = True

    def __init__(
        self,
        teacher: Teacher,
        layers: Mapping[int, int],
        widths: tuple[int, int],
        *,
        hidden: float = 1.0,
        attention: float = 1.0,
        kind: str = "mse",
        seed: int = 0,
    ) -> None:
        if not layers:
            raise UsageError("no layers are matched", param="layers")
        self._teacher, self._layers, self._kind = teacher, dict(layers), kind
        self._hidden, self._attention = hidden, attention
        self._projections: dict[int, Tensor] = {}
        if hidden and widths[0] != widths[1]:
            generator = torch.Generator().manual_seed(seed)
            for layer in self._layers:
                start = torch.randn(widths[1], widths[0], generator=generator) / widths[0] ** 0.5
                self._projections[layer] = start.requires_grad_()

    def parameters(self) -> Mapping[str, Tensor]:
        return {f"projection.{layer}": weight for layer, weight in self._projections.items()}

    def describe(self) -> str:
        options = f"{self._layers} hidden={self._hidden} attention={self._attention} {self._kind}"
        return f"features({self._teacher.describe()}, {options})"

    def __call__(self, moment: Moment) -> Tensor:
        ours, theirs = _features(moment, self._teacher)
        total = moment.logits.new_zeros(())
        for mine, other in self._layers.items():
            if self._hidden:
                x = ours.hidden[mine][moment.rows]
                if mine in self._projections:
                    x = x @ self._projections[mine].T
                total = total + self._hidden * hidden_loss(x, theirs.hidden[other][moment.rows], kind=self._kind)
            if self._attention:
                maps = ours.heads[mine].maps(), theirs.heads[other].maps()
                total = total + self._attention * attention_loss(*maps, moment.valid())
        return total / len(self._layers)


class RelationMatch:
    """Relations like the teacher's: between tokens (distance, angle), within attention (MiniLM), between layers.

    Args:
        layers: student layer -> teacher layer.
        distance, angle, similarity, minilm, between: how much each counts; 0 leaves it out. MiniLM's relations are
            those of the last pair of layers alone, as in its paper.
        relation_heads: of MiniLM's relations.
        tokens: rows that distances are taken between; angles take a quarter of them, for they grow with the cube.
    """

    features = True

    def __init__(
        self,
        teacher: Teacher,
        layers: Mapping[int, int],
        *,
        distance: float = 1.0,
        angle: float = 1.0,
        similarity: float = 1.0,
        minilm: float = 1.0,
        between: float = 1.0,
        relation_heads: int = 4,
        tokens: int = 128,
    ) -> None:
        if not layers:
            raise UsageError("no layers are matched", param="layers")
        if between and len(layers) < 2:
            raise UsageError("relations between layers need two layers", param="between")
        self._teacher, self._layers, self._heads, self._tokens = teacher, dict(layers), relation_heads, tokens
        self._distance, self._angle, self._similarity = distance, angle, similarity
        self._minilm, self._between = minilm, between

    def parameters(self) -> Mapping[str, Tensor]:
        return {}

    def describe(self) -> str:
        weights = (self._distance, self._angle, self._similarity, self._minilm, self._between)
        return f"relations({self._teacher.describe()}, {self._layers} {weights} {self._heads} {self._tokens})"

    def __call__(self, moment: Moment) -> Tensor:
        ours, theirs = _features(moment, self._teacher)
        rows = moment.rows[:: max(1, -(-len(moment.rows) // self._tokens))]
        few = rows[::4]
        total = moment.logits.new_zeros(())
        for mine, other in self._layers.items():
            s, t = ours.hidden[mine], theirs.hidden[other]
            if self._distance:
                total = total + self._distance * distance_relation(s[rows], t[rows])
            if self._angle:
                total = total + self._angle * angle_relation(s[few], t[few])
            if self._similarity:
                shape = (*moment.tokens.shape, -1)
                part = similarity_relation(s.reshape(shape), t.reshape(shape), moment.valid())
                total = total + self._similarity * part
        total = total / len(self._layers)
        if self._minilm:
            mine, other = max(self._layers.items())
            a, b, valid = ours.heads[mine], theirs.heads[other], moment.valid()
            pairs = ((a.q, b.q), (a.k, b.k), (a.v, b.v))
            parts = [minilm_relation(x, y, valid, heads=self._heads) for x, y in pairs]
            total = total + self._minilm * torch.stack(parts).mean()
        if self._between:
            mine_all = [ours.hidden[layer][moment.rows] for layer in self._layers]
            other_all = [theirs.hidden[layer][moment.rows] for layer in self._layers.values()]
            total = total + self._between * layer_relation(mine_all, other_all)
        return total


class Mix:
    """A weighted sum of objectives."""

    def __init__(self, *parts: tuple[float, Objective]) -> None:
        self._parts: Sequence[tuple[float, Objective]] = parts
        self.features = any(objective.features for _, objective in parts)

    def parameters(self) -> Mapping[str, Tensor]:
        return {f"{i}.{key}": p for i, (_, part) in enumerate(self._parts) for key, p in part.parameters().items()}

    def describe(self) -> str:
        return " + ".join(f"{weight} {objective.describe()}" for weight, objective in self._parts)

    def __call__(self, moment: Moment) -> Tensor:
        values = [weight * objective(moment) for weight, objective in self._parts]
        return torch.stack(values).sum()


def _features(moment: Moment, teacher: Teacher) -> tuple[Features, Features]:
    theirs = teacher.signals(moment, features=True).features
    if moment.features is None or theirs is None:
        raise UsageError("this teacher gives no features", remedy="Use a live teacher, not cached logits")
    return moment.features, theirs
