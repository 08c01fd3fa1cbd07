"""Codes in 32-bit words: any bits, any count, against Python integers and the compressed-tensors package."""

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from inhouse.store.quantized.words import unpack_sparse_words, unpack_words, word_count
from tests.quantized.packers import stream

pytestmark = pytest.mark.torch


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 8), st.data())
def test_every_stream_is_taken_apart_again(bits: int, data: st.DataObject) -> None:
    codes = data.draw(st.lists(st.integers(0, (1 << bits) - 1), min_size=1, max_size=100))
    words = stream(codes, bits).view(np.uint32)
    assert len(words) == word_count(len(codes), bits)
    assert unpack_words(words[:, None], bits, len(codes))[:, 0].tolist() == codes


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 31, 32, 33, 172])
def test_compressed_tensors_packs_the_same_stream(bits: int, count: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (5, count))
    signed = torch.from_numpy((codes - (1 << (bits - 1))).astype(np.int8))
    words = pack_to_int32(signed, bits).numpy().view(np.uint32)
    assert np.array_equal(unpack_words(words.T, bits, count).T, codes)
    down = pack_to_int32(signed.T.contiguous(), bits, packed_dim=0).numpy().view(np.uint32)
    assert np.array_equal(unpack_words(down, bits, count), codes.T)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_words_with_unused_bits(bits: int) -> None:
    """What compressed-tensors wrote before mid-2026: floor(32 / bits) codes a word."""
    per, codes = 32 // bits, np.random.default_rng(1).integers(0, 1 << bits, 53)
    words = [
        sum(int(c) << (bits * j) for j, c in enumerate(codes[i : i + per])) for i in range(0, len(codes), per)
    ]  # fmt: skip
    found = unpack_sparse_words(np.array(words, np.uint32)[:, None], bits, len(codes))
    assert np.array_equal(found[:, 0], codes)
