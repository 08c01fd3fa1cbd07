"""Encoder-decoders against transformers: f32 logits of every family, batched as alone, chunked as whole."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inhouse.core.errors import FormatError, UnsupportedError
from inhouse.load.model import open_model
from inhouse.model.families.table import resolve
from tests.runtime_torch.seq2seq import BART, CASES, T5, logits_of, save_tiny, step_over
from tests.runtime_torch.tiny import worst

pytestmark = pytest.mark.torch
SOURCES = [[(7 * i) % 90 + 3 for i in range(37)], [5, 44, 17, 3, 80, 9, 3]]
TARGETS = [[(11 * i) % 90 + 3 for i in range(20)], [60, 4, 71]]
TABLE = np.array([[3, 1, 5], [2, 0, 7]], np.int32)


def load(folder: Path, executor: str = "torch") -> Any:
    from tokenizers import Tokenizer, models  # a tokenizer that the loader can read; no test here uses it
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(97)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "w3"))).save_pretrained(folder)
    return open_model(str(folder), executor=executor, kv_dtype="f32", cache=False)


@pytest.mark.parametrize("kind", ["torch", "native"])
@pytest.mark.parametrize("name", sorted(CASES))
def test_logits(name: str, kind: str, tmp_path: Path) -> None:
    pair = save_tiny(name, tmp_path)
    model = load(tmp_path, kind)
    executor = model.executor
    executor.allocate({group.name: 16 for group in model.programs.groups})
    targets = [[model.spec.start_token, *tokens] for tokens in TARGETS]
    lengths = [len(ids) for ids in SOURCES]
    executor.run("encode", step_over([(ids, 0) for ids in SOURCES], {"encoder": TABLE, "cross": TABLE}))
    tables = {"full": TABLE, "cross": TABLE}
    both = executor.run("step", step_over([(ids, 0) for ids in targets], tables, lengths))["logits"].copy()
    expected = [logits_of(pair, source, target) for source, target in zip(SOURCES, targets, strict=True)]
    assert worst(both[:21], expected[0]) < 1e-4
    assert worst(both[21:], expected[1]) < 1e-4
    one = {"full": TABLE[:1], "cross": TABLE[:1]}
    first = executor.run("step", step_over([(targets[0][:9], 0)], one, lengths[:1]))["logits"].copy()
    rest = executor.run("step", step_over([(targets[0][9:], 9)], one, lengths[:1]))["logits"].copy()
    assert worst(np.concatenate([first, rest]), both[:21]) <= (1e-5 if kind == "torch" else 0.0)
    model.close()


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
