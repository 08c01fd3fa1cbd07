"""What a model is calibrated on, and what calibration finds out about the inputs of its linears.

Knows texts, token rows and streamed sums; does not know layers or methods. Rows are documents (one a row, padded on the
right; padding counts nowhere) or windows cut from the joined documents. Everything is a function of texts, tokenizer
and seed, and is hashed, so that a manifest says what a model has seen and `eval` can refuse to score it.
"""

import glob
import gzip
import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from inhouse.compress.seen import document_hash, text_record
from inhouse.compress.stats import LinearStats as LinearStats
from inhouse.compress.values import Count, NotNegative, Range, Seed
from inhouse.core.errors import NotFoundError, UsageError
from inhouse.model.tokens.tokenizer import Tokenizer

SEPARATOR = "<|endoftext|>"  # between documents of one file
SCRIPT_SAMPLE = 20_000  # characters of each text that the scripts are counted in
MIN_TOKENS = 256  # fewer are named as too few to trust


@dataclass(frozen=True, slots=True)
class Text:
    """One document, where it came from, and its share of the mix."""

    source: str
    text: str
    group: str = ""

    @property
    def sha256(self) -> str:
        """Of the text without the white space around it: how `eval` recognises it."""
        return document_hash(self.text)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Token rows ready to be run.

    tokens: int64 [n, length]; lengths: int64 [n], tokens of each row that count (the rest is padding).
    texts: one record for each document used (`seen.text_record`). hash: sha256 of the token rows.
    """

    tokens: Tensor
    lengths: Tensor
    hash: str
    texts: tuple[Mapping[str, Any], ...]
    scripts: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Tokens that count."""
        return int(self.lengths.sum())

    def rows(self, first: int, last: int) -> "Calibration":
        """Some of the rows."""
        part = slice(first, last)
        return Calibration(self.tokens[part], self.lengths[part], self.hash, self.texts, self.scripts, self.notes)

    def manifest(self) -> dict[str, Any]:
        """What the manifest of a compressed model records."""
        return {
            "tokens": self.count, "rows": int(self.tokens.shape[0]), "length": int(self.tokens.shape[1]),
            "sha256": self.hash, "texts": [dict(text) for text in self.texts], "scripts": dict(self.scripts),
            "notes": list(self.notes),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """What is taken of the texts.

    samples: rows at most. length: tokens of a row, BOS included. mode: `documents` or `windows`. mix: group -> share of
    the rows (a group is the name a recipe gives to some files). seed: of the choice. shuffle_tokens: the tokens of each
    row in random order, for tests of what calibration is worth.
    """

    samples: Count = 128
    length: Annotated[int, Range(2)] = 256
    mode: str = "windows"
    seed: Seed = 0
    mix: Mapping[str, NotNegative] = field(default_factory=dict)
    shuffle_tokens: bool = False


def read_texts(
    files: Sequence[str | Path], group: str = "", *, what: str = "calibration file", key: str = "calibration.texts"
) -> list[Text]:
    """The documents of text files (.gz too), .jsonl files (a `text` in each line) and globs, in order.

    what: the files are called in errors. key: of the recipe.

    Raises NotFoundError (a file or glob that matches nothing), UsageError (not UTF-8, empty; it is named).
    """
    found: list[Text] = []
    for pattern in files:
        paths = sorted(glob.glob(str(pattern))) if any(c in str(pattern) for c in "*?[") else [str(pattern)]
        if not paths:
            raise NotFoundError(f"no {what} matches {pattern}", remedy="Check the path", param=key)
        for path in paths:
            texts = _documents(Path(path).expanduser(), what, key)
            if not texts:
                raise UsageError(f"the {what} {path} is empty", remedy="Give a file with text in it", param=key)
            found += [Text(str(path), text, group) for text in texts]
    return found


def _documents(path: Path, what: str, key: str) -> list[str]:
    try:
        data = path.read_bytes()
        raw = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
    except FileNotFoundError:
        raise NotFoundError(f"there is no {what} {path}", remedy="Check the path", param=key) from None
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise UsageError(
            f"cannot read the {what} {path} as UTF-8 text: {error}", remedy="Give plain text", param=key
        ) from None
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        try:
            parts = [str(json.loads(line)["text"]) for line in raw.splitlines() if line.strip()]
        except (ValueError, KeyError, TypeError):
            raise UsageError(
                f"the {what} {path} is no JSON Lines file whose lines have a `text`",
                remedy='Write {"text": "..."} in each line', param=key,
            ) from None  # fmt: skip
    else:
        parts = raw.split(SEPARATOR)
    return [part.strip() for part in parts if part.strip()]


def calibrate(
    texts: Sequence[Text], tokenizer: Tokenizer, options: CalibrationOptions, context: int = 1 << 30
) -> Calibration:
    """Token rows of texts. Raises UsageError if there is nothing in them, or an option makes no sense."""
    length = min(options.length, context)
    if options.mode not in ("documents", "windows"):
        raise UsageError(f"unknown mode {options.mode!r}", remedy="Use documents or windows", param="mode")
    if options.samples < 1 or length < 2:
        raise UsageError(
            f"{options.samples} samples of {length} tokens are nothing to calibrate on",
            remedy="Give samples of 1 or more and a length of 2 or more", param="calibration.samples",
        )  # fmt: skip
    groups: dict[str, list[Text]] = {}
    for text in texts:
        groups.setdefault(text.group, []).append(text)
    rng = np.random.default_rng(options.seed)
    rows: list[list[int]] = []
    used: dict[str, Text] = {}
    for group, count in _shares(groups, options).items():
        for row, sources in _rows(groups[group], tokenizer, options.mode, length, count, rng):
            rows.append(row)
            used |= {text.sha256: text for text in sources}
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise UsageError("the calibration texts have no tokens", remedy="Give files with text", param="calibration")
    if options.shuffle_tokens:
        rows = [[row[0], *(row[1:][i] for i in rng.permutation(len(row) - 1))] for row in rows]
    made = _made(rows, list(used.values()), options.samples)
    if options.length > context:
        said = f"calibration.length {options.length} is beyond the model's context: rows have {context} tokens at most"
        made = replace(made, notes=(*made.notes, said))
    return made


def rows_of(rows: Sequence[Sequence[int]], note: str) -> Calibration:
    """A calibration of token rows that were made elsewhere; `note` says where. Raises UsageError for none."""
    if not rows:
        raise UsageError("there are no calibration tokens", param="calibration")
    made = _made(rows, [], len(rows))
    return Calibration(made.tokens, made.lengths, made.hash, (), {}, (*made.notes, note))


def _shares(groups: Mapping[str, Sequence[Text]], options: CalibrationOptions) -> dict[str, int]:
    """Rows of each group."""
    unknown = sorted(set(options.mix) - set(groups))
    if unknown:
        raise UsageError(f"the mix names {unknown[0]!r}, and no texts are called so", param="mix")
    if any(not 0 <= share < float("inf") for share in options.mix.values()):
        raise UsageError("a share of the mix is negative or not finite", param="mix")
    sizes = {name: options.mix.get(name, 0.0 if options.mix else sum(len(t.text) for t in texts))
             for name, texts in groups.items()}  # fmt: skip
    total = sum(sizes.values()) or 1.0
    return {name: max(1, round(options.samples * size / total)) for name, size in sizes.items() if size > 0}


def _rows(
    texts: Sequence[Text], tokenizer: Tokenizer, mode: str, length: int, count: int, rng: np.random.Generator
) -> Iterable[tuple[list[int], list[Text]]]:
    """At most `count` rows and the documents that each is made of. Only what is needed is tokenised."""
    order = rng.permutation(len(texts))
    begin = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    pending: list[int] = []
    sources: list[Text] = []
    made = 0
    for at in order:
        if made >= count:
            return
        text = texts[int(at)]
        ids = tokenizer.encode(text.text, add_special=False, parse_special=False)
        if mode == "documents":
            made += 1
            yield (begin + ids)[:length], [text]
            continue
        pending += begin + ids
        sources.append(text)
        while len(pending) >= length and made < count:
            made += 1
            yield pending[:length], list(sources)
            pending, sources = begin + pending[length:], [text]
    if mode == "windows" and made < count and len(pending) > len(begin):
        yield pending, sources


def _made(rows: Sequence[Sequence[int]], texts: Sequence[Text], samples: int) -> Calibration:
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    tokens = torch.zeros((len(rows), int(lengths.max())), dtype=torch.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    digest = hashlib.sha256(np.ascontiguousarray(lengths.numpy()).tobytes() + tokens.numpy().tobytes()).hexdigest()
    records = tuple(text_record(text.source, text.text) for text in texts)
    shares = scripts([text.text for text in texts])
    return Calibration(
        tokens, lengths, digest, records, shares, tuple(_notes(int(lengths.sum()), rows, samples, shares))
    )


def _notes(count: int, rows: Sequence[Sequence[int]], samples: int, shares: Mapping[str, float]) -> Iterable[str]:
    if count < MIN_TOKENS:
        yield f"the calibration has only {count} tokens; statistics of so few mean little"
    if len(rows) < samples:
        yield f"the texts gave {len(rows)} rows of the {samples} asked for"
    main, share = max(shares.items(), key=lambda item: item[1], default=("", 0.0))
    if main and main != "latin" and share > 0.8:
        yield f"{share:.0%} of the calibration is {main} script alone; other languages may lose"


def scripts(texts: Iterable[str]) -> dict[str, float]:
    """Share of each script among the letters of a sample, roughly, largest first (`latin`, `cjk`, `cyrillic`, ...)."""
    counts: Counter[str] = Counter()
    left = 10 * SCRIPT_SAMPLE
    for text in texts:
        sample = text[: min(SCRIPT_SAMPLE, left)]
        left -= len(sample)
        for character in sample:
            if character.isalpha():
                first = unicodedata.name(character, "OTHER").split(" ")[0].lower()
                counts["cjk" if first in ("hiragana", "katakana", "hangul") else first] += 1
        if left <= 0:
            break
    total = sum(counts.values()) or 1
    return {name: round(count / total, 4) for name, count in counts.most_common(8)}
