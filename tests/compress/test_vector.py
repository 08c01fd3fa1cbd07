"""Vector codes: k-means never gets worse, neither does any step after it, and more codes never hurt."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from inhouse.compress.codebook import assign, decode, kmeans, search
from inhouse.compress.spectrum import output_error
from inhouse.compress.vector_codes import VectorOptions, fit, form_of, recode
from inhouse.core.errors import FormatError, UnsupportedError, UsageError
from inhouse.runtime.packed_stored import from_stored, to_stored
from inhouse.store.source import open_source
from inhouse.store.stored_model import write_stored
from inhouse.store.stored_source import StoredSource
from tests.compress.test_spectrum import correlated


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weighted", [False, True])
def test_lloyd_never_rises_and_is_a_fixed_point(weighted: bool) -> None:
    vectors = drawn(400, 4, seed=1)
    weights = drawn(400, 4, seed=2).square() if weighted else torch.ones(400, 4)
    book, codes, losses = kmeans(vectors, weights, 16, rounds=60)
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.75 * losses[0]
    brute = (weights[:, None] * (vectors[:, None] - book[None]).square()).sum(2)
    assert torch.equal(codes, brute.argmin(1)) or torch.allclose(
        brute.gather(1, codes[:, None])[:, 0], brute.min(1).values, atol=1e-4
    )


def test_planted_clusters_and_few_vectors_are_found_exactly() -> None:
    planted = 10 * drawn(8, 4, seed=3)
    vectors = planted.repeat(20, 1)
    book, codes, losses = kmeans(vectors, torch.ones_like(vectors), 8)
    assert losses[-1] < 1e-2
    assert torch.allclose(book[codes], vectors, atol=1e-3)
    few, _, losses = kmeans(vectors[:3], torch.ones(3, 4), 16)
    assert losses[-1] < 1e-2
    assert few.shape == (16, 4)
    zeros = kmeans(torch.zeros(5, 4), torch.ones(5, 4), 4)
    assert torch.isfinite(zeros[0]).all()
    with pytest.raises(UsageError):
        kmeans(torch.zeros(0, 4), torch.zeros(0, 4), 4)


def test_one_book_is_searched_exactly_and_wider_beams_do_not_hurt() -> None:
    target, books = drawn(200, 4, seed=4), drawn(3, 8, 4, seed=5)
    codes, distance = search(target, books[:1], beam=1)
    nearest, brute = assign(target, torch.ones_like(target), books[0])
    assert torch.equal(codes[:, 0], nearest)
    assert torch.allclose(distance, brute, atol=1e-4)
    every = torch.cartesian_prod(*[torch.arange(8)] * 3)
    exact = torch.cdist(target, decode(every, books)).square().min(1).values
    found = {beam: search(target, books, beam) for beam in (1, 4, 64)}
    for codes, distance in found.values():
        assert torch.allclose((target - decode(codes, books)).square().sum(1), distance, atol=1e-4)
    assert torch.allclose(found[64][1], exact, atol=1e-4)  # all partial sums of two books are kept
    assert found[1][1].sum() >= found[4][1].sum() >= exact.sum() - 1e-3


@pytest.mark.parametrize("inputs", [64, 44])
def test_no_step_raises_the_error_and_the_last_is_what_the_codes_mean(inputs: int) -> None:
    x = correlated(inputs, 1000, seed=6)
    gram = x.T @ x / len(x)
    weight = drawn(48, inputs, seed=7)
    options = VectorOptions(entries=32, damp=1e-6)
    found = fit([weight], [gram], options, importance=[1.0])
    begun = options.books  # losses of k-means, then of encoding: the first of what may only fall
    falling = found.losses[begun:-1]
    assert all(after <= before * (1 + 1e-4) for before, after in itertools.pairwise(falling)), falling
    assert found.losses[-1] <= found.losses[begun]
    assert torch.equal(found.books, found.books.round())
    assert 100 < found.books.abs().amax(1).sum(0).max() <= 127  # no two entries add up beyond int8
    (value,) = found.values()
    size = output_error(weight, torch.zeros_like(weight), gram)
    assert output_error(weight, value, gram) / size == pytest.approx(found.losses[-1], rel=1e-3)
    coded = found.coded[0]
    assert coded.codes.shape == (48, -(-inputs // 8), 2)
    assert int(coded.codes.max()) < 32


def test_more_books_and_more_entries_do_not_raise_the_error() -> None:
    x = correlated(64, 1000, seed=8)
    gram = x.T @ x / len(x)
    weight = drawn(96, 64, seed=9)

    def error(books: int, entries: int) -> float:
        found = fit([weight], [gram], VectorOptions(books=books, entries=entries, rounds=2), importance=[1.0])
        return found.losses[-1]

    by_books = [error(books, 32) for books in (1, 2, 3)]
    by_entries = [error(2, entries) for entries in (4, 16, 64)]
    assert by_books[0] > by_books[1] > by_books[2]
    assert by_entries[0] > by_entries[1] > by_entries[2]


def test_whitening_pays_and_error_is_fed_forward() -> None:
    """Codes made with the inputs' moments beat codes made without, where the moments count."""
    x = correlated(64, 1000, seed=10)
    gram = x.T @ x / len(x)
    weight = drawn(64, 64, seed=11)
    options = VectorOptions(entries=64, books=2, rounds=2)
    with_moments, without = (fit([weight], [m], options).values()[0] for m in (gram, None))
    assert output_error(weight, with_moments, gram) < 0.5 * output_error(weight, without, gram)


