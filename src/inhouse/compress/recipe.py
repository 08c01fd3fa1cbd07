"""Recipes: YAML, a dict or a short name, checked whole before any work begins.

A recipe is a list of stages and what they share. Every key is known or refused with the nearest right one and the path
to it; options of a stage are those of its method; the order of stages is checked, with the reason. Knows the table of
methods; does not know models.

    seed: 0
    calibration: {texts: [corpus.txt], samples: 128, length: 256, mode: windows, mix: {}, seed: 0}
    budget: {ram: 4GB, threads: 2}
    stages:
      - quantize: {method: gptq, format: q4_0, exclude: ["re:.*down"], overrides: {embed.weight: {format: q6_0}}}
    gates: {final: good, text: held-out.txt, protocol: full}
"""

import dataclasses
import difflib
import hashlib
import json
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from inhouse.compress.calibrate import CalibrationOptions
from inhouse.compress.method import Method
from inhouse.compress.table import METHODS, method
from inhouse.compress.values import Count, NotNegative, Seed, check_finite, choice, known, mapping, plain, wrong
from inhouse.core.errors import UsageError
from inhouse.core.settings import parse_size
from inhouse.runtime.executor import KV_DTYPES
from inhouse.runtime.kv_codes import CODED_KV
from inhouse.runtime.packed_formats import FORMATS

# Families in the order in which they may follow one another, and why what comes later cannot come earlier.
ORDER: Mapping[str, tuple[int, str]] = {
    "merge": (0, "models are merged before anything is taken away from them"),
    "structured": (1, "whole parts are removed before what is left is trained or rounded"),
    "prune": (3, "zeros are chosen in whole matrices, before factors or codes are made of them"),
    "lowrank": (4, "factors are made of floats, before codes"),
    "smooth": (5, "scales and rotations are folded into floats, before codes"),
    "quantize": (6, "codes are made of the final floats"),
    "repair": (7, "what rounding lost is known only after it"),
    "qat": (7, "it begins from the codes' grid"),
    "attention": (9, "attention is cut on the model that will run"),
    "kv": (10, "the cache is that of the attention that will run"),
}
ANYWHERE = ("distill", "finetune")  # healing holds zeros, and trains through factors and codes
GATES: Mapping[str, float] = {"near-lossless": 0.01, "good": 0.05, "usable": 0.15}  # mean KL divergence, nats a token
RISES: Mapping[str, float] = {"near-lossless": 0.005, "good": 0.03, "usable": 0.08}  # share of the perplexity
_STAGE_KEYS = ("method", "format", "include", "exclude", "overrides")
_WITHOUT_WEIGHTS = ("attention", "kv")  # families that touch no weight: of those keys they take `method` alone
_BEGINNING = "Begin with `stages:` and a list such as `- quantize: {method: gptq, format: q4_0}`"


@dataclass(frozen=True, slots=True)
class Override:
    """Another method, format or options for the weights that a pattern matches; the last that matches counts."""

    pattern: str
    method: str
    format: str
    options: Any


@dataclass(frozen=True, slots=True)
class Stage:
    """One step. `options` is an instance of the method's dataclass."""

    kind: str
    method: str
    options: Any
    format: str = ""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()

    def selects(self, name: str) -> bool:
        """Whether the stage works on that weight."""
        if any(matches(pattern, name) for pattern in self.exclude):
            return False
        return not self.include or any(matches(pattern, name) for pattern in self.include)

    def choice(self, name: str) -> tuple[str, str, Any]:
        """(method, format, options) for that weight."""
        chosen = (self.method, self.format, self.options)
        for override in self.overrides:
            if matches(override.pattern, name):
                chosen = (override.method, override.format, override.options)
        return chosen

    def needs(self, name: str | None = None) -> set[str]:
        """What the stage asks of calibration, for one weight or for any."""
        if name is not None:
            chosen, _, options = self.choice(name)
            return {METHODS[chosen].need(options)}
        pairs = [(self.method, self.options), *((one.method, one.options) for one in self.overrides)]
        return {METHODS[method].need(options) for method, options in pairs}

    @property
    def label(self) -> str:
        """What the options have to say of themselves in a summary."""
        return str(getattr(self.options, "label", ""))

    def methods(self) -> list[Method]:
        """Rows that the stage may use."""
        return [METHODS[name] for name in dict.fromkeys([self.method, *(one.method for one in self.overrides)])]


