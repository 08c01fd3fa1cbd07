"""Makes a byte-level BPE with a stated set of single characters. Knows no corpus of its own and no chat format.

Characters outside ASCII come first in the merge table, each built from its UTF-8 bytes alone, so that a listed
character is always one token and an unlisted one falls back to bytes; then merges learned from ASCII text. The two
sets of merges share no byte, so their order does not matter.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer, Split
from tokenizers.pre_tokenizers import Sequence as PreSequence
from tokenizers.trainers import BpeTrainer

from inhouse.core.errors import UsageError

# Qwen2's word pattern (the pre-tokenizer that GGUF calls "qwen2"): letters with one leading mark, single digits,
# runs of marks, white space.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_alphabet() -> dict[int, str]:
    """byte -> the printable character that stands for it in byte-level BPE (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in printable}
    rest = [byte for byte in range(256) if byte not in table]
    return table | {byte: chr(256 + i) for i, byte in enumerate(rest)}


def pre_tokenizer() -> PreTokenizer:
    """Splits by WORDS, then writes bytes as printable characters."""
    return PreSequence([Split(Regex(WORDS), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])


def character_merges(characters: Iterable[str]) -> list[tuple[str, str]]:
    """Merges that build each character from its UTF-8 bytes, left to right, shared prefixes once."""
    table = byte_alphabet()
    merges: dict[tuple[str, str], None] = {}
    for character in characters:
        symbols = [table[byte] for byte in character.encode()]
        for i in range(1, len(symbols)):
            merges[("".join(symbols[:i]), symbols[i])] = None
    return sorted(merges, key=lambda pair: len(pair[0]))


def _learned_merges(texts: Iterable[str], count: int) -> list[tuple[str, str]]:
    """`count` merges learned from ASCII words; fewer if the text has no more."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizer()
    trainer = BpeTrainer(
        vocab_size=256 + count, initial_alphabet=list(byte_alphabet().values()), show_progress=False, min_frequency=2
    )
    tokenizer.train_from_iterator((_ascii(text) for text in texts), trainer)
    state: dict[str, Any] = json.loads(tokenizer.to_str())
    return [(left, right) for left, right in state["model"]["merges"]]


def _ascii(text: str) -> str:
    return "".join(c if c.isascii() else " " for c in text)


def train_tokenizer(texts: Iterable[str], characters: Sequence[str], size: int, specials: Sequence[str]) -> Tokenizer:
    """A tokenizer of exactly `size` entries: 256 bytes, the characters and their byte prefixes, learned ASCII merges,
    then `specials`. The same texts give the same tokenizer. Raises UsageError if `size` is too small for the
    characters, or too large for the merges that the text can give."""
    table = byte_alphabet()
    merges = character_merges(characters)
    room = size - 256 - len(merges) - len(specials)
    if room < 0:
        raise UsageError(f"{len(merges)} character merges do not fit a vocabulary of {size}", param="size")
    merges += _learned_merges(texts, room)
    vocab = {symbol: i for i, symbol in enumerate(table[byte] for byte in range(256))}
    for left, right in merges:
        vocab[left + right] = len(vocab)
    if len(vocab) + len(specials) != size:
        raise UsageError(f"the text gives {len(vocab)} entries of {size - len(specials)}", param="size")
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizer()
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(list(specials))
    return tokenizer
