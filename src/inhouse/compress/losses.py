"""The losses of distillation as pure functions of tensors, all differentiable in the student, all float32 or float64.

    response   KL divergence forward, reverse and generalised Jensen-Shannon; top-k teachers with the mass of the rest
    feature    hidden states (mean square, cosine) and attention maps
    relation   distances, angles and similarities of tokens, MiniLM's relations of Q, K and V, relations of layers

Knows no model, no batch and no teacher. Every divergence is >= 0 and 0 for equal arguments.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from inhouse.core.errors import UsageError

Direction = Literal["forward", "reverse", "js"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "reverse", "js")
CHUNK = 16384  # vocabulary entries at a time
EPS = 1e-12


def divergence(
    student: Tensor,
    teacher: Tensor,
    *,
    direction: Direction = "forward",
    temperature: float = 1.0,
    beta: float = 0.5,
    chunk: int = CHUNK,
) -> Tensor:
    """T^2 D(teacher, student), the mean over rows, in nats (Hinton et al., arXiv 1503.02531: T^2 keeps the gradient's
    size as T grows).

    D is KL(teacher || student) forward, KL(student || teacher) `reverse` (MiniLLM, arXiv 2306.08543), or the
    generalised Jensen-Shannon divergence `js`: beta KL(t || m) + (1 - beta) KL(s || m), m = beta t + (1 - beta) s
    (GKD, arXiv 2306.13649).

    Args:
        student, teacher: logits [rows, vocab]; the gradient reaches the student alone.
        chunk: vocabulary entries at a time; beside one gradient of the student's logits nothing of that size is made.

    Raises UsageError for shapes that differ, an unknown direction, temperature <= 0 or beta outside (0, 1).
    """
    _check_divergence(student, teacher, direction, temperature, beta)
    rows: Tensor = _Divergence.apply(student, teacher.detach(), direction, temperature, beta, chunk)  # type: ignore[no-untyped-call]
    return rows.mean()


def _check_divergence(student: Tensor, teacher: Tensor, direction: str, temperature: float, beta: float) -> None:
    if student.shape != teacher.shape or student.dim() != 2:
        shapes = f"{list(student.shape)} and {list(teacher.shape)}"
        raise UsageError(f"logits of {shapes} cannot be compared", remedy="Cut both to the shared ids", param="logits")
    if direction not in DIRECTIONS:
        raise UsageError(f"unknown direction {direction!r}", remedy="Use forward, reverse or js", param="direction")
    if temperature <= 0 or not 0 < beta < 1:
        raise UsageError(f"temperature {temperature} and beta {beta}: T > 0, 0 < beta < 1", param="temperature")


class _Divergence(torch.autograd.Function):
    """Per row T^2 sum_v g(a_v, b_v), with a and b the teacher's and student's log probabilities. With G = dg/db, the
    gradient in the student's logits is T (G - p_s sum G)."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, direction: str, temperature: float, beta: float, chunk: int
    ) -> Tensor:
        ctx.options = (direction, temperature, beta, chunk)
        norms = [_logsumexp(logits, temperature, chunk) for logits in (student, teacher)]
        value = torch.zeros_like(norms[0])
        slope = torch.zeros_like(norms[0])
        for part in _parts(student.shape[1], chunk):
            b, a = (
                logits[:, part] / temperature - norm for logits, norm in zip((student, teacher), norms, strict=True)
            )
            g, dg = _terms(a, b, direction, beta)
            value += g.sum(1, keepdim=True)
            slope += dg.sum(1, keepdim=True)
        ctx.save_for_backward(student, teacher, *norms, slope)
        return value[:, 0] * temperature**2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, s_norm, t_norm, slope = ctx.saved_tensors
        direction, temperature, beta, chunk = ctx.options
        out = torch.empty_like(student)
        for part in _parts(student.shape[1], chunk):
            b = student[:, part] / temperature - s_norm
            a = teacher[:, part] / temperature - t_norm
            dg = _terms(a, b, direction, beta)[1]
            out[:, part] = (dg - b.exp() * slope) * (grads[0][:, None] * temperature)
        return out, None, None, None, None, None


def _parts(size: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, size)) for start in range(0, size, chunk)]


def _logsumexp(logits: Tensor, temperature: float, chunk: int) -> Tensor:
    """[rows, 1] of logits / T, over chunks."""
    pieces = [
        torch.logsumexp(logits[:, part] / temperature, 1, keepdim=True) for part in _parts(logits.shape[1], chunk)
    ]
    return pieces[0] if len(pieces) == 1 else torch.logsumexp(torch.cat(pieces, 1), 1, keepdim=True)


