"""Opening a model: from what the user named to weights, tokenizer and an executor that runs them.

Knows the order and what may be done at once (the tokenizer is parsed beside the weights); each step is a room's own.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from inhouse.core.errors import CapacityError, FormatError, NotFoundError, UnavailableError
from inhouse.core.progress import Progress, silent
from inhouse.load.bind import Plan, bind, plan_binding
from inhouse.load.cache import Pack, PackKey, open_pack, pack_size, write_pack
from inhouse.load.describe import Described, describe, read_tokenizer
from inhouse.load.locate import Located, content_digest, locate
from inhouse.load.packing import Part, nbytes
from inhouse.load.sentence import Sentence
from inhouse.model.build import Spec
from inhouse.model.encoder import EncoderSpec
from inhouse.model.families.family import Derive, Family
from inhouse.model.rewrite import order_columns, quantize_activations
from inhouse.model.spec import ModelSpec
from inhouse.model.tokens.chat import ChatTemplate
from inhouse.model.tokens.tokenizer import Tokenizer
from inhouse.runtime import executors
from inhouse.runtime.executor import Executor, Weight
from inhouse.runtime.program import ProgramSet
from inhouse.store.home import Home, private_folder
from inhouse.store.mapping import Mapping as FileMapping


@dataclass(slots=True)
class LoadReport:
    """What happened while a model was opened."""

    formats: dict[str, int] = field(default_factory=dict)  # packed format -> matrices
    nbytes: int = 0  # of packed weights
    cache: str = "off"  # "mapped" (was there), "made" (now), "off"
    notes: list[str] = field(default_factory=list)  # what the user should know, one sentence each
    seconds: dict[str, float] = field(default_factory=dict)  # stage -> wall time


@dataclass(frozen=True, slots=True)
class Bound:
    """A model's weights, and the file mapping they are views of, if they are."""

    plan: Plan
    weights: Mapping[str, Weight]
    digest: str
    mapping: FileMapping | None


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that can run. `close` frees it."""

    name: str
    version: int  # 0: not from the store
    digest: str  # of the files, as the store computes it
    spec: Spec
    programs: ProgramSet  # what the executor runs: activations of quantised weights are quantised
    plain_programs: ProgramSet  # before that rewrite
    family: Family
    derived: Mapping[str, Derive]  # canonical name -> where the checkpoint has it
    weights: Mapping[str, Weight]
    tokenizer: Tokenizer
    chat_template: ChatTemplate
    generation: Mapping[str, Any]  # sampling defaults that the model brings
    executor: Executor
    report: LoadReport
    mapping: FileMapping | None = None
    sentence: Sentence | None = None  # what a sentence-transformers folder says
    config: Mapping[str, Any] = field(default_factory=dict)  # config.json; {} of a GGUF file

    def close(self) -> None:
        """Frees the executor, then the mapping."""
        self.executor.close()
        if self.mapping is not None:
            self.mapping.close()


def open_model(
    reference: str,
    *,
    quantize: str | None = None,
    executor: str = "native",
    device: str = "cpu",
    threads: int | None = None,
    kv_dtype: str = "auto",
    activations: str = "int8",
    context: int | None = None,
    cache: bool = True,
    home: Home | None = None,
    progress: Progress = silent,
) -> LoadedModel:
    """Opens a model of the store (`name`, `name:3`, `name@prod`), a folder, a .gguf file, or the embedded `demo`.

    Args:
        quantize: None, `q8`, `q6` or `q4`: what float matrices are packed as.
        executor: `native` or `torch`, the latter on `device`.
        threads: of packing and of the native executor; None: what the machine grants.
        kv_dtype: one of `runtime.kv_codes.KV_TYPES`, or `auto`: what the model says; f32 for models of f32 matrices
            alone; else f16.
        activations: `int8`: quantised rows meet quantised weights, exact integer products; `float`: they do not, which
            is slower, and agrees with the torch executor to float precision.
        context: a lower limit of positions than the model's own.
        cache: keep packed weights in a file that the next start maps.

    Raises:
        NotFoundError, FormatError, UnsupportedError, UsageError: the model cannot be opened as asked.
        UnavailableError: the executor is not installed. CapacityError: memory does not suffice.
    """
    home = home or Home.find()
    report = LoadReport()
    with _Timer(report, "locate"):
        located = locate(reference, home)
    with _Timer(report, "describe"):
        described = describe(located.path, context)
    try:
        with ThreadPoolExecutor(1, "tokenizer") as pool:
            parsing = pool.submit(_timed_tokenizer, located, described, home if cache else None, report)
            with _Timer(report, "build"):
                plain = described.programs()
            with _Timer(report, "weights"):
                bound = load_weights(
                    located, described, plain, quantize, home if cache else None, report, threads, progress
                )
            plain = order_columns(plain, bound.plan.columns)
            programs = plain if activations == "float" else quantize_activations(plain, bound.plan.formats)
            with _Timer(report, "executor"):
                made = executors.create(
                    executor,
                    programs,
                    bound.weights,
                    kv_dtype=choose_kv_dtype(kv_dtype, bound.plan.formats.values(), described.spec),
                    threads=threads,
                    device=device,
                )
            try:
                tokenizer = parsing.result()
            except BaseException:
                made.close()
                raise
    finally:
        described.source.close()
    return _loaded(located, described, bound, tokenizer, made, programs, plain, report)


def _loaded(
    located: Located,
    described: Described,
    bound: Bound,
    tokenizer: Tokenizer,
    executor: Executor,
    programs: ProgramSet,
    plain: ProgramSet,
    report: LoadReport,
) -> LoadedModel:
    """The parts put together."""
    return LoadedModel(
        name=located.name,
        version=located.version,
        digest=bound.digest,
        spec=described.spec,
        programs=programs,
        plain_programs=plain,
        family=described.family,
        derived={part.spec.name: part.derive for part in bound.plan.parts},
        weights=bound.weights,
        tokenizer=tokenizer,
        chat_template=ChatTemplate(tokenizer.chat_templates, tokenizer.special_tokens),
        generation=described.generation,
        executor=executor,
        report=report,
        mapping=bound.mapping,
        sentence=described.sentence,
        config={} if described.source.format == "gguf" else described.config,
    )


def load_weights(
    located: Located,
    described: Described,
    programs: ProgramSet,
    wish: str | None,
    home: Home | None,
    report: LoadReport,
    threads: int | None = None,
    progress: Progress = silent,
) -> Bound:
    """The packed weights, from the pack cache of `home` (None: no cache) or made from the checkpoint."""
    plan = plan_binding(described.source, described.spec, described.family, programs, wish)
    report.notes += plan.notes
    pack = None
    if home is not None:
        pack = _from_cache(located, described, plan, wish, home, report, threads, progress)
    if pack is not None:
        bound = Bound(plan, pack.weights, located.digest or pack.digest, pack.mapping)
    else:
        weights = {part.spec.name: weight for part, weight in _made(described, plan, progress, threads)}
        bound = Bound(plan, weights, content_digest(located, progress), None)
    report.formats = dict(Counter(plan.formats.values()))
    report.nbytes = sum(nbytes(weight) for weight in bound.weights.values())
    return bound


def _from_cache(
    located: Located,
    described: Described,
    plan: Plan,
    wish: str | None,
    home: Home,
    report: LoadReport,
    threads: int | None,
    progress: Progress,
) -> Pack | None:
    """The pack, made now if it lacks; None where it cannot be kept, with a note saying why."""
    key = PackKey(located.identity, wish or "")
    try:
        pack = open_pack(home.packs, key, plan.parts)
        report.cache = "mapped"
        return pack
    except NotFoundError:
        pass
    except FormatError as error:
        report.notes.append(f"the packed cache was made anew: {error.message}")
    try:
        made = _made(described, plan, progress, threads)
        write_pack(home.packs, key, content_digest(located, progress), made, pack_size(plan.parts))
        pack = open_pack(home.packs, key, plan.parts)
    except (CapacityError, UnavailableError) as error:
        report.notes.append(f"packed weights are not kept: {error.message}")
        return None
    report.cache = "made"
    return pack


def _made(described: Described, plan: Plan, progress: Progress, threads: int | None) -> Iterator[tuple[Part, Weight]]:
    """The weights, and at their end, before anybody keeps them, the proof that the file stayed what it was."""
    with described.guard():
        yield from bind(described.source, plan, progress=progress, threads=threads)
        described.check_unchanged()


def choose_kv_dtype(wish: str, formats: Iterable[str], spec: Spec | None = None) -> str:
    """`auto` means what the model says; f32 where all matrices are f32, and for encoders, whose K and V last one step;
    else f16."""
    if wish != "auto":
        return wish
    if isinstance(spec, ModelSpec) and spec.kv_cache:
        return spec.kv_cache
    if isinstance(spec, EncoderSpec):
        return "f32"
    return "f32" if set(formats) <= {"f32"} else "f16"


def _timed_tokenizer(located: Located, described: Described, home: Home | None, report: LoadReport) -> Tokenizer:
    folder = home.tokenizers if home is not None else None
    if folder is not None:
        try:
            private_folder(folder)
        except UnavailableError:  # weights say why the cache cannot be written
            folder = None
    with _Timer(report, "tokenizer"):
        return read_tokenizer(described, folder, located.identity)


class _Timer:
    """Adds a stage's wall time to the report."""

    def __init__(self, report: LoadReport, stage: str) -> None:
        self._report, self._stage = report, stage

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        self._report.seconds[self._stage] = time.perf_counter() - self._start