def test_shared_codebooks_serve_matrices_of_any_width_and_size() -> None:
    weights = [drawn(32, 64, seed=12), 100 * drawn(24, 40, seed=13), torch.zeros(8, 16)]
    found = fit(weights, [None] * 3, VectorOptions(entries=64, rounds=2))
    for weight, value in zip(weights, found.values(), strict=True):
        assert value.shape == weight.shape
        assert torch.isfinite(value).all()
        assert output_error(weight, value) <= 0.25 * float(weight.square().sum()) + 1e-30
    again = recode(weights[0], None, found.books, VectorOptions(entries=64))
    assert output_error(weights[0], again.value(found.books)) <= 0.25 * float(weights[0].square().sum())


def test_same_seed_same_codes_and_nonsense_is_refused() -> None:
    weight = drawn(32, 32, seed=14)
    one, two = (fit([weight], [None], VectorOptions(entries=16, rounds=1)) for _ in range(2))
    assert torch.equal(one.books, two.books)
    assert torch.equal(one.coded[0].codes, two.coded[0].codes)
    for bad in ({"dim": 3}, {"entries": 300}, {"books": 0}):
        with pytest.raises(UsageError):
            VectorOptions(**bad)
    with pytest.raises(UsageError, match="moment"):
        fit([weight], [torch.eye(4)], VectorOptions())
    with pytest.raises(UsageError):
        fit([], [], VectorOptions())


@pytest.mark.parametrize(("inputs", "books"), [(64, 2), (44, 3), (172, 1)])
def test_the_packed_form_means_what_the_codes_mean(inputs: int, books: int) -> None:
    weight = drawn(40, inputs, seed=15)
    found = fit([weight], [None], VectorOptions(entries=32, books=books, rounds=1))
    form = form_of(found.coded[0], found.books)
    assert form.shape == (40, inputs)
    assert torch.equal(torch.from_numpy(form.value()), found.values()[0])
    runs = -(-inputs // 8)
    assert form.nbytes == 40 * runs * books + 40 * 2 + books * 2048
    assert form.main is not None
    parts = to_stored(form.main)
    raw = {
        name: (part, np.ascontiguousarray(array).reshape(-1).view(np.uint8)) for name, (part, array) in parts.items()
    }
    again = from_stored(form.main.format, form.main.shape, raw)
    assert np.array_equal(again.data, form.main.data)
    with pytest.raises(UnsupportedError, match="no packed format"):
        form_of(found.coded[0], found.books.repeat(4, 1, 1))


def test_a_stored_model_keeps_shared_codebooks_once(tmp_path: Path) -> None:
    weights = {f"m{i}.weight": drawn(24, 40 + 8 * i, seed=20 + i) for i in range(3)}
    found = fit(list(weights.values()), [None] * 3, VectorOptions(entries=16, rounds=1))
    forms = {name: form_of(coded, found.books) for name, coded in zip(weights, found.coded, strict=True)}
    stored = write_stored(tmp_path / "m", {}, forms.items(), [], {}, {})
    assert stored.nbytes == sum(form.nbytes for form in forms.values()) - 2 * 2 * 2048
    source = open_source(tmp_path / "m")
    assert isinstance(source, StoredSource)
    for name, form in forms.items():
        assert form.main is not None
        assert np.array_equal(source.packed(name).data, form.main.data)
    source.close()
    table = json.loads((tmp_path / "m" / "inhouse.json").read_text())
    assert table["tensors"]["m1.weight"]["shared"] == "m0.weight.books"
    for lie in ("m0.weight.index", "nothing.books", 7):
        table["tensors"]["m1.weight"]["shared"] = lie
        (tmp_path / "m" / "inhouse.json").write_text(json.dumps(table))
        with pytest.raises(FormatError):
            open_source(tmp_path / "m")
