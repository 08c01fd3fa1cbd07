"""Teachers: a model run beside the student, or its likeliest tokens kept on disk.

Knows how a cache lies in a folder; knows no student and no loss.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from inhouse.compress.features import Tap
from inhouse.compress.losses import TopK, top_k
from inhouse.compress.objective import Moment, Signals
from inhouse.compress.objective import Teacher as Teacher
from inhouse.core.errors import ConflictError, FormatError, UnsupportedError, UsageError
from inhouse.core.progress import Progress, silent
from inhouse.runtime.program import ProgramSet
from inhouse.runtime.torch_dense import forward
from inhouse.store.writing import atomic_file
from inhouse.train.data import Dataset, make_batch

CACHE_VERSION = 1


def shared_ids(teacher: Mapping[str, int], student: Mapping[str, int], teacher_size: int, student_size: int) -> int:
    """How many ids two models share, so that their logits can be compared: ids 0 .. n - 1.

    Args:
        teacher, student: token -> id of both tokenizers.
        teacher_size, student_size: rows of both heads, which may be padded differently (Qwen2.5 has 151936 and 152064).

    Raises UnsupportedError, naming the first token that differs: another tokenizer means other positions and other
    events, so that only sequence-level distillation (training on the teacher's text) remains.
    """
    if teacher != student:
        names = sorted(set(teacher.items()) ^ set(student.items()), key=lambda pair: (pair[1], pair[0]))
        token, number = names[0]
        raise UnsupportedError(
            f"different tokenizers of teacher and student: {len(names)} entries differ, {token!r} (id {number}) first",
            remedy="Train on text that the teacher writes (compress.generated), or take a teacher with this tokenizer",
            param="teacher",
        )
    used = max(teacher.values(), default=-1) + 1
    shared = min(teacher_size, student_size)
    if used > shared:
        raise UnsupportedError(f"the tokenizer has {used} ids, a head only {shared}", param="teacher")
    return shared


class LiveTeacher:
    """A model run on each batch. Objectives that share one teacher share one pass."""

    def __init__(self, programs: ProgramSet, weights: Mapping[str, Tensor], *, features: bool = False) -> None:
        self._program = programs.programs["step"]
        self._weights = {name: w.detach() for name, w in weights.items()}
        self._weights |= {n: torch.from_numpy(a) for n, a in programs.constants.items()}
        self._features = features
        self._last: tuple[Tensor, Signals] | None = None
        digest = hashlib.sha256()
        for name in sorted(weights):
            digest.update(name.encode() + weights[name].detach().float().numpy().tobytes())
        self._digest = digest.hexdigest()[:16]

    def describe(self) -> str:
        return f"live {self._digest}"

    def signals(self, moment: Moment, features: bool = False) -> Signals:
        if self._last is not None and self._last[0] is moment.tokens and (self._last[1].features or not features):
            return self._last[1]
        tap = Tap(moment.tokens.shape) if self._features or features else None
        with torch.no_grad():
            logits = forward(self._program, moment.tokens, self._weights, rows=moment.rows, observe=tap)["logits"]
        found = Signals(logits.float(), None, None if tap is None else tap.features())
        self._last = (moment.tokens, found)
        return found


@dataclass(frozen=True, slots=True)
class Cache:
    """Likeliest tokens for every learned position of one data set, as mapped files."""

    folder: Path
    temperature: float
    k: int
    slot: npt.NDArray[np.int64]  # [ids of the data set] -> entry, -1: not learned
    ids: npt.NDArray[np.unsignedinteger]
    logprobs: npt.NDArray[np.float16]
    rest: npt.NDArray[np.float32]


class CachedTeacher:
    """Reads what `write_cache` kept. Serves response distillation only."""

    def __init__(self, folder: Path, data: Dataset) -> None:
        self._cache = _open_cache(folder, data)
        self._name = json.loads((folder / "cache.json").read_text())["teacher"]

    @property
    def temperature(self) -> float:
        """What the student's logits must be divided by."""
        return self._cache.temperature

    def serves(self, teacher: LiveTeacher, temperature: float, k: int) -> bool:
        """Whether it holds what this teacher says at that temperature, k tokens each."""
        return (self._name, self._cache.temperature, self._cache.k) == (teacher.describe(), temperature, k)

    def describe(self) -> str:
        return f"cached {self._name} k={self._cache.k} T={self._cache.temperature}"

    def signals(self, moment: Moment, features: bool = False) -> Signals:
        if features:
            raise UsageError("cached logits have no features", remedy="Use a live teacher", param="teacher")
        entries = self._cache.slot[moment.at.numpy()]
        if entries.size and entries.min() < 0:
            raise UsageError("a position was not cached", remedy="Cache the data set that is trained on")
        ids = torch.from_numpy(self._cache.ids[entries].astype(np.int64))
        logprobs = torch.from_numpy(self._cache.logprobs[entries].astype(np.float32))
        return Signals(top=TopK(ids, logprobs, torch.from_numpy(np.array(self._cache.rest[entries]))))


def write_cache(
    teacher: LiveTeacher,
    data: Dataset,
    folder: Path,
    *,
    k: int = 64,
    temperature: float = 1.0,
    vocab: int,
    batch: int = 16,
    shared: int | None = None,
    progress: Progress = silent,
) -> None:
    """Runs the teacher over every sequence once and keeps k ids (2 or 4 bytes), k f16 log probabilities and the log
    mass of the rest for each learned position. `cache.json` is written last: without it there is no cache."""
    folder.mkdir(parents=True, exist_ok=True)
    slot = _slots(data)
    count = int((slot >= 0).sum())
    kind = np.dtype(np.uint16 if vocab <= 1 << 16 else np.uint32)
    ids = np.lib.format.open_memmap(folder / "ids.npy", "w+", kind, (count, k))
    logprobs = np.lib.format.open_memmap(folder / "logprobs.npy", "w+", np.float16, (count, k))
    rest = np.lib.format.open_memmap(folder / "rest.npy", "w+", np.float32, (count,))
    for first in range(0, len(data), batch):
        moment = _moment(data, np.arange(first, min(first + batch, len(data)), dtype=np.int64))
        logits = teacher.signals(moment).logits
        assert logits is not None
        found = top_k(logits[:, :shared], k, temperature=temperature)
        entries = slot[moment.at.numpy()]
        ids[entries], rest[entries] = found.ids.numpy().astype(kind), found.rest.numpy()
        logprobs[entries] = found.logprobs.numpy().astype(np.float16)
        progress("caching the teacher", min(first + batch, len(data)), len(data))
    for array in (ids, logprobs, rest):
        array.flush()
    facts = {"version": CACHE_VERSION, "data": data.digest(), "k": k, "temperature": temperature}
    with atomic_file(folder / "cache.json") as file:
        file.write(json.dumps(facts | {"teacher": teacher.describe()}, sort_keys=True).encode())


def _slots(data: Dataset) -> npt.NDArray[np.int64]:
    """Entry of each position whose next token is learned; -1 of the others."""
    learned = np.zeros(data.ids.size, np.bool_)
    learned[:-1] = data.learn[1:]
    learned[data.starts[1:] - 1] = False  # the last of a sequence has no next token
    slot = np.full(data.ids.size, -1, np.int64)
    slot[learned] = np.arange(int(learned.sum()))
    return slot


def _moment(data: Dataset, chosen: npt.NDArray[np.int64]) -> Moment:
    """A batch without a student."""
    made = make_batch(data, chosen)
    tokens, rows, targets = (torch.from_numpy(a) for a in (made.tokens, made.rows, made.targets))
    at = torch.from_numpy(data.starts[chosen])[rows // tokens.shape[1]] + rows % tokens.shape[1]
    return Moment(0, tokens, torch.from_numpy(data.lengths[chosen]), rows, targets, at, torch.empty(len(rows), 0))


def _open_cache(folder: Path, data: Dataset) -> Cache:
    """Raises FormatError for a cache that is not whole, ConflictError for another data set's."""
    try:
        facts = json.loads((folder / "cache.json").read_text())
        arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("ids", "logprobs", "rest")]
        version, k, temperature = facts["version"], int(facts["k"]), float(facts["temperature"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{folder.name} is no cache of teacher logits: {error}", remedy="Make it again") from error
    if version != CACHE_VERSION or facts.get("data") != data.digest():
        raise ConflictError(f"{folder.name} was made for another data set", remedy="Cache this one in another folder")
    slot = _slots(data)
    if any(len(array) != int((slot >= 0).sum()) for array in arrays):
        raise FormatError(f"{folder.name} is cut short", remedy="Make it again")
    return Cache(folder, temperature, k, slot, *arrays)
