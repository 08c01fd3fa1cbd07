"""Incremental text equals text decoded at once, however the stream is cut; stop strings are found and never shown."""

from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from inhouse.core.errors import UsageError
from inhouse.model.tokens.detokenize import Detokenizer, StopStrings
from inhouse.model.tokens.pieces import BYTE_TO_CHAR, PieceRule, byte_level
from inhouse.model.tokens.tokenizer import Specials, Tokenizer

pytestmark = pytest.mark.null

LAMA = "🦙".encode()


class ListCodec:
    """A codec over a list of token strings: all that decoding needs."""

    def __init__(self, tokens: list[str], special: set[int]) -> None:
        self._tokens = tokens
        self.size = len(tokens)
        self.added = dict.fromkeys(special, True)

    def encode(self, text: str, parse_special: bool) -> list[int]:
        raise AssertionError("decoding encodes nothing")

    def token_of(self, token_id: int) -> str | None:
        return self._tokens[token_id] if 0 <= token_id < self.size else None

    def id_of(self, token: str) -> int | None:
        return self._tokens.index(token) if token in self._tokens else None


def byte_fallback() -> Tokenizer:
    """SentencePiece: 256 byte tokens, words with and without a leading space, two special tokens."""
    tokens = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", "▁Hello", "▁▁", "é", "s", "<s>", "</s>"]
    rule = PieceRule("sentencepiece", strip_first=True, byte_tokens=True)
    return Tokenizer(ListCodec(tokens, {261, 262}), rule, Specials(bos_id=261, eos_ids=frozenset({262})))


def byte_tokens() -> Tokenizer:
    """Byte-level BPE whose tokens cut characters in the middle."""
    tokens = [BYTE_TO_CHAR[byte] for byte in range(256)]
    tokens += [byte_level(part) for part in (LAMA[:2], LAMA[2:], b" the", LAMA[3:] + b" a" + LAMA[:1])]
    return Tokenizer(ListCodec([*tokens, "<|end|>"], {260}), PieceRule("byte_level"), Specials())


def wordpiece() -> Tokenizer:
    tokens = ["hello", "##s", ".", "n't", "é", "[SEP]"]
    return Tokenizer(ListCodec(tokens, {5}), PieceRule("wordpiece", strip_first=True, tidy=True), Specials())


TOKENIZERS = {"byte_fallback": byte_fallback(), "byte_level": byte_tokens(), "wordpiece": wordpiece()}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_pieces_joined_equal_decoding_at_once(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = st.lists(st.integers(0, tokenizer.vocab_size + 1), max_size=24)
    stream, skip = data.draw(ids), data.draw(st.booleans())
    cuts = data.draw(st.lists(st.integers(1, 5), min_size=len(stream)))
    detokenizer, text, at = Detokenizer(tokenizer, skip), "", 0
    for size in cuts:
        piece = detokenizer.push(stream[at : at + size])
        text += piece
        at += size
        # What was shown is a prefix of the final text at every moment.
        assert tokenizer.decode(stream, skip).startswith(text)
    assert text + detokenizer.flush() == tokenizer.decode(stream, skip)


@settings(max_examples=200, deadline=None)
@given(
    prompt=st.lists(st.sampled_from([256, 257, 258, 260, 261, 0x41]), max_size=4),
    stream=st.lists(st.sampled_from([256, 257, 258, 259, 260, 262, 0xC3, 0xA9]), max_size=8),
)
@example(prompt=[261], stream=[257])
@example(prompt=[257], stream=[257])
def test_with_a_prompt_the_stream_is_what_the_whole_text_gains(prompt: list[int], stream: list[int]) -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    detokenizer = Detokenizer(tokenizer, prompt=prompt)
    shown = "".join(detokenizer.push([i]) for i in stream) + detokenizer.flush()
    assert tokenizer.decode(prompt) + shown == tokenizer.decode(prompt + stream)


def test_a_character_is_shown_when_it_is_whole() -> None:
    detokenizer = Detokenizer(TOKENIZERS["byte_level"])
    assert [detokenizer.push([i]) for i in (256, 257, 258)] == ["", "🦙", " the"]
    assert detokenizer.push([256]) == ""
    assert detokenizer.flush() == "\ufffd"


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["qwen2", "phi-3-mini", "t5-small", "minimind", "bert-cased", "cl100k_base"])
def test_real_vocabularies_token_by_token(
    name: str, load_named: Callable[[str], Tokenizer], reference: dict[str, list[str]]
) -> None:
    tokenizer = load_named(name)
    for text in reference["texts"]:
        ids = tokenizer.encode(text)
        for step in (1, 3):
            detokenizer = Detokenizer(tokenizer)
            pieces = [detokenizer.push(ids[at : at + step]) for at in range(0, len(ids), step)]
            assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids)
            assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in tokenizer.decode(ids)


def by_definition(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The slow reference: read character by character until the text ends with a stop string."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            which = max(found, key=len)
            return text[: end - len(which)], which
    return text, None


@settings(max_examples=500, deadline=None)
@given(
    text=st.text("ab#\n", max_size=24),
    stops=st.lists(st.text("ab#\n", min_size=1, max_size=5), max_size=4),
    cuts=st.lists(st.integers(1, 6), min_size=24, max_size=24),
)
@example(text="aaab", stops=["aab"], cuts=[1] * 24)
@example(text="abcd", stops=["abcd", "bc"], cuts=[2] * 24)
def test_stop_strings_in_any_stream(text: str, stops: list[str], cuts: list[int]) -> None:
    wanted, which = by_definition(text, stops)
    finder, shown, at, stopped, found = StopStrings(stops), "", 0, False, None
    for size in cuts:
        emitted, stopped, found = finder.push(text[at : at + size])
        shown += emitted
        at += size
        assert wanted.startswith(shown)
        if stopped:
            break
    if not stopped:
        shown += finder.flush()
    assert (shown, found) == (wanted, which)
    if stopped:
        assert finder.push("more") == ("", True, which)
        assert finder.flush() == ""


def test_only_a_possible_beginning_is_held_back() -> None:
    finder = StopStrings(["</answer>"])
    assert finder.push("a < b </ans") == ("a < b ", False, None)
    assert finder.push("we") == ("", False, None)
    assert finder.push("!") == ("</answe!", False, None)
    assert finder.push("x</answer> y") == ("x", True, "</answer>")


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        StopStrings(["a", ""])
    assert StopStrings([]).push("anything") == ("anything", False, None)
