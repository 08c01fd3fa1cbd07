"""Source and target language as token ids: where each family of translation models puts its language codes.

Knows families' conventions; knows neither engines nor requests. Codes are written as the model's vocabulary has them
(NLLB `eng_Latn`, M2M100 `en`, mBART `en_XX`); T5, which reads a task in words, takes English names or two letters.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from inhouse.core.errors import UnsupportedError, UsageError
from inhouse.model.tokens.tokenizer import Tokenizer

_NLLB = re.compile(r"([a-z]{3}_[A-Z][a-z]{3})")
_M2M = re.compile(r"__([a-z]{2,3})__")
_MBART = re.compile(r"([a-z]{2}_[A-Z]{2})")
_MARIAN = re.compile(r">>([^<>]+)<<")
_ONLY_MBART50 = "ka_GE"  # a language that the first mBART lacks

# Languages of T5's training tasks (arXiv 1910.10683, section 2.4) and those that mT5 users write: code -> name.
_NAMES: Mapping[str, str] = {"en": "English", "de": "German", "fr": "French", "ro": "Romanian"}


@dataclass(frozen=True, slots=True)
class Translation:
    """What a translation comes to: the encoder's input, and how the decoder's output begins.

    `first_token`: what the output begins with; `start_token`: what takes the place of the decoder's own start."""

    encoder: list[int]
    first_token: int | None = None
    start_token: int | None = None


def language_codes(family: str, tokenizer: Tokenizer) -> dict[str, int]:
    """The languages that a vocabulary has tokens for: code -> id. Empty where the family has none."""
    patterns = {"m2m_100": (_NLLB, _M2M), "mbart": (_MBART,), "marian": (_MARIAN,)}.get(family, ())
    found: dict[str, int] = {}
    # Marian keeps its codes among the plain tokens, the others among those that were added.
    ids = range(tokenizer.vocab_size) if family == "marian" else tokenizer.codec.added
    for token_id in ids:
        token = tokenizer.token_of(token_id) or ""
        for pattern in patterns:
            if match := pattern.fullmatch(token):
                found.setdefault(match[1], token_id)
    return dict(sorted(found.items()))


def translate(
    family: str, tokenizer: Tokenizer, codes: Mapping[str, int], text: str, source: str | None, target: str | None
) -> Translation:
    """The input for translating `text`.

    Args:
        family: of the model's spec.
        codes: `language_codes` of the tokenizer.
        source, target: languages; None: the tokenizer's own default, or what the model was made for.

    Raises:
        UsageError: no such language, or one that must be given is not. UnsupportedError: the model has one pair.
    """
    if family in ("t5", "mt5", "umt5"):
        return Translation(tokenizer.encode(_task(source, target) + text))
    if not codes:
        if source or target:
            raise UnsupportedError(
                "this model has no language codes: it translates one pair", remedy="Leave the languages out",
                param="target_language" if target else "source_language",
            )  # fmt: skip
        return Translation(tokenizer.encode(text))
    goal = None if target is None else _code(codes, target, "target_language")
    if family == "marian":
        return _marian(tokenizer, text, source, goal)
    plain, end = tokenizer.encode(text, add_special=False), tokenizer.id_of("</s>")
    ends = [end] if end is not None else sorted(tokenizer.eos_ids)[:1]
    if family == "mbart" and _ONLY_MBART50 not in codes:  # the text, its end, its language; the decoder begins with it
        spoken = [_code(codes, source, "source_language")] if source else []
        return Translation([*plain, *ends, *spoken] if source else tokenizer.encode(text), start_token=goal)
    if source is None:
        return Translation(tokenizer.encode(text), first_token=goal)
    return Translation([_code(codes, source, "source_language"), *plain, *ends], first_token=goal)


def _marian(tokenizer: Tokenizer, text: str, source: str | None, goal: int | None) -> Translation:
    """The target's code stands before the text; the source is whatever the model hears."""
    if source is not None:
        raise UnsupportedError("this model finds out the source language itself", param="source_language")
    ids = tokenizer.encode(text)
    return Translation(ids if goal is None else [goal, *ids])


def _code(codes: Mapping[str, int], name: str, field: str) -> int:
    if name in codes:
        return codes[name]
    near = [code for code in codes if code.lower().startswith(name.lower()[:2])] or list(codes)
    raise UsageError(
        f"{field} is {name[:40]!r}, which the model does not have",
        remedy=f"It has {len(codes)} languages, among them {', '.join(near[:8])}", param=field,
    )  # fmt: skip


def _task(source: str | None, target: str | None) -> str:
    """T5's way to say what is to be done; nothing where no language is named."""
    if source is None and target is None:
        return ""
    for field, value in (("source_language", source), ("target_language", target)):
        if not value:
            raise UsageError(f"T5 is told both languages in words, {field} is missing", param=field)
        if not re.fullmatch(r"[^\W\d_]+(?: [^\W\d_]+)*", value) or len(value) > 40:
            raise UsageError(f"{field} is {value[:40]!r}, which is no language's name", param=field)
    names = [_NAMES.get(str(value).lower(), str(value)) for value in (source, target)]
    return f"translate {names[0]} to {names[1]}: "