@dataclass(frozen=True, slots=True)
class Texts:
    """What to calibrate on: group -> files; no files: text that the model writes itself."""

    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    options: CalibrationOptions = CalibrationOptions()


@dataclass(frozen=True, slots=True)
class Gate:
    """What the finished model must hold, on a text or on what the parent writes.

    max_kld: mean KL divergence from its parent, nats a token; None: measured, not judged. max_rise: share by which the
    perplexity may rise, which is what healed models are judged by, as training moves logits without harm. questions: a
    file of `compress.tasks`; a loss beyond chance fails. baseline: quantisation must be 30 % below plain rounding.
    """

    max_kld: float | None = None
    max_rise: float | None = None
    text: str | None = None
    protocol: str = "full"
    questions: str | None = None
    baseline: bool = True


@dataclass(frozen=True, slots=True)
class Recipe:
    """A checked recipe."""

    stages: tuple[Stage, ...]
    calibration: Texts = Texts()
    gate: Gate = Gate()
    ram: int | None = None  # bytes; None: not limited
    threads: int | None = None
    seed: int = 0

    def canonical(self) -> dict[str, Any]:
        """Everything that decides the result, defaults written out; budgets are not part of it."""
        whole = dataclasses.asdict(self)
        for key in ("ram", "threads"):
            del whole[key]
        return typing.cast(dict[str, Any], json.loads(json.dumps(whole, default=list)))

    @property
    def hash(self) -> str:
        """sha256 of the canonical form."""
        return hashlib.sha256(json.dumps(self.canonical(), sort_keys=True).encode()).hexdigest()

    def summary(self) -> str:
        """`quantize gptq q4_0, repair eora`."""
        parts = (
            " ".join(filter(None, (s.kind, s.method if s.method != s.kind else "", s.format or s.label)))
            for s in self.stages
        )
        return ", ".join(parts)


