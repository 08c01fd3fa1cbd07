"""Encoder-decoders against transformers: f32 logits of every family, batched as alone, chunked as whole."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from inhouse.core.errors import FormatError, UnsupportedError
from inhouse.model.families.table import resolve
from inhouse.runtime.executor import Executor
from tests.families.parity import EXECUTORS, TOLERANCE, open_tiny, record, worst
from tests.families.seq2seq import BART, CASES, T5, Pair, logits_of, save_tiny, step_over

pytestmark = pytest.mark.torch
SOURCES = [[(7 * i) % 90 + 3 for i in range(37)], [5, 44, 17, 3, 80, 9, 3]]
TARGETS = [[(11 * i) % 90 + 3 for i in range(20)], [60, 4, 71]]
TABLE = np.array([[3, 1, 5], [2, 0, 7]], np.int32)


@pytest.mark.parametrize("name", sorted(CASES))
def test_logits(name: str, tmp_path: Path) -> None:
    pair = save_tiny(name, tmp_path)
    tiny = open_tiny(tmp_path)
    start = getattr(tiny.spec, "start_token")  # noqa: B009 - only this kind of spec has one
    targets = [[start, *tokens] for tokens in TARGETS]
    expected = [logits_of(pair, source, target) for source, target in zip(SOURCES, targets, strict=True)]
    for kind in EXECUTORS:
        executor = tiny.executor(kind)
        encode(executor, SOURCES)
        lengths = [len(ids) for ids in SOURCES]
        both = decode(executor, [(ids, 0) for ids in targets], lengths)
        error = max(worst(both[:21], expected[0]), worst(both[21:], expected[1]))
        assert error < TOLERANCE, kind
        parts = [decode(executor, [(part, first)], lengths[:1]) for part, first in cut(targets[0], 9)]
        assert worst(np.concatenate(parts), both[:21]) <= (1e-5 if kind == "torch" else 0.0)
        assert greedy(executor, start, lengths[0]) == greedy_of(pair, SOURCES[0], start)
        executor.close()
        record(tiny.family, name.removeprefix(tiny.family).strip("-"), tiny.format, kind, error)


def encode(executor: Executor, sources: list[list[int]]) -> None:
    executor.run("encode", step_over([(ids, 0) for ids in sources], {"encoder": TABLE, "cross": TABLE}))


def decode(executor: Executor, chunks: list[tuple[list[int], int]], read: list[int]) -> NDArray[np.float32]:
    tables = {"full": TABLE[: len(chunks)], "cross": TABLE[: len(chunks)]}
    return np.array(executor.run("step", step_over(chunks, tables, read))["logits"])


def cut(tokens: list[int], at: int) -> list[tuple[list[int], int]]:
    return [(tokens[:at], 0), (tokens[at:], at)]


def greedy(executor: Executor, start: int, read: int) -> list[int]:
    """Eight tokens, one after another, from the cache."""
    tokens = [start]
    for position in range(8):
        tokens.append(int(decode(executor, [(tokens[-1:], position)], [read])[0].argmax()))
    return tokens[1:]


def greedy_of(pair: Pair, source: list[int], start: int) -> list[int]:
    tokens = [start]
    for _ in range(8):
        tokens.append(int(logits_of(pair, source, tokens)[-1].argmax()))
    return tokens[1:]


def test_configs_that_cannot_be_honoured() -> None:
    marian = {"architectures": ["MarianMTModel"], "decoder_vocab_size": 50, "pad_token_id": 96} | BART
    with pytest.raises(UnsupportedError, match="decoder_vocab_size"):
        resolve(marian)
    t5 = {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True} | T5
    with pytest.raises(UnsupportedError, match="feed_forward_proj"):
        resolve(t5 | {"feed_forward_proj": "gated-snake"})
    with pytest.raises(UnsupportedError, match="strange_key"):
        resolve(t5 | {"strange_key": 1})
    with pytest.raises(FormatError, match="buckets"):
        resolve(t5 | {"relative_attention_num_buckets": 3})
    with pytest.raises(UnsupportedError, match="encoder_attention_heads"):
        resolve({"architectures": ["BartForConditionalGeneration"]} | BART | {"encoder_attention_heads": 7})


def test_the_head_of_version_one_is_scaled_and_later_ones_are_not() -> None:
    t5 = {"architectures": ["T5ForConditionalGeneration"]} | T5
    scaled, _ = resolve(t5)
    plain, _ = resolve(t5 | {"tie_word_embeddings": False})
    assert (scaled.head_scale, scaled.tied) == (48**-0.5, True)  # type: ignore[union-attr]
    assert (plain.head_scale, plain.tied) == (1.0, False)  # type: ignore[union-attr]
