"""What a checkpoint says of itself: its spec, family, tokenizer, sampling defaults and licence.

Knows which file says what (config.json, generation_config.json, GGUF keys); does not read weights.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inhouse.core.errors import FormatError, UnsupportedError, UsageError
from inhouse.core.tensors import TensorSource
from inhouse.load.generation import CONFIG_BYTES, from_folder, from_metadata
from inhouse.load.sentence import Sentence, apply, joined, read_sentence
from inhouse.model.build import Spec, build
from inhouse.model.families.family import Family
from inhouse.model.families.table import resolve
from inhouse.model.rewrite import low_rank
from inhouse.model.rewrite_cores import TrainShape, tensor_trains, tucker_stacks
from inhouse.model.tokens.load import from_gguf, load_tokenizer
from inhouse.model.tokens.tokenizer import Tokenizer
from inhouse.runtime.guard import guarded
from inhouse.runtime.program import ProgramSet
from inhouse.store.mapping import MappedSource
from inhouse.store.mapping import Mapping as FileMapping
from inhouse.store.quantized.open import CONFIG_KEYS, open_quantized, quant_config
from inhouse.store.quantized.source import QuantizedSource
from inhouse.store.source import materialise, open_source, read_json
from inhouse.store.stored_model import FORMAT
from inhouse.store.stored_source import StoredSource

CARD_BYTES = 1 << 20
ROPE_FACTORS = "rope_freqs.weight"
LONGROPE = ("rope_factors_short.weight", "rope_factors_long.weight")
GGUF_TOKENS = "tokenizer.ggml.tokens"


@dataclass(frozen=True, slots=True)
class Described:
    """A checkpoint with its header read; `source` is open."""

    path: Path
    source: TensorSource
    config: Mapping[str, Any]  # config.json, or the key-value table of a GGUF file
    spec: Spec
    family: Family
    generation: Mapping[str, Any]
    sentence: Sentence | None = None  # what a sentence-transformers folder says

    def guard(self) -> AbstractContextManager[None]:
        """Held while tensors are read: a file that is cut short then is a FormatError."""
        ranges = [span for mapping in self._mappings() for span in mapping.address_ranges()]
        return guarded(ranges, self.path.name)

    def check_unchanged(self) -> None:
        """Raises FormatError if a file of the weights is no longer the one that was opened."""
        for mapping in self._mappings():
            mapping.check_unchanged()

    def programs(self) -> ProgramSet:
        """The plain Programs, with the side branches that the checkpoint brings."""
        plain = build(self.spec)
        if not isinstance(self.source, StoredSource):
            return plain
        try:
            branched = low_rank(plain, self.source.ranks, self.source.alone)
            trains = {name: TrainShape(train.tables, train.widths) for name, train in self.source.trains.items()}
            return tucker_stacks(tensor_trains(branched, trains), self.source.stacks)
        except UnsupportedError:
            raise
        except UsageError as error:
            raise FormatError(error.message, param=error.param) from None

    def _mappings(self) -> Sequence[FileMapping]:
        return self.source.mappings if isinstance(self.source, MappedSource | QuantizedSource | StoredSource) else ()

    @property
    def architecture(self) -> str:
        """The name under which the checkpoint's format knows the family."""
        if self.source.format == "gguf":
            return str(self.config["general.architecture"])
        return str(self.config["architectures"][0])


def describe(path: Path, context: int | None = None) -> Described:
    """Opens a checkpoint and reads what it is.

    Args:
        path: a model folder or a weight file (configuration is then looked for beside it).
        context: a lower limit of positions than the model's own.

    Raises:
        NotFoundError, FormatError, UnsupportedError: as the readers and families do. UsageError: `context` is not
            between 1 and what the model was made for.
    """
    source: TensorSource = open_source(path)
    folder = path if path.is_dir() else path.parent
    sentence = None
    try:
        if source.format == "gguf":
            config: Mapping[str, Any] = source.metadata
            factors, short, long = (
                materialise(source, name).tolist() if name in source else () for name in (ROPE_FACTORS, *LONGROPE)
            )
            spec, family = resolve(config, set(source), factors, (short, long))
            generation = from_metadata(config)
        else:
            config = read_json(folder / "config.json", CONFIG_BYTES)
            said = quant_config(config, folder, source)
            if isinstance(source, StoredSource):
                _check_said(said)
            elif said is not None:
                source = open_quantized(source, said)
            config = {key: value for key, value in config.items() if key not in CONFIG_KEYS}
            spec, family = resolve(config, source.hints if isinstance(source, StoredSource) else set(source))
            generation = from_folder(folder, config)
            sentence = read_sentence(folder) if path.is_dir() else None
            if sentence is not None:
                spec = apply(sentence, spec)
                source = joined(sentence, source, folder)
    except BaseException:
        source.close()
        raise
    return Described(path, source, config, limit_context(spec, context), family, generation, sentence)


def _check_said(said: Mapping[str, Any] | None) -> None:
    """Raises FormatError unless config.json says, too, that the checkpoint is of our own form."""
    if said is None or said.get("quant_method") != FORMAT:
        raise FormatError(
            f"the weights are of the form {FORMAT!r}, config.json says {str((said or {}).get('quant_method'))[:40]!r}",
            remedy="Take config.json and weights from one folder.",
        )


def limit_context(spec: Spec, context: int | None) -> Spec:
    """The spec with another limit of positions. Raises UsageError beyond the model's own."""
    if context is None:
        return spec
    if not 1 <= context <= spec.context_length:
        raise UsageError(
            f"a context of {context} was asked for, the model has {spec.context_length}",
            remedy=f"Ask for 1 to {spec.context_length}.",
            param="context",
        )
    return replace(spec, context_length=context)


def read_tokenizer(described: Described, cache: Path | None = None, key: str | None = None) -> Tokenizer:
    """The model's tokenizer, checked against its embedding.

    The rule: every id that the tokenizer can give has a row. More rows than ids are padding and allowed.
    `cache` and `key`: the folder of compiled tokenizers, and what names this one there.
    Raises NotFoundError, FormatError, UnsupportedError.
    """
    inside = described.source.format == "gguf" and GGUF_TOKENS in described.config
    folder = described.path if described.path.is_dir() else described.path.parent
    tokenizer = from_gguf(described.config, cache, key) if inside else load_tokenizer(folder, cache, key)
    if tokenizer.vocab_size > described.spec.vocab_size:
        raise FormatError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the embedding has "
            f"{described.spec.vocab_size} rows",
            remedy="Tokenizer and weights are not of one model; fetch both again.",
            param="vocab_size",
        )
    return tokenizer


def licence(described: Described) -> str:
    """The licence as the checkpoint names it: GGUF key, model card, or the head of a LICENSE file; "" if none."""
    found = described.config.get("general.license")
    if isinstance(found, str):
        return found[:80]
    folder = described.path if described.path.is_dir() else None
    if folder is None:
        return ""
    card = _head(folder / "README.md")
    named = re.search(r"\A---\s*\n(?:.*\n)*?license(?:_name)?:[ \t]*['\"]?([\w.+-]+)", card)
    if named:
        return named[1][:80]
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE"):
        lines = [line.strip(" #*\t") for line in _head(folder / name).splitlines()]
        first = next((line for line in lines if line), "")
        if first:
            return first[:80]
    return ""


def _head(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(CARD_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""
