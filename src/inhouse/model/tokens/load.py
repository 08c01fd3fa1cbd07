"""The two doors to a tokenizer: a folder (or file) of any known form, and a GGUF file's metadata.

Knows which files win over which. Does not know what is inside them.
"""

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import tokenizers

from inhouse.core.errors import FormatError, NotFoundError
from inhouse.model.tokens import checks, compiled, files, gguf, hf, mapped, spm
from inhouse.model.tokens.hf import Configs
from inhouse.model.tokens.library import LibraryCodec, guarded
from inhouse.model.tokens.pieces import PieceRule
from inhouse.model.tokens.spm import PieceType
from inhouse.model.tokens.tokenizer import Pair, Specials, Tokenizer, bert_pair

VOCABULARIES: Final = (
    "tokenizer.json",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
)
"""Names looked for, first come first served; then any *.tiktoken, then any other *.model."""

_Built = tuple[LibraryCodec, PieceRule, Specials]


def load_tokenizer(folder: Path, cache: Path | None = None, key: str | None = None) -> Tokenizer:
    """The tokenizer of a model folder, or of one vocabulary file with the configuration files beside it.

    Args:
        folder: the folder or file.
        cache: where the compiled form is kept; None: nothing is read or written there.
        key: names the content, where the caller knows a digest; else the files are hashed.

    Raises:
        NotFoundError: no vocabulary file there.
        FormatError: a file is damaged or hostile; the message names it.
        UnsupportedError: a form that would give wrong ids if we guessed.
    """
    vocabulary = find_vocabulary(folder)
    found = mapped.build(vocabulary)  # its tables are not compiled: reading them takes as long
    if found is not None:
        return Tokenizer(*found)
    if cache is None:
        return assemble(build_folder(vocabulary))
    return _cached(cache, key or _folder_key(vocabulary), lambda: build_folder(vocabulary))


def from_gguf(metadata: Mapping[str, Any], cache: Path | None = None, key: str | None = None) -> Tokenizer:
    """The tokenizer inside a GGUF file.

    Args:
        metadata: the file's key-value table; arrays may be lists or numpy arrays, strings `str` or UTF-8 `bytes`.
        cache, key: as `load_tokenizer`.

    Raises:
        FormatError, UnsupportedError: as `load_tokenizer`.
    """
    if cache is None:
        return assemble(gguf.build(metadata))
    return _cached(cache, key or _metadata_key(metadata), lambda: gguf.build(metadata))


def open_compiled(cache: Path, key: str) -> Tokenizer | None:
    """The compiled tokenizer of a key, the model's files unseen; None where there is none (or a damaged one)."""
    path = compiled.cache_path(cache, key)
    try:
        return compiled.load(path)
    except (OSError, FormatError, ValueError, KeyError, TypeError):
        return None


def _cached(cache: Path, key: str, build: Callable[[], _Built]) -> Tokenizer:
    """From the cache where it is there, else built, and kept where the folder can be written."""
    found = open_compiled(cache, key)
    if found is not None:
        return found
    built = build()
    with suppress(OSError):
        compiled.save(compiled.cache_path(cache, key), *built)
    # The compiled form takes a tenth of the memory; the process that made it need not keep the other.
    return open_compiled(cache, key) or assemble(built)


def _folder_key(vocabulary: Path) -> str:
    """A digest of every file that the tokenizer depends on."""
    digest = hashlib.sha256()
    templates = sorted((vocabulary.parent / hf.EXTRA_TEMPLATES).glob("*.jinja"))
    for path in [
        vocabulary,
        vocabulary.with_name("merges.txt"),
        *map(vocabulary.with_name, hf.CONFIG_FILES),
        *templates,
    ]:
        if path.is_file():
            data = checks.read_bytes(path)
            digest.update(f"{path.name}\0{len(data)}\0".encode())
            digest.update(data)
    return digest.hexdigest()


