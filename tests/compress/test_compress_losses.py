"""Losses: gradients checked in f64, divergences >= 0 and 0 for a clone, T^2, top-k with its tail, torch's own KL."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from inhouse.compress import losses
from inhouse.compress.losses import DIRECTIONS, Direction
from inhouse.core.errors import UsageError

pytestmark = pytest.mark.torch
gradcheck = torch.autograd.gradcheck


def logits(seed: int, rows: int = 5, vocab: int = 11, scale: float = 2.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def tensor(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_has_the_right_gradient(direction: Direction, temperature: float) -> None:
    teacher = logits(1)
    for chunk in (4, 100):
        assert gradcheck(
            lambda s, c=chunk: losses.divergence(
                s, teacher, direction=direction, temperature=temperature, beta=0.3, chunk=c
            ),
            [logits(0).requires_grad_()],
        )


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_divergence_is_positive_and_zero_for_a_clone(direction: Direction) -> None:
    for seed in range(20):
        s, t = logits(seed), logits(seed + 100)
        assert float(losses.divergence(s, t, direction=direction)) > 0
        shifted = s + 3.0  # softmax does not see it
        assert float(losses.divergence(shifted, s, direction=direction)) == pytest.approx(0, abs=1e-14)


def test_divergence_equals_torchs_and_the_definition() -> None:
    s, t = logits(3), logits(4)
    a, b = F.log_softmax(t, 1), F.log_softmax(s, 1)
    forward = F.kl_div(b, a, log_target=True, reduction="batchmean")
    reverse = F.kl_div(a, b, log_target=True, reduction="batchmean")
    assert torch.allclose(losses.divergence(s, t, chunk=3), forward)
    assert torch.allclose(losses.divergence(s, t, direction="reverse", chunk=3), reverse)
    beta = 0.3
    m = (beta * a.exp() + (1 - beta) * b.exp()).log()
    js = beta * F.kl_div(m, a, log_target=True, reduction="batchmean")
    js += (1 - beta) * F.kl_div(m, b, log_target=True, reduction="batchmean")
    assert torch.allclose(losses.divergence(s, t, direction="js", beta=beta, chunk=3), js)


def test_temperature_squared_keeps_the_gradient() -> None:
    """As T grows T^2 KL tends to the mean square of centred logits / 2 (Hinton et al.), which does not depend on T."""
    s, t = logits(5).requires_grad_(), logits(6)
    grads = [torch.autograd.grad(losses.divergence(s, t, temperature=temp), s)[0] for temp in (1e3, 4e3)]
    assert torch.allclose(grads[0], grads[1], atol=5e-4)
    centred = (s - t) - (s - t).mean(1, keepdim=True)
    wanted = torch.autograd.grad(0.5 * centred.square().sum(1).mean() / s.shape[1], s)[0]
    assert torch.allclose(grads[1], wanted, atol=1e-3)
    plain = F.kl_div(F.log_softmax(s / 2, 1), F.log_softmax(t / 2, 1), log_target=True, reduction="batchmean")
    assert torch.allclose(losses.divergence(s, t, temperature=2.0), 4 * plain)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_sums_to_one_and_bounds_the_full_divergence(temperature: float) -> None:
    s, t = logits(7), logits(8)
    full = float(losses.divergence(s, t, temperature=temperature))
    previous = -1.0
    for k in range(1, 12):
        top = losses.top_k(t, k, temperature=temperature)
        assert torch.allclose(top.logprobs.exp().sum(1) + top.rest.exp(), torch.ones(5, dtype=torch.float64))
        value = float(losses.top_k_divergence(s, top, temperature=temperature))
        assert previous - 1e-12 <= value <= full + 1e-12
        previous = value
    assert previous == pytest.approx(full, rel=1e-12)  # k = the vocabulary
    assert float(losses.top_k_divergence(t, losses.top_k(t, 4))) == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("k", [3, 11])
def test_top_k_gradient(direction: Direction, k: int) -> None:
    top = losses.top_k(logits(9), k, temperature=1.5)
    assert gradcheck(
        lambda s: losses.top_k_divergence(s, top, direction=direction, temperature=1.5), [logits(10).requires_grad_()]
    )


def attention(seed: int, heads: int) -> Tensor:
    scores = tensor(seed, 2, heads, 4, 4).masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(1), -torch.inf)
    return torch.softmax(scores, -1)


VALID = torch.tensor([[True, True, True, True], [True, True, True, False]])


def test_gradients_of_feature_losses() -> None:
    t = tensor(1, 6, 5)
    for kind in ("mse", "cosine"):
        assert gradcheck(lambda s, k=kind: losses.hidden_loss(s, t, kind=k), [tensor(2, 6, 5).requires_grad_()])
    projection = tensor(3, 5, 3)
    assert gradcheck(
        lambda s, p: losses.hidden_loss(s @ p.T, t),
        [tensor(4, 6, 3).requires_grad_(), projection.requires_grad_()],
    )
    scores = tensor(5, 2, 2, 4, 4).requires_grad_()
    assert gradcheck(
        lambda x: losses.attention_loss(torch.softmax(x, -1), torch.softmax(tensor(6, 2, 4, 4, 4), -1), VALID), [scores]
    )


def test_feature_losses_are_zero_for_a_clone() -> None:
    x = tensor(1, 6, 5)
    assert float(losses.hidden_loss(x, x)) == 0
    assert float(losses.hidden_loss(x, 3 * x, kind="cosine")) == pytest.approx(0, abs=1e-12)
    assert float(losses.hidden_loss(x, 3 * x)) > 0
    maps = attention(2, 4)
    assert float(losses.attention_loss(maps, maps, VALID)) == pytest.approx(0, abs=1e-12)
    assert float(losses.attention_loss(maps, attention(3, 4), VALID)) > 0


def test_head_counts_may_differ_and_padding_does_not_count() -> None:
    teacher = attention(1, 4)
    doubled = teacher.repeat_interleave(2, dim=1)  # every head twice: its neighbours' mean is the teacher
    assert float(losses.attention_loss(doubled, teacher, VALID)) == pytest.approx(0, abs=1e-12)
    student = attention(2, 6)  # greatest common divisor 2
    before = losses.attention_loss(student, teacher, VALID)
    changed = student.clone()
    changed[1, :, 3] = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)  # a padded query
    assert torch.equal(before, losses.attention_loss(changed, teacher, VALID))
    changed[1, :, 2] = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    assert not torch.equal(before, losses.attention_loss(changed, teacher, VALID))
    with pytest.raises(UsageError, match="groups"):
        losses.match_heads(student, 4)


def test_gradients_of_relations() -> None:
    t = tensor(1, 6, 5)
    for relation in (losses.distance_relation, losses.angle_relation):
        assert gradcheck(lambda s, f=relation: f(s, t), [tensor(2, 6, 3).requires_grad_()])
    assert gradcheck(
        lambda s: losses.minilm_relation(s, tensor(3, 2, 4, 4, 3), VALID, heads=2),
        [tensor(4, 2, 2, 4, 5).requires_grad_()],
    )
    layers = [tensor(5, 6, 3).requires_grad_(), tensor(6, 6, 3).requires_grad_()]
    assert gradcheck(lambda a, b: losses.layer_relation([a, b], [t, tensor(7, 6, 5)]), layers)


def test_relations_see_relations_only() -> None:
    """RKD is blind to rotation, shift and scale; its angles and distances are those of plain loops."""
    x, other = tensor(1, 6, 5), tensor(2, 6, 5)
    turn = torch.linalg.qr(tensor(3, 5, 5)).Q
    moved = 7.0 * (x @ turn) + 3.0
    for relation in (losses.distance_relation, losses.angle_relation):
        assert float(relation(moved, x)) == pytest.approx(0, abs=1e-10)
        assert float(relation(other, x)) > 1e-4
    angles = losses._angles(x)
    for i, j, k in itertools.permutations(range(4), 3):
        a, b = x[i] - x[j], x[k] - x[j]
        wanted = float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))
        assert float(angles[j, i, k]) == pytest.approx(wanted, abs=1e-9)
    assert float(losses._distances(x).mean()) == pytest.approx(1.0)


def test_similarity_is_blind_to_rotation_and_padding() -> None:
    x = tensor(1, 2, 4, 5)
    turn = torch.linalg.qr(tensor(2, 5, 5)).Q
    assert float(losses.similarity_relation(x @ turn * 3 + 1, x, VALID)) == pytest.approx(0, abs=1e-20)
    other = tensor(3, 2, 4, 6)
    before = losses.similarity_relation(other, x, VALID)
    assert float(before) > 0.01
    other[1, 3] = 7.0  # padding
    assert torch.equal(before, losses.similarity_relation(other, x, VALID))
    assert gradcheck(lambda s: losses.similarity_relation(s, x, VALID), [tensor(4, 2, 4, 3).requires_grad_()])


def test_minilm_relations_do_not_need_equal_heads() -> None:
    t = tensor(1, 2, 4, 4, 3)  # 4 heads of 3
    joined = t.transpose(1, 2).reshape(2, 4, 12).reshape(2, 4, 2, 6).transpose(1, 2)  # the same as 2 heads of 6
    assert float(losses.minilm_relation(joined, t, VALID, heads=3)) == pytest.approx(0, abs=1e-12)
    assert float(losses.minilm_relation(tensor(2, 2, 2, 4, 6), t, VALID, heads=3)) > 0
    with pytest.raises(UsageError, match="relation heads"):
        losses.minilm_relation(joined, t, VALID, heads=5)


def test_bad_arguments_are_refused() -> None:
    s = logits(0)
    for change in ({"direction": "both"}, {"temperature": 0.0}, {"beta": 1.0}):
        with pytest.raises(UsageError):
            losses.divergence(s, s, **change)
    with pytest.raises(UsageError, match="shared ids"):
        losses.divergence(s, s[:, :-1])
    with pytest.raises(UsageError, match="vocabulary"):
        losses.top_k(s, 12)
    with pytest.raises(UsageError, match="projection"):
        losses.hidden_loss(s, s[:, :-1])
