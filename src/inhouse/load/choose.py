"""Which files of a repository make one model: safetensors before GGUF before pickles, or the GGUF that was asked for.

Knows the names that publishers use; does not fetch anything.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from inhouse.core.errors import NotFoundError, UsageError
from inhouse.store.hub import RemoteFile
from inhouse.store.refs import hint
from inhouse.store.source import is_side_file

_SPLIT = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")
_SHARD = re.compile(r"(?:model|pytorch_model)-\d{5}-of-\d{5}\.(?:safetensors|bin)")
_QUANT = re.compile(r"(?i)(?:^|[-._/])((?:UD-)?(?:I?Q\d\w*|BF16|F16|F32|FP16|MXFP4\w*|TQ\d_\d))(?=$|[-._/])")


@dataclass(frozen=True, slots=True)
class Choice:
    """The files to fetch, small ones first, and the file or folder (".") to import of them."""

    files: tuple[RemoteFile, ...]
    entry: str
    left_out: tuple[str, ...]


def choose_files(files: Sequence[RemoteFile], tag: str | None = None) -> Choice:
    """Chooses one model.

    Args:
        tag: a GGUF by its quantisation (`Q4_K_M`) or its file name; None: whatever the repository is made of.

    Raises NotFoundError if there is no such file or no weights at all, UsageError where several GGUF files make the
    choice the user's; both name the candidates.
    """
    names = {file.path: file for file in files}
    models = gguf_models([path for path in names if path.endswith(".gguf")])
    top = [path for path in names if "/" not in path]
    if tag is not None:
        return _made(names, _by_tag(models, tag))
    for group in (_weights(top, "model", "safetensors"), _weights(top, "pytorch_model", "bin")):
        if group:
            return _made(names, group, [path for path in names if is_side_file(path)])
        if len(models) == 1:
            return _made(names, next(iter(models.values())))
        if models:
            tags = ", ".join(sorted(models))
            raise UsageError(
                f"the repository has {len(models)} GGUF models",
                remedy=f"Choose one, as REPO:TAG, of: {tags}",
                param="tag",
            )
    raise NotFoundError(
        "the repository has no weights that are read (.safetensors, .gguf, .bin)", remedy="Pull another repository."
    )


def gguf_models(paths: Sequence[str]) -> dict[str, list[str]]:
    """Tag -> files of each GGUF model; the tag is its quantisation where that is unique, else its file's name."""
    stems: dict[str, list[str]] = {}
    for path in sorted(paths):
        name = path.rsplit("/", 1)[-1].lower()
        if "mmproj" in name or "imatrix" in name:
            continue  # parts of other programs' models, which alone are none
        split = _SPLIT.fullmatch(path)
        stems.setdefault(split["stem"] if split else path.removesuffix(".gguf"), []).append(path)
    tags: dict[str, list[str]] = {}
    for stem in stems:
        found = _QUANT.findall(stem)
        tags.setdefault(found[-1].upper() if found else stem, []).append(stem)
    return {(tag if len(members) == 1 else stem): stems[stem] for tag, members in tags.items() for stem in members}


def _by_tag(models: dict[str, list[str]], tag: str) -> list[str]:
    wanted = tag.lower().removesuffix(".gguf")
    for name, paths in models.items():
        stem = paths[0].removesuffix(".gguf")
        if wanted in (name.lower(), stem.lower(), stem.rsplit("/", 1)[-1].lower()):
            return paths
    raise NotFoundError(f"the repository has no GGUF {tag!r}", remedy=hint(tag, models) if models else "It has none.")


def _weights(top: Sequence[str], stem: str, suffix: str) -> list[str]:
    index, shards = f"{stem}.{suffix}.index.json", [path for path in top if _SHARD.fullmatch(path)]
    if f"{stem}.{suffix}" in top:
        return [f"{stem}.{suffix}"]
    if index in top:
        return [index, *sorted(path for path in shards if path.endswith(f".{suffix}"))]
    only = [path for path in top if path.endswith(f".{suffix}") and not path.startswith("training_args")]
    return only if len(only) == 1 else []


def _made(names: dict[str, RemoteFile], weights: Sequence[str], sides: Sequence[str] = ()) -> Choice:
    chosen = dict.fromkeys([*sides, *weights])
    entry = weights[0] if weights[0].endswith(".gguf") else "."
    ordered = sorted((names[path] for path in chosen), key=lambda file: (file.path in weights, file.size or 0))
    left = tuple(sorted(path for path in names if path not in chosen and not path.startswith(".")))
    return Choice(tuple(ordered), entry, left)