def _metadata_key(metadata: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in sorted(metadata):
        if name.startswith("tokenizer.") or name == "general.name":
            value = metadata[name]
            digest.update(
                f"{name}\0{value.tolist() if hasattr(value, 'tolist') else value!r}\0".encode("utf-8", "replace")
            )
    return digest.hexdigest()


def assemble(built: _Built) -> Tokenizer:
    return Tokenizer(*built)


def find_vocabulary(folder: Path) -> Path:
    """The vocabulary file of a folder; a file is taken as it is."""
    if folder.is_file():
        return folder
    candidates = [folder / name for name in VOCABULARIES]
    if folder.is_dir():
        candidates += sorted(folder.glob("*.tiktoken")) + sorted(folder.glob("*.model"))
    for path in candidates:
        if path.is_file():
            return path
    raise NotFoundError(f"no tokenizer in {folder.name}", remedy=f"Looked for {', '.join(VOCABULARIES)}, *.tiktoken.")


def build_folder(vocabulary: Path) -> _Built:
    """The parts of the tokenizer of one vocabulary file and the configuration beside it."""
    configs = hf.read_configs(vocabulary.parent)
    data = checks.read_bytes(vocabulary)
    name = vocabulary.name
    if name.endswith(".tiktoken") or (name.endswith(".model") and _is_tiktoken(data)):
        return _tiktoken(data, name, configs)
    if name.endswith(".model"):
        return _sentencepiece(data, configs)
    if name == "vocab.json":
        return _vocab_and_merges(vocabulary, data, configs)
    if name == "vocab.txt":
        return _vocab_txt(data, configs)
    codec, rule = hf.from_tokenizer_json(data, configs)
    return codec, rule, hf.specials_of(codec, configs, hf.affixes_of(codec.library), hf.pair_of(codec.library))


def _vocab_and_merges(path: Path, data: bytes, configs: Configs) -> _Built:
    merges = path.with_name("merges.txt")
    if not merges.is_file():
        raise FormatError("vocab.json stands without merges.txt")
    cls = files.class_name(configs.tokenizer, configs.model)
    prefix_space = bool(configs.tokenizer.get("add_prefix_space", False))
    tokenizer = files.vocab_and_merges(data, checks.read_bytes(merges), cls, prefix_space)
    hf.add_declared(tokenizer, configs)
    _mark_special(tokenizer, hf.names_of(configs))
    codec = LibraryCodec(tokenizer)
    affixes: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    if cls in files.PAIR_CLASSES:
        first, last = codec.id_of("<s>"), codec.id_of("</s>")
        affixes = (() if first is None else (first,), () if last is None else (last,))
    pair = None
    if cls in files.PAIR_CLASSES and all(affixes):  # <s> first </s></s> second </s>
        pair = Pair(affixes[0], affixes[1] * 2, affixes[1], (0, 0, 0, 0, 0))
    return codec, PieceRule("byte_level"), hf.specials_of(codec, configs, affixes, pair)


def _vocab_txt(data: bytes, configs: Configs) -> _Built:
    lowercase = configs.tokenizer.get("do_lower_case")
    tokenizer = files.vocab_txt(data, lowercase if isinstance(lowercase, bool) else None)
    hf.add_declared(tokenizer, configs)
    codec = LibraryCodec(tokenizer)
    first, last = codec.id_of("[CLS]"), codec.id_of("[SEP]")
    affixes = (() if first is None else (first,), () if last is None else (last,))
    rule = PieceRule("wordpiece", strip_first=True, tidy=True)
    return codec, rule, hf.specials_of(codec, configs, affixes, bert_pair(*affixes))


def _tiktoken(data: bytes, name: str, configs: Configs) -> _Built:
    tokenizer, bos, ends = files.tiktoken(data, name)
    codec = LibraryCodec(tokenizer)
    found = hf.specials_of(codec, configs, ((), ()))
    bos_id = codec.id_of(bos) if bos else found.bos_id
    names = dict(found.names) | ({"bos_token": bos} if bos else {}) | ({"eos_token": ends[0]} if ends else {})
    end_ids = found.eos_ids or frozenset(i for text in ends if (i := codec.id_of(text)) is not None)
    prefix = (bos_id,) if bos and bos_id is not None else ()
    specials = Specials(bos_id, end_ids, prefix, found.suffix, names, found.templates)
    return codec, PieceRule("byte_level"), specials


def _sentencepiece(data: bytes, configs: Configs) -> _Built:
    model = spm.read_model(data)
    tokenizer = spm.build(model)
    hf.add_declared(tokenizer, configs)
    codec = LibraryCodec(tokenizer)
    ids = {"bos_token": model.bos_id, "eos_token": model.eos_id, "unk_token": model.unk_id, "pad_token": model.pad_id}
    named = {name: model.pieces[i].text for name, i in ids.items() if i >= 0}
    merged = hf.Configs(
        named | dict(configs.tokenizer),
        configs.special_map,
        configs.added,
        configs.generation,
        configs.model,
        configs.templates,
    )
    control = {i for i in ids.values() if i >= 0 and model.pieces[i].kind == PieceType.CONTROL}
    # SentencePiece's own files do not say: BPE models begin with BOS (Llama), Unigram models end with EOS (T5).
    prefix = (model.bos_id,) if model.model == "bpe" and model.bos_id in control else ()
    suffix = (model.eos_id,) if model.model == "unigram" and model.eos_id in control else ()
    return codec, spm.rule_of(model), hf.specials_of(codec, merged, (prefix, suffix))


def _mark_special(tokenizer: tokenizers.Tokenizer, names: Mapping[str, str | list[str]]) -> None:
    """Tokens named as BOS, EOS ... are special even where no file adds them."""
    texts = [text for value in names.values() for text in ([value] if isinstance(value, str) else value)]
    known = [text for text in dict.fromkeys(texts) if tokenizer.token_to_id(text) is not None]
    with guarded("the special tokens were refused"):
        tokenizer.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in known])


def _is_tiktoken(data: bytes) -> bool:
    """Llama 3 calls its tiktoken file tokenizer.model: base64, a space, a number. ModelProto begins with 0x0A."""
    first = data[:200].split(b"\n", 1)[0].split()
    return len(first) == 2 and first[1].isdigit() and not data.startswith(b"\n")