def matches(pattern: str, name: str) -> bool:
    """`re:...` is a regular expression for the whole name; anything else is the name, or a part of it between dots."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return f".{pattern}." in f".{name}."


def load_recipe(path: Path) -> dict[str, Any]:
    """A YAML file as a mapping. Raises UsageError."""
    import yaml  # lazily: whoever names a short recipe needs no YAML

    class Once(yaml.SafeLoader):
        """A key that stands twice is an error: the first would be dropped in silence."""

    def mapping(loader: Any, node: Any) -> Any:
        keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise UsageError(f"{path.name}: the key {twice!r} stands twice in one mapping", param=str(twice))
        return yaml.SafeLoader.construct_mapping(loader, node, deep=True)

    Once.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        document = yaml.load(path.read_text("utf-8"), Once)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"cannot read the recipe {path}: {error}", param="recipe") from None
    if document is None:
        raise UsageError(f"the recipe {path} is empty", remedy=_BEGINNING, param="recipe")
    if not isinstance(document, dict):
        raise UsageError(f"{path} is no recipe: its top level is not a mapping", remedy=_BEGINNING, param="recipe")
    return document


def parse_recipe(document: Mapping[str, Any]) -> Recipe:
    """Checks a recipe. Raises UsageError naming the path of what is wrong, and the nearest right word."""
    known(document, ("seed", "calibration", "budget", "stages", "gates"), "")
    check_finite(document)
    stages = document.get("stages")
    if not isinstance(stages, Sequence) or isinstance(stages, str) or not stages:
        raise wrong("stages", "must be a list of at least one stage")
    parsed = tuple(_stage(entry, f"stages[{i}]") for i, entry in enumerate(stages))
    _check_order(parsed)
    _check_together(parsed)
    budget = mapping(document.get("budget", {}), "budget")
    known(budget, ("ram", "threads"), "budget")
    threads = budget.get("threads")
    if threads is not None:
        threads = plain(threads, Count, "budget.threads")
    return Recipe(
        parsed, _texts(document.get("calibration", {})), _gate(document.get("gates", {})),
        None if budget.get("ram") is None else parse_size(budget["ram"], "budget.ram", 1), threads,
        plain(document.get("seed", 0), Seed, "seed"),
    )  # fmt: skip


def _stage(entry: Any, where: str) -> Stage:
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise wrong(where, "must be one stage, such as `quantize: {method: gptq, format: q4_0}`")
    ((kind, options),) = entry.items()
    families = sorted({row.family for row in METHODS.values()})
    known([kind], families, where)
    where = f"{where}.{kind}"
    values = [row.plain for row in METHODS.values() if row.family == kind][0]
    if values and options is not None and not isinstance(options, Mapping):
        options = dict.fromkeys(values, options)
    given = mapping({} if options is None else options, where)
    chosen = _method(given, kind, where)
    beside = _STAGE_KEYS[:1] if kind in _WITHOUT_WEIGHTS else _STAGE_KEYS
    names = [f.name for f in fields(chosen.options)]
    known(given, [*beside, *names], where)
    own = {k: v for k, v in given.items() if k not in beside or (k == "format" and k in names and v is not None)}
    made = read_options(chosen, own, where)
    if why := chosen.idle(made):
        raise UsageError(f"{where}: {chosen.name} would do nothing: {why[0]}", remedy=why[1], param=where)
    fmt = _format(given.get("format", ""), where)
    overrides = mapping(given.get("overrides", {}), f"{where}.overrides")
    return Stage(
        kind, chosen.name, made, fmt, _patterns(given, "include", where), _patterns(given, "exclude", where),
        tuple(_override(str(p), o, kind, (chosen, fmt, own), f"{where}.overrides.{p}") for p, o in overrides.items()),
    )  # fmt: skip


def _method(given: Mapping[str, Any], family: str, where: str) -> Method:
    rows = [row for row in METHODS.values() if row.family == family]
    name = given.get("method", rows[0].name if len(rows) == 1 else None)
    if name is None:
        known(given, dict.fromkeys([*_STAGE_KEYS, *(f.name for row in rows for f in fields(row.options))]), where)
        raise wrong(f"{where}.method", f"is needed: one of {', '.join(sorted(row.name for row in rows))}")
    try:
        return method(str(name), family)
    except UsageError as error:
        raise UsageError(f"{where}: {error.message}", remedy=error.remedy, param=f"{where}.method") from None


def _override(
    pattern: str, options: Any, kind: str, base: tuple[Method, str, Mapping[str, Any]], where: str
) -> Override:
    given = mapping(options, where)
    _pattern(pattern, where)
    row = _method(given, kind, where) if "method" in given else base[0]
    known(given, ["method", "format", *(f.name for f in fields(row.options))], where)
    inherited = base[2] if row is base[0] else {}
    own = {**inherited, **{key: value for key, value in given.items() if key not in ("method", "format")}}
    fmt = _format(given["format"], where) if "format" in given else base[1]
    return Override(pattern, row.name, fmt, read_options(row, own, where))


def read_options(row: Method, given: Mapping[str, Any], where: str = "options") -> Any:
    """An instance of the method's options from plain values. Raises UsageError."""
    own = {f.name: f for f in fields(row.options)}
    known(given, own, where)
    hints = typing.get_type_hints(row.options, include_extras=True)
    values = {key: plain(value, hints[key], f"{where}.{key}") for key, value in given.items()}
    lacking = [
        f.name for f in own.values()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        and f.name not in values and f.name not in row.defaults
    ]  # fmt: skip
    if lacking:
        raise wrong(f"{where}.{lacking[0]}", f"is needed by {row.name}")
    try:
        return row.options(**{**row.defaults, **values})
    except UsageError as error:
        raise UsageError(f"{where}: {error.message}", remedy=error.remedy, param=where) from None