def _terms(a: Tensor, b: Tensor, direction: str, beta: float) -> tuple[Tensor, Tensor]:
    """g and dg/db entry by entry; a probability of zero has no term."""
    p, q = a.exp(), b.exp()
    if direction == "forward":
        return _times(p, a - b), -p
    if direction == "reverse":
        g = _times(q, b - a)
        return g, g + q
    middle = torch.logaddexp(a + math.log(beta), b + math.log1p(-beta))
    ours = (1 - beta) * _times(q, b - middle)
    return beta * _times(p, a - middle) + ours, ours


def _times(p: Tensor, log_ratio: Tensor) -> Tensor:
    return torch.where(p > 0, p * log_ratio, torch.zeros_like(p))


class TopK(NamedTuple):
    """A teacher's likeliest tokens at one temperature and what is left of its mass, as log probabilities."""

    ids: Tensor  # int64 [rows, k]
    logprobs: Tensor  # float [rows, k]
    rest: Tensor  # float [rows]; -inf where k is the vocabulary


def top_k(logits: Tensor, k: int, *, temperature: float = 1.0) -> TopK:
    """The k likeliest of logits [rows, vocab] under softmax(logits / T), descending; the parts sum to 1."""
    if not 1 <= k <= logits.shape[1]:
        raise UsageError(f"k is {k}, the vocabulary has {logits.shape[1]}", param="top_k")
    logs = torch.log_softmax(logits / temperature, 1)
    found = torch.topk(logs, k, dim=1)
    rest = torch.logsumexp(logs.scatter(1, found.indices, -torch.inf), 1)
    return TopK(found.indices, found.values, rest)


def top_k_divergence(
    student: Tensor, teacher: TopK, *, direction: Direction = "forward", temperature: float = 1.0, beta: float = 0.5
) -> Tensor:
    """`divergence` over k + 1 events: each of the teacher's likeliest tokens, and "any other". A lower bound of the
    full divergence (the data-processing inequality), equal to it where k is the vocabulary.

    Args:
        student: logits [rows, vocab]; the teacher's temperature must be `temperature`.
    """
    if direction not in DIRECTIONS or temperature <= 0 or not 0 < beta < 1:
        raise UsageError(f"direction {direction!r}, temperature {temperature}, beta {beta}", param="direction")
    scaled = student / temperature
    norm = torch.logsumexp(scaled, 1, keepdim=True)
    ours = scaled.gather(1, teacher.ids) - norm
    theirs = teacher.logprobs.to(ours.dtype)
    if teacher.ids.shape[1] < student.shape[1]:
        rest = torch.logsumexp(scaled.scatter(1, teacher.ids, -torch.inf), 1, keepdim=True) - norm
        ours = torch.cat([ours, rest], 1)
        theirs = torch.cat([theirs, teacher.rest.to(ours.dtype)[:, None]], 1)
    theirs = theirs - torch.logsumexp(theirs, 1, keepdim=True)  # kept at 16 bits it does not sum to 1
    return _terms(theirs, ours, direction, beta)[0].sum(1).mean() * temperature**2


# ---- features -------------------------------------------------------------------------------------------------------


def hidden_loss(student: Tensor, teacher: Tensor, *, kind: str = "mse") -> Tensor:
    """Distance of hidden states [rows, width], the student's already projected to the teacher's width.

    `mse`: mean square over the teacher's mean square (FitNets, arXiv 1412.6550; the division makes layers equal);
    `cosine`: 1 - cosine, mean over rows.
    """
    if student.shape != teacher.shape:
        remedy = "Give a projection from the student's width to the teacher's"
        raise UsageError(f"hidden states {list(student.shape)} and {list(teacher.shape)} differ", remedy=remedy)
    if kind == "mse":
        return (student - teacher).square().mean() / teacher.square().mean().clamp_min(EPS)
    if kind == "cosine":
        return (1 - F.cosine_similarity(student, teacher, dim=1, eps=EPS)).mean()
    raise UsageError(f"unknown kind {kind!r}", remedy="Use mse or cosine", param="kind")


def match_heads(maps: Tensor, heads: int) -> Tensor:
    """Attention maps [B, h, L, L] as [B, heads, L, L], each the mean of h / heads neighbours.

    Raises UsageError unless `heads` divides h.
    """
    if maps.shape[1] % heads:
        raise UsageError(f"{maps.shape[1]} attention heads do not fall into {heads} groups", param="heads")
    batch, _, length, keys = maps.shape
    return maps.reshape(batch, heads, -1, length, keys).mean(2)


