"""From a path to its tensors: picks the reader by what the file or folder holds, and lists a model's files.

Knows the names that model folders use; does not know any format beyond its first bytes. A folder with
safetensors and pickles is read from its safetensors; any other choice between several is refused.
"""

from fnmatch import fnmatchcase
from pathlib import Path

from inhouse.core.errors import FormatError, NotFoundError
from inhouse.core.tensors import TensorSource
from inhouse.store import gguf, pickle, safetensors
from inhouse.store.gguf import gguf_metadata as gguf_metadata
from inhouse.store.mapping import Mapping
from inhouse.store.stored_source import is_stored, open_stored
from inhouse.store.strict_json import read_json as read_json
from inhouse.store.strict_json import read_json_list as read_json_list
from inhouse.store.values import check_finite as check_finite
from inhouse.store.values import materialise as materialise

# Files beside the weights that are part of a model, in the order of the listing.
_SIDE_NAMES = (
    "config.json",
    "inhouse.json",
    "generation_config.json",
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)
_SIDE_PATTERNS = (
    "*_Dense/*.json",
    "*_Dense/model.safetensors",
    "*_Dense/pytorch_model.bin",
    "*_Pooling/config.json",
    "*.tiktoken",
    "*.model",
    "*.spm",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "README.md",
)
_HEAD_BYTES = 16


def open_source(path: Path) -> TensorSource:
    """The tensors of a model folder, or of one .safetensors, .gguf, .bin, .pt or index file, whatever its name.

    Raises:
        NotFoundError: nothing there, or a folder without weights.
        FormatError: the file is damaged or of no known form; several weight files and no index.
        UnsupportedError: a known form that is not read (the message says which).
    """
    weights = _weights_at(path)
    if weights.name.endswith(".index.json"):
        is_pickle = weights.name == pickle.INDEX_NAME
        return pickle.open_sharded_torch(weights) if is_pickle else safetensors.open_sharded(weights)
    head = _head(weights)
    if head.startswith(gguf.MAGIC):
        return gguf.open_gguf(weights)
    if _is_safetensors(head, weights):  # first: a header of 640 bytes begins like a pickle, 0x80 0x02
        found = safetensors.open_safetensors(weights)
        return open_stored(found, weights.parent) if is_stored(found) else found
    if pickle.is_torch(head):
        return pickle.open_torch(weights)
    if head[8:9] == b"{":
        return safetensors.open_safetensors(weights)
    raise FormatError(
        f"{weights.name} begins with {head[:8]!r}: neither safetensors, GGUF nor a torch checkpoint",
        remedy="Name a model folder or a weight file.",
    )


def model_files(path: Path) -> list[Path]:
    """The files that make up the model at `path`: its index, its weights, then what lies beside them.

    Of a folder: configuration, tokenizer, template, licence. Of a single file: itself, or its whole split.
    Headers are not read. Raises as `open_source` where weights are missing or ambiguous.
    """
    weights = _weights_at(path)
    if weights.name.endswith(".index.json"):
        suffix = ".bin" if weights.name == pickle.INDEX_NAME else ".safetensors"
        shards = sorted(set(safetensors.read_index(weights, suffix)[0].values()))
        files = [weights, *(weights.parent / shard for shard in shards)]
    else:
        files = gguf.split_paths(weights)
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise NotFoundError(f"{missing.name}, a part of the model, is missing", remedy="Fetch it again.")
    return files + side_files(path) if path.is_dir() else files


def is_side_file(path: str) -> bool:
    """Whether a path inside a model folder is a file that `model_files` takes beside the weights."""
    depth = path.count("/")
    return path in _SIDE_NAMES or any(fnmatchcase(path, p) for p in _SIDE_PATTERNS if p.count("/") == depth)


def side_files(folder: Path) -> list[Path]:
    """The files of a model folder beside its weights: configuration, tokenizer, templates, licence."""
    named = [folder / name for name in _SIDE_NAMES]
    matched = [file for pattern in _SIDE_PATTERNS for file in sorted(folder.glob(pattern))]
    return [file for file in dict.fromkeys(named + matched) if file.is_file()]


def _weights_at(path: Path) -> Path:
    """The file to open: `path` itself, or the one that a folder's layout names."""
    if not path.is_dir():
        return path
    known = ("model.safetensors", safetensors.INDEX_NAME, "pytorch_model.bin", pickle.INDEX_NAME)
    # A folder that holds both a single file and an index of shards is two models: refused below, not guessed.
    for single, index in (known[:2], known[2:]):
        found = [path / name for name in (single, index) if (path / name).is_file()]
        if len(found) > 1:
            raise FormatError(f"{path} holds both {single} and {index}", remedy="Name the file to be read.")
        if found:
            return found[0]
    return _only_weights(path)


def _only_weights(folder: Path) -> Path:
    for pattern in ("*.safetensors", "*.gguf", "*.bin", "*.pt", "*.pth"):
        found = sorted(file for file in folder.glob(pattern) if file.is_file())
        if found and (len(found) == 1 or found == gguf.split_paths(found[0])):
            return found[0]
        if found:
            names = ", ".join(file.name for file in found[:4])
            raise FormatError(
                f"{folder} holds {len(found)} weight files and no index: {names}", remedy="Name the file to be read."
            )
    raise NotFoundError(f"{folder} holds no weights", remedy="Name a folder with .safetensors, .gguf or .bin files.")


def _is_safetensors(head: bytes, path: Path) -> bool:
    """Whether the file begins with the length of a header that it holds, and that header's first byte."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size - 8


def _head(path: Path) -> bytes:
    mapping = Mapping(path)
    try:
        return mapping.data[:_HEAD_BYTES].tobytes()
    finally:
        mapping.close()
