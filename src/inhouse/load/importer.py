"""Importing: a folder or file is read safely, verified whole, and only then becomes a version in the store.

Knows what must hold of a model before it may be served; does not know how contents and names are kept.
A file that fails any check leaves the store as it was.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from inhouse.core.errors import FormatError, UsageError
from inhouse.core.progress import Progress, silent
from inhouse.core.tensors import TensorSource
from inhouse.load.bind import Plan, plan_binding
from inhouse.load.describe import Described, describe, licence, read_tokenizer
from inhouse.load.keras import converted, is_keras
from inhouse.load.locate import Located, locate_path, relative
from inhouse.model.build import parameters
from inhouse.model.encoder import EncoderSpec
from inhouse.model.seq2seq import Seq2SeqSpec
from inhouse.model.tokens.chat import ChatTemplate
from inhouse.model.tokens.tokenizer import Tokenizer
from inhouse.store.blobs import How
from inhouse.store.quantized.source import QuantizedSource
from inhouse.store.refs import check_name
from inhouse.store.source import check_finite
from inhouse.store.store import Store
from inhouse.store.stored_source import StoredSource
from inhouse.store.version import NewVersion, Summary, Version

_PROBE = "Hello, 世界! 123\n"


@dataclass(frozen=True, slots=True)
class Imported:
    """The version that a model became."""

    version: Version
    new: bool  # False: the same content was there already
    left_out: tuple[str, ...]  # files of the folder that are no part of the model, as Inhouse knows it
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Verified:
    """A checkpoint that passed every check."""

    located: Located
    described: Described
    plan: Plan
    tokenizer: Tokenizer
    notes: tuple[str, ...]


def import_model(
    path: Path,
    name: str | None = None,
    *,
    store: Store,
    how: How = "copy",
    origin: str | None = None,
    parent: str | None = None,
    derived: str | None = None,
    progress: Progress = silent,
) -> Imported:
    """Brings a model folder, a .gguf (the first of a split one) or a .safetensors with its config into the store.

    Args:
        name: of the model; the folder's or file's own, if None.
        how: `copy` (blocks are shared where the file system can), `link` (a second name for the same bytes: saves
            space, and an edit of the original then damages the model), `move` (the files are consumed).
        origin: where it came from, for the record; the path, if None.
        parent: the version that it was made of, and `derived` how.
        progress: told ("verify weights" | "store FILE" | "hash FILE", bytes done, bytes in all).

    Raises:
        FormatError: a name, shape, type, number, the tokenizer or the template is not as it must be; it is named.
        UnsupportedError: a family or type that is not run. NotFoundError: a part is missing.
        CapacityError: disk space. ConflictError, UsageError: the name.
    """
    title = check_name(name) if name is not None else None
    if parent is not None:
        store.catalog.resolve(parent)  # before hours of copying, not after
    if is_keras(path):
        with converted(path, progress) as folder:
            return import_model(
                folder, title, store=store, how="copy", origin=origin or str(path.resolve()), parent=parent,
                derived=derived or "converted from Keras .h5", progress=progress,
            )  # fmt: skip
    verified = verify_model(path, progress)
    try:
        located, described = verified.located, verified.described
        sources = [(relative(file, located.path), file) for file in located.files]
        new = NewVersion(
            name=title or located.name,
            format=described.source.format,
            files=[],
            summary=summarise(described),
            origin=origin or str(path.resolve()),
            parent=parent,
            how=derived,
        )
        added = store.add(new, sources, how=how, confirm=lambda: _confirm(located, how), progress=progress)
        return Imported(added.version, added.new, left_out(located), verified.notes)
    finally:
        verified.described.source.close()


def verify_model(path: Path, progress: Progress = silent) -> Verified:
    """Checks a checkpoint whole: nothing missing, nothing left over, shapes, types, finite values, tokenizer, template.

    The returned `described.source` is open. Raises FormatError, UnsupportedError, NotFoundError.
    """
    located = locate_path(path)
    described = describe(located.path)
    try:
        plan = plan_binding(described.source, described.spec, described.family, described.programs())
        tokenizer = read_tokenizer(described)
        notes = (*plan.notes, *_check_text(described, tokenizer))
        with described.guard():
            _check_values(described, progress)
    except BaseException:
        described.source.close()
        raise
    return Verified(located, described, plan, tokenizer, notes)


def summarise(described: Described) -> Summary:
    """What the catalog says of a model."""
    spec, source = described.spec, described.source
    kinds: Counter[str] = Counter()
    for name in source:
        info = source.info(name)
        kinds[info.dtype] += info.nbytes
    return Summary(
        family=described.family.name,
        architecture=described.architecture,
        parameters=parameters(spec),
        dtype=kinds.most_common(1)[0][0],
        context=spec.context_length,
        vocab=spec.vocab_size,
        licence=licence(described),
        gate=_gate(source),
    )


def _gate(source: TensorSource) -> str:
    """What a compressed checkpoint says of its quality gate."""
    said = source.manifest.get("gate") if isinstance(source, StoredSource) else None
    if not isinstance(said, Mapping):
        return ""
    return {True: "passed", False: "failed"}.get(said.get("passed"), "measured")  # type: ignore[arg-type]


def left_out(located: Located) -> tuple[str, ...]:
    """Files beside the model's own that are not taken in, so that nothing is dropped in silence."""
    if not located.path.is_dir():
        return ()
    taken = {relative(file, located.path) for file in located.files}
    found = sorted(file.name for file in located.path.iterdir() if not file.name.startswith("."))
    return tuple(name for name in found if name not in taken and not any(t.startswith(f"{name}/") for t in taken))


def _check_values(described: Described, progress: Progress) -> None:
    source = described.source
    total = sum(source.info(name).nbytes for name in source)
    done = 0
    for name in source:
        check_values(source, name)
        done += source.info(name).nbytes
        progress("verify weights", done, total)


def check_values(source: TensorSource, name: str) -> None:
    """Refuses a tensor of any source with NaN or infinity in its values, scales or codes. Raises FormatError."""
    if isinstance(source, StoredSource) or (isinstance(source, QuantizedSource) and source.coding(name) is not None):
        source.check(name)
    else:
        check_finite(source, name)


def _check_text(described: Described, tokenizer: Tokenizer) -> list[str]:
    """Notes on tokenizer and template. Raises FormatError if they do not work at all."""
    ids = tokenizer.encode(_PROBE)
    rows = described.spec.vocab_size
    if not ids or max(ids) >= rows:
        raise FormatError(f"the tokenizer gives {len(ids)} ids up to {max(ids, default=-1)} for {rows} rows")
    if isinstance(described.spec, EncoderSpec):
        return []  # nobody chats with it
    template = ChatTemplate(tokenizer.chat_templates, tokenizer.special_tokens)
    if template.is_default and isinstance(described.spec, Seq2SeqSpec):
        return ["the model brings no chat template; the last message of a chat is read as it is"]
    if template.is_default:
        return ["the model brings no chat template; chats are written as ChatML"]
    notes = []
    for name in template.sources:
        try:
            template.render([{"role": "user", "content": _PROBE}], template=name)
        except UsageError as error:  # completions work all the same
            notes.append(f"chat template {name!r} does not render a plain question: {error.message}")
    return notes


def _confirm(located: Located, how: How) -> None:
    """Raises FormatError if a file is no longer the one that was verified."""
    if how == "move":
        return  # the files are gone by now; they are ours, and nobody else writes to them
    if locate_path(located.path).identity != located.identity:
        raise FormatError(
            f"{located.path.name} changed while it was imported", remedy="Import it again when it is left alone."
        )