def attention_loss(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """KL(teacher || student) of attention maps [B, heads, L, L] (rows sum to 1), mean over heads and valid queries
    (bool [B, L]). Head counts that differ are brought to their greatest common divisor by averaging neighbours.
    Distilling maps: TinyBERT (arXiv 1909.10351), MiniLM (2002.10957)."""
    heads = math.gcd(student.shape[1], teacher.shape[1])
    s, t = match_heads(student, heads), match_heads(teacher, heads)
    rows = _times(t, t.clamp_min(EPS).log() - s.clamp_min(EPS).log()).sum(-1)
    return _over_valid(rows, valid)


def _over_valid(rows: Tensor, valid: Tensor) -> Tensor:
    """Mean of [B, heads, L] over heads and valid positions."""
    return (rows * valid[:, None, :]).sum() / (valid.sum() * rows.shape[1]).clamp_min(1)


# ---- relations ------------------------------------------------------------------------------------------------------


def distance_relation(student: Tensor, teacher: Tensor) -> Tensor:
    """RKD-D (Park et al., arXiv 1904.05068): Huber loss of all pairwise distances of rows [n, width], each side divided
    by its mean distance. Widths may differ; n >= 2."""
    return F.smooth_l1_loss(_distances(student), _distances(teacher))


def _distances(x: Tensor) -> Tensor:
    """[n (n - 1) / 2]: distances of all pairs, their mean 1."""
    first, second = torch.triu_indices(len(x), len(x), 1, device=x.device)
    squared = (x[first] - x[second]).square().sum(1)
    distance = (squared + EPS).sqrt()
    return distance / distance.mean().clamp_min(EPS)


def angle_relation(student: Tensor, teacher: Tensor) -> Tensor:
    """RKD-A: Huber loss of the cosine of the angle that rows i and k make at row j, over all triplets of [n, width].
    Needs n^3 values: take few rows."""
    return F.smooth_l1_loss(_angles(student), _angles(teacher))


def _angles(x: Tensor) -> Tensor:
    """[n, n, n]: at j, between the ways to i and to k; 0 where i or k is j."""
    gap = x[None, :, :] - x[:, None, :]  # [j, i, width]
    unit = gap / (gap.square().sum(-1, keepdim=True) + EPS).sqrt()
    return unit @ unit.transpose(1, 2)


def minilm_relation(student: Tensor, teacher: Tensor, valid: Tensor, *, heads: int) -> Tensor:
    """MiniLMv2 (arXiv 2012.15828): KL of softmax(X X^T / sqrt(d)) between tokens, X the queries, keys or values of all
    heads joined and cut anew into `heads` relation heads, so that neither heads nor widths need be equal. Causal, as
    the model is: each token relates to those before it.

    Args:
        student, teacher: [B, any heads, L, any width]; heads * width must be a multiple of `heads` on both sides.
        valid: bool [B, L], the queries that count.
    """
    s, t = _relation(student, heads), _relation(teacher, heads)
    rows = _times(t.exp(), t - s).sum(-1)
    return _over_valid(rows, valid)


def _relation(x: Tensor, heads: int) -> Tensor:
    """Log probabilities [B, heads, L, L]; what comes later has none (a large negative number)."""
    batch, _, length, _ = x.shape
    joined = x.transpose(1, 2).reshape(batch, length, -1)
    if joined.shape[2] % heads:
        raise UsageError(f"a width of {joined.shape[2]} does not fall into {heads} relation heads", param="heads")
    cut = joined.reshape(batch, length, heads, -1).transpose(1, 2)
    scores = cut @ cut.transpose(-1, -2) / math.sqrt(cut.shape[-1])
    later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
    return torch.log_softmax(scores.masked_fill(later, -1e9), -1)


def similarity_relation(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Cosines between all tokens of a sequence (hidden states less their mean), squared difference of the two models
    over the teacher's own squares: similarity-preserving distillation (Tung and Mori, arXiv 1907.09682) between the
    tokens of a text rather than the examples of a batch.

    Args:
        student, teacher: [B, L, any width]. valid: bool [B, L].
    """
    ours, theirs = _token_cosines(student, valid), _token_cosines(teacher, valid)
    return (ours - theirs).square().sum() / theirs.square().sum().clamp_min(EPS)


def _token_cosines(x: Tensor, valid: Tensor) -> Tensor:
    """[B, L, L], 0 at padding."""
    kept = valid[:, :, None].to(x.dtype)
    mean = (x * kept).sum((0, 1)) / kept.sum().clamp_min(1)
    unit = F.normalize(x - mean, dim=-1, eps=EPS) * kept
    return unit @ unit.transpose(1, 2)


def layer_relation(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Relations between layers: for each token the cosines between its hidden states [rows, width] after each pair of
    the listed layers, mean square difference of the two models. In the spirit of the flow between layers (Yim et al.,
    CVPR 2017), by cosines so that widths may differ. Both lists have the same length, at least 2."""
    if len(student) != len(teacher) or len(student) < 2:
        raise UsageError(f"{len(student)} and {len(teacher)} layers have no relations to compare", param="layers")
    return (_layer_cosines(student) - _layer_cosines(teacher)).square().mean()


def _layer_cosines(layers: list[Tensor]) -> Tensor:
    """[rows, layers, layers]."""
    unit = torch.stack([F.normalize(x, dim=1, eps=EPS) for x in layers], 1)
    return unit @ unit.transpose(1, 2)