def _format(value: Any, where: str) -> str:
    if value in ("", None) or value in FORMATS:
        return str(value or "")
    near = difflib.get_close_matches(str(value), FORMATS, 1)
    hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(FORMATS)}"
    raise UsageError(f"{where}.format: there is no format {value!r}", remedy=hint, param=f"{where}.format")


def _patterns(given: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = given.get(key, ())
    items = (value,) if isinstance(value, str) else tuple(plain(value, tuple[str, ...], f"{where}.{key}"))
    for pattern in items:
        _pattern(pattern, f"{where}.{key}")
    return items


def _pattern(pattern: str, where: str) -> None:
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise wrong(where, f"{pattern!r} is no regular expression: {error}") from None


def _check_order(stages: Sequence[Stage]) -> None:
    highest, before = -1, ""
    for i, stage in enumerate(stages):
        if stage.kind in ANYWHERE:
            continue
        place = METHODS[stage.method].place or stage.kind
        rank, reason = ORDER[place]
        if rank < highest:
            raise UsageError(
                f"stages[{i}]: {stage.kind} cannot come after {before}: {reason}",
                remedy="Put the stages in the order merge, structured pruning, pruning, lowrank, smooth, "
                "quantize, repair or qat, attention, kv (distill and finetune anywhere)", param=f"stages[{i}]",
            )  # fmt: skip
        if rank == highest == ORDER["kv"][0]:
            raise UsageError(f"stages[{i}]: kv is there twice", remedy="Leave one out", param=f"stages[{i}]")
        highest, before = rank, stage.kind


def _check_together(stages: Sequence[Stage]) -> None:
    """Refuses methods of one stage that work on different things, and K and V as codes where attention is cut."""
    cut = any(stage.kind == "attention" for stage in stages)
    for i, stage in enumerate(stages):
        where, scopes = f"stages[{i}].{stage.kind}", {row.name: row.scope for row in stage.methods()}
        if len(set(scopes.values())) > 1:
            said = ", ".join(f"{name} on a {scope}" for name, scope in scopes.items())
            raise UsageError(
                f"{where}: methods of one stage must work on the same: {said} at a time",
                remedy="Make two stages of it, with include and exclude", param=f"{where}.overrides",
            )  # fmt: skip
        if stage.kind == "kv" and stage.label in CODED_KV and cut:
            raise UsageError(
                f"{where}: K and V as {stage.label} are for attention over all positions, which the stage attention "
                "cuts in every layer", remedy=f"Use {', '.join(KV_DTYPES)}", param=where,
            )  # fmt: skip


def _texts(value: Any) -> Texts:
    given = mapping(value, "calibration")
    names = [f.name for f in fields(CalibrationOptions)]
    known(given, ["texts", *names], "calibration")
    texts = given.get("texts", [])
    groups = texts if isinstance(texts, Mapping) else {"": [texts] if isinstance(texts, str) else texts}
    files = {str(g): tuple(plain(f, tuple[str, ...], f"calibration.texts.{g}")) for g, f in groups.items() if f}
    hints = typing.get_type_hints(CalibrationOptions, include_extras=True)
    own = {key: plain(given[key], hints[key], f"calibration.{key}") for key in names if key in given}
    return Texts(files, CalibrationOptions(**own))


def _gate(value: Any) -> Gate:
    given = mapping(value, "gates")
    known(given, ("final", "max_kld", "max_rise", "text", "protocol", "questions", "baseline"), "gates")
    limit, rise = given.get("max_kld"), given.get("max_rise")
    if "final" in given:
        if limit is not None or rise is not None:
            raise wrong("gates", "takes final or limits of its own, not both")
        choice(given["final"], [*GATES, "none"], "gates.final")
        limit, rise = GATES.get(given["final"]), RISES.get(given["final"])
    limit = None if limit is None else plain(limit, NotNegative, "gates.max_kld")
    rise = None if rise is None else plain(rise, NotNegative, "gates.max_rise")
    text, questions = (None if given.get(key) is None else str(given[key]) for key in ("text", "questions"))
    baseline = plain(given.get("baseline", True), bool, "gates.baseline")
    return Gate(limit, rise, text, str(given.get("protocol", "full")), questions, baseline)
