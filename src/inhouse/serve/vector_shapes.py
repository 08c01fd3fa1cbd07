"""The shapes of answers with vectors and scores, for the OpenAPI document; the routes build them as plain dicts."""

from typing import Any, Literal

from pydantic import BaseModel

from inhouse.serve.shapes import Shape, errors


class VectorUsage(Shape):
    prompt_tokens: int
    total_tokens: int


class Embedding(Shape):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str  # base64 of little-endian float32


class EmbeddingList(Shape):
    """The answer of `/v1/embeddings`."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: VectorUsage


class RankedText(Shape):
    text: str


class Ranked(Shape):
    index: int
    relevance_score: float
    document: RankedText | None = None


class Ranking(Shape):
    """The answer of `/v1/rerank`, most relevant first."""

    id: str
    model: str
    results: list[Ranked]
    usage: VectorUsage


class ClassifiedToken(Shape):
    token: str
    label: str
    probs: list[float]


class Classified(Shape):
    """One input's classes: `label` and `probs` of texts, `tokens` where the model classifies each token."""

    index: int
    num_classes: int
    label: str | None
    probs: list[float] | None
    tokens: list[ClassifiedToken] | None


class Classification(Shape):
    """The answer of `/classify`; `labels` are the model's, in the order of `probs`."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    labels: list[str]
    data: list[Classified]
    usage: VectorUsage


class Score(Shape):
    object: Literal["score"]
    index: int
    score: float


class ScoreList(Shape):
    """The answer of `/v1/score`."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Score]
    usage: VectorUsage


def answers(shape: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """`responses=` of a route that answers with one body."""
    return {200: {"model": shape, "description": "the answer"}} | errors()
