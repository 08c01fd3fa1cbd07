"""The byte-level BPE: listed characters are one token, everything round-trips, the size is as asked."""

import pytest
from tokenizers import Tokenizer

from inhouse.core.errors import UsageError
from inhouse.train.tokenizer import byte_alphabet, train_tokenizer

pytestmark = pytest.mark.null

TEXTS = ["the server listens on the port", "the model answers the question", "listen to the model"] * 3
SPECIALS = ("<|end|>", "<|pad|>")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, "模型服务。", 300, SPECIALS)


def test_the_byte_table_is_gpt2s() -> None:
    table = byte_alphabet()
    assert len(set(table.values())) == 256
    assert (table[ord(" ")], table[ord("\n")], table[ord("A")], table[0]) == ("Ġ", "Ċ", "A", "Ā")


def test_size_and_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == 300
    assert [tokenizer.token_to_id(s) for s in SPECIALS] == [298, 299]


def test_listed_characters_are_one_token_and_others_bytes(tokenizer: Tokenizer) -> None:
    assert [len(tokenizer.encode(c).ids) for c in "模型服务。"] == [1] * 5
    assert 2 <= len(tokenizer.encode("猫").ids) <= 3


@pytest.mark.parametrize("text", ["the model", "模型 the 猫!\n\n  x", "naïve 🙂 \t", "服务，型模"])
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_equal_input_gives_an_equal_tokenizer(tokenizer: Tokenizer) -> None:
    assert train_tokenizer(TEXTS, "模型服务。", 300, SPECIALS).to_str() == tokenizer.to_str()


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="do not fit"):
        train_tokenizer(TEXTS, "模型服务。", 260, SPECIALS)
    with pytest.raises(UsageError, match="the text gives"):
        train_tokenizer(TEXTS, "模", 5000, SPECIALS)
