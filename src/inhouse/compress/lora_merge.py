"""Merging a LoRA adapter into its float base: W + b a, rounded once to the file's type, and proven by its logits.

The base must be floats: added to quantised weights the product would be rounded to their coarse steps and lost. The
merged model must answer as the adapter on its base does; where rounding moves its logits further than the limit, it is
refused and nothing is left.
"""

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from inhouse.compress.evaluate import Rows, log_softmax
from inhouse.core.errors import FormatError, UnsupportedError
from inhouse.core.progress import Progress, silent
from inhouse.core.settings import load_settings
from inhouse.core.tensors import TensorSource
from inhouse.engine.session import Session
from inhouse.load.adapter import LoadedAdapter, read_adapter
from inhouse.load.describe import Described, describe
from inhouse.load.export_targets import as_bytes, narrowed
from inhouse.load.importer import Imported, import_model
from inhouse.load.locate import locate
from inhouse.model.families.family import Derive
from inhouse.model.spec import ModelSpec
from inhouse.runtime.adapters import LowRank
from inhouse.store.safetensors import write_safetensors
from inhouse.store.source import materialise, side_files
from inhouse.store.store import Store
from inhouse.store.writing import TensorData

MAX_KLD = 0.002  # nats a token; bf16 rounding of a merged model stays an order below
FLOATS = ("F32", "F16", "BF16")
SEQUENCES, TOKENS = 8, 64  # what the two are compared on

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Merged:
    """A merged model in the store, and how far its logits are from those of adapter and base."""

    imported: Imported
    kld_mean: float
    top1: float
    tensors: int  # that the adapter changed


def merge_adapter(
    base: str,
    adapter: Path,
    name: str,
    *,
    store: Store,
    max_kld: float = MAX_KLD,
    progress: Progress = silent,
) -> Merged:
    """Merges and imports the result as a version whose parent is the base, if that is of the store.

    Raises:
        UnsupportedError: the base is not of float safetensors, or is as `read_adapter` says.
        FormatError: the merged logits drift further than `max_kld`; the store is as it was.
    """
    located = locate(base)
    described = describe(located.path)
    try:
        derived = _derived(described)
        read = read_adapter(adapter, described.family, described.spec, derived)
        with tempfile.TemporaryDirectory(prefix="merge-", dir=store.home.tmp) as scratch:
            folder = Path(scratch) / "model"
            folder.mkdir()
            changed = _write(described, derived, read, folder, progress)
            kld, top1 = compare(base, adapter, folder)
            if not kld <= max_kld:
                raise FormatError(
                    f"the merged model's logits are {kld:.4g} nats a token from those of adapter and base, "
                    f"the limit is {max_kld:g}",
                    remedy="Serve base and adapter unmerged, or merge into a base of a wider type",
                    kld_mean=kld, max_kld=max_kld,
                )  # fmt: skip
            parent = f"{located.name}:{located.version}" if located.version else None
            how = f"LoRA {adapter.name} merged (mean KL {kld:.2g})" if parent else None
            imported = import_model(
                folder, name, store=store, how="move", origin=f"{base} + {adapter}", parent=parent, derived=how,
                progress=progress,
            )  # fmt: skip
    finally:
        described.source.close()
    return Merged(imported, kld, top1, changed)


def _derived(described: Described) -> dict[str, Derive]:
    """Where the base's weights lie; raises UnsupportedError for a base that nothing can be merged into."""
    if described.source.format != "safetensors" or not described.path.is_dir():
        raise UnsupportedError(
            f"merging writes safetensors, the base is {described.source.format}",
            remedy="Merge into the model's Hugging Face folder, then export",
        )
    if not isinstance(described.spec, ModelSpec):
        raise UnsupportedError(
            f"merging proves itself by the logits of a decoder, the base is of the family {described.spec.family}",
            remedy="Serve base and adapter unmerged",
        )
    return described.family.derive(described.spec, set(described.source))


def _write(
    described: Described, derived: Mapping[str, Derive], read: LoadedAdapter, folder: Path, progress: Progress
) -> int:
    """The merged folder, tensor by tensor; how many the adapter changed."""
    source = described.source
    by_source: dict[str, list[tuple[Derive, LowRank]]] = {}
    for name, low in read.adapter.items():
        by_source.setdefault(derived[name].source, []).append((derived[name], low))
    for name in by_source:
        if source.info(name).dtype not in FLOATS:
            raise UnsupportedError(f"tensor {name!r} is {source.info(name).dtype}; merging needs floats", param=name)
    total, done = len(list(source)), 0

    def reading(name: str) -> Callable[[], npt.NDArray[np.uint8]]:
        def read_one() -> npt.NDArray[np.uint8]:
            nonlocal done
            done += 1
            progress("merge", done, total)
            return _merged(source, name, by_source[name]) if name in by_source else source.raw(name)

        return read_one

    tensors = [TensorData(source.info(name), reading(name)) for name in source]
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    for file in side_files(described.path):
        if not file.name.endswith((".safetensors", ".index.json")):
            shutil.copy(file, folder / file.name)
    return len(by_source)


def _merged(source: TensorSource, name: str, changes: Sequence[tuple[Derive, LowRank]]) -> npt.NDArray[np.uint8]:
    """The bytes of a tensor with the products added in float32, rounded once to its type."""
    whole = materialise(source, name).astype(np.float32)
    for derive, low in changes:
        outputs = derive.outputs()
        view = whole.T if derive.transpose else whole  # [out, in] either way
        view[slice(None) if outputs is None else outputs] += low.b @ low.a
    return as_bytes(narrowed(whole, source.info(name).dtype, name))


def compare(base: str, adapter: Path, merged: Path) -> tuple[float, float]:
    """(mean KL(adapter + base || merged) in nats, share of equal likeliest tokens) over random tokens, with an f32
    cache and float activations on both sides."""
    settings = load_settings({"kv_dtype": "f32", "activations": "float", "max_sequences": 1, "prefix_cache": False})
    with Session.open(base, settings) as session:
        session.load_adapter("merged", adapter)
        slot = session.adapter_slot("merged")
        length = min(TOKENS, session.engine.context_length)
        texts = np.random.default_rng(0).integers(0, session.engine.vocab_size, (SEQUENCES, length)).tolist()
        wanted = [_logits(session, text, slot) for text in texts]
    with Session.open(str(merged), settings) as session:
        found = [_logits(session, text, 0) for text in texts]
    klds, same = [], []
    for truth, ours in zip(map(log_softmax, wanted), map(log_softmax, found), strict=True):
        klds.append((np.exp(truth) * (truth - ours)).sum(axis=1))
        same.append(truth.argmax(axis=1) == ours.argmax(axis=1))
    return float(np.concatenate(klds).mean()), float(np.concatenate(same).mean())


def _logits(session: Session, ids: Sequence[int], slot: int) -> Rows:
    kept: list[tuple[int, Rows]] = []
    session.engine.score(ids, tap=lambda first, rows: kept.append((first, rows.copy())), adapter=slot)
    rows: Rows = np.concatenate([part for _, part in sorted(kept, key=lambda entry: entry[0])])
    return rows


def to_dict(merged: Merged) -> Mapping[str, object]:
    """For `--json`."""
    more = {"kld_mean": merged.kld_mean, "top1": merged.top1, "tensors_changed": merged.tensors}
    return merged.imported.version.to_dict() | more
