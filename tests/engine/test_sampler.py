"""The sampler: the reference against brute force and known vectors, the native one against the reference."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from inhouse.core.errors import UsageError
from inhouse.runtime.sampling import (
    NO_TOKEN,
    NOT_A_NUMBER,
    OK,
    ROW,
    ReferenceSampler,
    Sampler,
    filtered,
    mask_of,
    philox,
    uniform,
)
from inhouse.runtime.sampling_native import NativeSampler

Rows = npt.NDArray[np.void]
NOTHING: dict[str, Any] = {
    "position": 10, "mask_row": -1, "temperature": 1.0, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0,
}  # fmt: skip


def make_rows(count: int, **fields: Any) -> Rows:
    """Rows with every filter off but for the fields given, each a value or an array of them."""
    rows = np.zeros(count, ROW)
    for name, value in (NOTHING | fields).items():
        rows[name] = value
    return rows


def sample(
    sampler: Sampler,
    logits: Any,
    rows: Rows,
    bias: dict[int, float] | None = None,
    history: Any = (),
    masks: Any = None,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    logits = np.atleast_2d(np.asarray(logits, np.float32))
    bias = bias or {}
    if masks is None:
        masks = np.zeros((0, -(-logits.shape[1] // 32)), np.uint32)
    ids, values = np.array([*bias], np.int32), np.array([*bias.values()], np.float32)
    return sampler.sample(logits, rows, ids, values, np.array(history, np.int32), masks)


def one(row: Any, **fields: Any) -> npt.NDArray[np.float64]:
    return filtered(np.asarray(row, np.float32), make_rows(1, **fields)[0])


@pytest.fixture(
    params=[pytest.param("reference", marks=pytest.mark.null), pytest.param("native", marks=pytest.mark.native)]
)
def sampler(request: pytest.FixtureRequest) -> Sampler:
    return ReferenceSampler() if request.param == "reference" else NativeSampler()


@pytest.mark.null
def test_philox_gives_the_published_vectors() -> None:
    """Known answers of the Random123 distribution, philox4x32-10; the fourth counter word is 0 in our use."""
    assert philox(0, 0, 0) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)


@pytest.mark.native
def test_native_uniform_is_the_references() -> None:
    rng = np.random.default_rng(0)
    native = NativeSampler()
    for seed, position, choice in rng.integers(0, 2**31, (200, 3)).tolist():
        assert native.uniform(seed << 20, position, choice) == uniform(seed << 20, position, choice)
    assert native.uniform(2**64 - 1, 2**40, 127) == uniform(2**64 - 1, 2**40, 127)


@pytest.mark.null
def test_filters_against_enumeration_by_hand() -> None:
    x = np.log([0.4, 0.3, 0.2, 0.1])
    np.testing.assert_allclose(one(x), [0.4, 0.3, 0.2, 0.1], rtol=1e-6)
    np.testing.assert_allclose(one(x, top_k=2), [4 / 7, 3 / 7, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(one(x, top_p=0.69), [4 / 7, 3 / 7, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(one(x, top_p=0.71), [4 / 9, 3 / 9, 2 / 9, 0], rtol=1e-6)
    np.testing.assert_allclose(one(x, top_p=1e-9), [1, 0, 0, 0])
    np.testing.assert_allclose(one(x, min_p=0.45), [4 / 9, 3 / 9, 2 / 9, 0], rtol=1e-6)
    np.testing.assert_allclose(one(x, top_k=3, top_p=0.77), [4 / 7, 3 / 7, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(one(x, temperature=0.5), np.square([4, 3, 2, 1]) / 30, rtol=1e-6)
    # Entropy 1.2799: |-log p - H| is .364, .076, .330, 1.023, so 0.3 comes first, then 0.2, then 0.4.
    np.testing.assert_allclose(one(x, typical_p=0.2), [0, 1, 0, 0])
    np.testing.assert_allclose(one(x, typical_p=0.5), [0, 0.6, 0.4, 0], rtol=1e-6)
    np.testing.assert_allclose(one(x, typical_p=0.6), [4 / 9, 3 / 9, 2 / 9, 0], rtol=1e-6)


@pytest.mark.null
@pytest.mark.parametrize("fields", [{"top_p": 0.5}, {"top_k": 2}, {"typical_p": 0.5}, {"min_p": 1.0, "top_k": 2}])
def test_ties_go_to_the_lower_id(fields: dict[str, Any]) -> None:
    np.testing.assert_array_equal(one([1, 1, 1, 1], **fields), [0.5, 0.5, 0, 0])


def test_draws_follow_the_distribution(sampler: Sampler) -> None:
    x = np.random.default_rng(1).standard_normal(40) * 1.5
    for fields in ({}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1}, {"typical_p": 0.7}, {"temperature": 0.6}):
        count = 2000
        drawn, _ = sample(sampler, x, make_rows(count, seed=12345, position=np.arange(count), **fields))
        p = one(x, **fields)
        kept = p > 0
        counts = np.bincount(drawn, minlength=40)
        assert not counts[~kept].any(), fields
        assert stats.chisquare(counts[kept], p[kept] * count).pvalue > 1e-3, fields


def test_draws_depend_on_seed_position_and_choice_alone(sampler: Sampler) -> None:
    x = np.zeros((3, 1000))
    base, _ = sample(sampler, x, make_rows(1, seed=5, choice=2))
    crowd = make_rows(50, seed=np.arange(50), logit_row=np.arange(50) % 3, position=np.arange(50))
    crowd[33] = make_rows(1, seed=5, choice=2, logit_row=1)[0]
    assert sample(sampler, x, crowd)[0][33] == base[0]
    others = [{"seed": 6, "choice": 2}, {"seed": 5, "choice": 3}, {"seed": 5, "choice": 2, "position": 11}]
    assert all(sample(sampler, x, make_rows(1, **other))[0] != base for other in others)


def test_greedy_takes_the_first_of_the_largest(sampler: Sampler) -> None:
    x = np.zeros(700)
    x[[300, 650]] = 2
    assert sample(sampler, x, make_rows(1, temperature=0.0))[0] == 300
    assert sample(sampler, x, make_rows(1, temperature=0.0, bias_end=1), {650: 0.5})[0] == 650
    assert sample(sampler, x, make_rows(1, temperature=0.0), {650: 0.5})[0] == 300, "a row without a bias range"


def test_penalties_by_hand(sampler: Sampler) -> None:
    x = [2.0, -1.0, 1.9, 0.5]
    greedy = {"temperature": 0.0, "history_end": 3, "history_prompt_end": 1}
    history = [0, 2, 2]  # 0 in the prompt, 2 twice in the output
    assert sample(sampler, x, make_rows(1, **greedy), history=history)[0] == 0
    assert sample(sampler, x, make_rows(1, **greedy, repetition_penalty=1.5), history=history)[0] == 0
    assert sample(sampler, x, make_rows(1, **greedy, repetition_penalty=5.0), history=history)[0] == 3
    assert sample(sampler, x, make_rows(1, **greedy, presence_penalty=-0.2), history=history)[0] == 2
    assert sample(sampler, x, make_rows(1, **greedy, frequency_penalty=-0.06), history=history)[0] == 2
    assert sample(sampler, x, make_rows(1, **greedy, frequency_penalty=-0.04), history=history)[0] == 0
    negative = [-1.0, -1.5, -9.0]
    assert sample(sampler, negative, make_rows(1, **greedy, repetition_penalty=2.0), history=[0, 0, 0])[0] == 1


def test_mask_and_status(sampler: Sampler) -> None:
    x = np.zeros((2, 70))
    x[0, 3] = 5
    x[1, 4] = np.nan
    masks = np.stack([mask_of([2, 69], 70), mask_of([], 70)])
    rows = make_rows(4, temperature=0.0, logit_row=[0, 0, 0, 1], mask_row=[-1, 0, 1, -1])
    tokens, status = sample(sampler, x, rows, masks=masks)
    assert tokens.tolist() == [3, 2, -1, -1]
    assert status.tolist() == [OK, OK, NO_TOKEN, NOT_A_NUMBER]


def random_rows(rng: np.random.Generator, count: int, vocab: int, length: int) -> tuple[Rows, Any, Any]:
    """Rows with every parameter at play, their history and masks."""

    def maybe(values: Any, off: Any) -> Any:
        return np.where(rng.random(count) < 0.5, values, off)

    middle = rng.integers(0, length, count)
    rows = make_rows(
        count, seed=rng.integers(0, 2**62, count), position=rng.integers(0, 2**40, count),
        choice=rng.integers(0, 8, count), logit_row=rng.integers(0, 4, count),
        temperature=rng.choice([0.0, 0.3, 1.0, 2.0], count), top_k=maybe(rng.integers(1, vocab + 1, count), 0),
        top_p=maybe(rng.uniform(0.05, 1, count), 1), min_p=maybe(rng.uniform(0, 0.3, count), 0),
        typical_p=maybe(rng.uniform(0.1, 1, count), 1), mask_row=maybe(0, -1), bias_end=maybe(3, 0),
        history_begin=0, history_prompt_end=middle, history_end=length,
        repetition_penalty=maybe(1.3, 1), presence_penalty=maybe(0.4, 0), frequency_penalty=maybe(0.2, 0),
    )  # fmt: skip
    return rows, rng.integers(0, vocab, length), mask_of(rng.permutation(vocab)[: vocab // 2], vocab)[None]


@pytest.mark.native
@pytest.mark.parametrize("vocab", [1, 5, 17, 256, 257, 512, 3000])
@pytest.mark.parametrize("isa", ["scalar", ""])
def test_native_equals_the_reference(vocab: int, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INHOUSE_ISA", isa)
    rng = np.random.default_rng(vocab)
    logits = (rng.standard_normal((4, vocab)) * 3).astype(np.float32)
    logits[2] = np.round(logits[2])  # many ties
    rows, history, masks = random_rows(rng, 300, vocab, 40)
    if vocab < 3:
        rows["mask_row"] = -1
    bias = {int(i): float(v) for i, v in zip(rng.permutation(vocab)[:3], (1.0, -2.0, -np.inf), strict=False)}
    rows["bias_end"] = np.minimum(rows["bias_end"], len(bias)) if vocab > 3 else 0
    ours = sample(NativeSampler(), logits, rows, bias, history, masks)
    theirs = sample(ReferenceSampler(), logits, rows, bias, history, masks)
    np.testing.assert_array_equal(ours[1], theirs[1])
    np.testing.assert_array_equal(ours[0], theirs[0])


@pytest.mark.native
@pytest.mark.parametrize("p", [0.2, 0.5, 0.9, 0.99])
def test_the_histogram_of_a_flat_row_finds_the_same_nucleus(p: float) -> None:
    x = np.random.default_rng(3).standard_normal(20_000).astype(np.float32)
    kept = one(x, top_p=p) > 0
    assert kept.sum() > 256, "wide enough to leave the first look"
    count = 200
    rows = make_rows(count, seed=7, position=np.arange(count), top_p=p)
    ours, theirs = (sample(s, x, rows)[0] for s in (NativeSampler(), ReferenceSampler()))
    assert kept[ours].all()
    assert (ours == theirs).mean() > 0.98, "a draw may fall on a rounding of the sum"


def test_logprobs_are_those_of_the_raw_softmax(sampler: Sampler) -> None:
    rng = np.random.default_rng(2)
    logits = (rng.standard_normal((3, 1500)) * 4).astype(np.float32)
    logits[1, 7] = np.nan
    logits[2, 3:] = -np.inf
    targets = np.array([11, 5, 5, 2], np.int32)
    values, ranks, ids, top, status = sampler.logprobs(logits, np.array([0, 0, 1, 2], np.int32), targets, 5)
    exact = logits[0].astype(np.float64)
    exact -= exact.max() + np.log(np.exp(exact - exact.max()).sum())
    assert status.tolist() == [OK, OK, NOT_A_NUMBER, OK]
    np.testing.assert_allclose(values[:2], exact[[11, 5]], atol=2e-6)
    assert ranks[:2].tolist() == [1 + int((exact > exact[t]).sum()) for t in (11, 5)]
    np.testing.assert_array_equal(ids[0], np.argsort(-exact)[:5])
    np.testing.assert_allclose(top[0], np.sort(exact)[::-1][:5], atol=2e-6)
    assert set(ids[3][:3].tolist()) == {0, 1, 2}
    assert ids[3][3:].tolist() == [-1, -1]


@pytest.mark.native
@pytest.mark.parametrize(
    ("field", "value"),
    [("logit_row", 1), ("logit_row", -1), ("mask_row", 0), ("bias_end", 9), ("history_end", 9), ("bias_begin", -1)],
)
def test_native_refuses_rows_beyond_their_arrays(field: str, value: int) -> None:
    with pytest.raises(UsageError, match="beyond"):
        sample(NativeSampler(), np.zeros(8), make_rows(1, **{field: value}))
    with pytest.raises(UsageError, match="beyond the vocabulary"):
        sample(NativeSampler(), np.zeros(8), make_rows(1, bias_end=1), {8: 1.0})
