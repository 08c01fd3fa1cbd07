"""What of a recipe can be seen not to work on the model at hand, or to do less than it says, before any work.

Knows the names and the kind of the opened model, and what stages say of themselves; runs nothing.
"""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from inhouse.compress.calibrate import Calibration, read_texts
from inhouse.compress.evaluate import check_protocol
from inhouse.compress.heal import BASE, check_teacher
from inhouse.compress.recipe import Gate, Recipe, Stage, matches
from inhouse.compress.seen import find_seen
from inhouse.compress.sparsity import parse_pattern
from inhouse.compress.stages import selected
from inhouse.compress.table import METHODS
from inhouse.compress.tasks import read_questions
from inhouse.compress.work import Work
from inhouse.core.errors import FormatError, UnsupportedError, UsageError
from inhouse.load.importer import check_values
from inhouse.model.spec import ModelSpec

ANYONE = ("head.weight", "embed.weight")  # stand in recipes for models of any kind
NAMED = 3  # weights that a sentence gives as examples


def check_files(gate: Gate) -> None:
    """Reads what the gate will need. Raises NotFoundError, UsageError naming the key."""
    if gate.text is not None:
        read_texts([gate.text], what="gate text", key="gates.text")
    if gate.questions is not None:
        read_questions(Path(gate.questions))


def check_weights(work: Work) -> None:
    """Refuses a checkpoint with values that are not finite, naming the tensor; versions of the store were checked when
    they came there. Raises FormatError."""
    if work.parent is not None:
        return
    source = work.described.source
    for name in source:
        try:
            check_values(source, name)
        except FormatError as error:
            raise FormatError(
                error.message, remedy="The tensor is damaged, or training overflowed: get or save the checkpoint anew; "
                "no method makes numbers of it", param=name,
            ) from None  # fmt: skip


def check_teachers(work: Work, recipe: Recipe) -> None:
    """Refuses a teacher that is not there or has another tokenizer. Raises NotFoundError, UnsupportedError."""
    for stage in recipe.stages:
        teacher = getattr(stage.options, "teacher", "")
        if teacher not in ("", BASE):
            check_teacher(work, teacher)


def check_family(work: Work, recipe: Recipe) -> None:
    """Refuses what only decoders can do: learning from next tokens, and a gate."""
    if isinstance(work.spec, ModelSpec) and not work.spec.headless:
        check_protocol(recipe.gate.protocol, work.spec.context_length)
        return
    learning = [stage for stage in recipe.stages if "gradients" in stage.needs()]
    if learning or recipe.gate.max_kld is not None:
        what = f"{learning[0].kind} {learning[0].method}" if learning else "a gate"
        raise UnsupportedError(
            f"{what} works by the next tokens that a model expects, and {work.spec.family} is no decoder",
            remedy="Leave it out; rounding, pruning and low rank serve every family",
        )


def check_gate(recipe: Recipe, calibration: Calibration | None) -> None:
    """Refuses to judge a model by what it was calibrated on."""
    if recipe.gate.text is None:
        return
    judged = [text.text for text in read_texts([recipe.gate.text], what="gate text", key="gates.text")]
    found = find_seen(judged, calibration.texts) if calibration is not None else None
    if found is not None:
        raise UsageError(
            f"gates.text {recipe.gate.text} is what the model would be calibrated on ({found['source']})",
            remedy="Judge it by other text", param="gates.text",
        )  # fmt: skip


def check_stages(work: Work, recipe: Recipe) -> list[str]:
    """What to say of stages that do less than they name: patterns that match nothing, weights that a later stage
    replaces. Raises UsageError for a stage of which nothing would be left, or that has nothing to do."""
    whole = [f"stages[{at}] ({_told(stage)})" for at, stage in enumerate(recipe.stages)]
    notes = _idle_patterns(work, recipe)
    if _changes_names(recipe):  # names are of the opened model; after that they are others'
        return notes
    taken = [set(selected(work, stage)) for stage in recipe.stages]
    for at, stage in enumerate(recipe.stages):
        _check_grid(recipe.stages[: at + 1], whole[at])
        for before in range(at):
            both = taken[before] & taken[at]
            if both and _replaces(recipe.stages[before], stage):
                notes += _replaced(whole[before], whole[at], both, taken[before])
            elif both and taken[at] <= taken[before] and _adds_nothing(recipe.stages[before], stage):
                raise UsageError(
                    f"{whole[at]} adds no zeros to those of {whole[before]}: all {len(taken[at])} weights that it "
                    "selects have as many already", remedy="Leave one of the two out", param=f"stages[{at}]",
                )  # fmt: skip
    return notes


def _changes_names(recipe: Recipe) -> bool:
    return any(METHODS[stage.method].place == "structured" for stage in recipe.stages)


def _told(stage: Stage) -> str:
    share = getattr(stage.options, "sparsity", "")
    words = (stage.kind, stage.method if stage.method != stage.kind else "", stage.format, str(share))
    return " ".join(word for word in words if word)


def _replaces(before: Stage, after: Stage) -> bool:
    """Codes are made of the floats: those of an earlier stage are dropped."""
    return before.kind == after.kind == "quantize"


def _replaced(before: str, after: str, both: set[str], taken: set[str]) -> list[str]:
    if both == taken:
        raise UsageError(
            f"{after} takes all {len(both)} weights of {before} again, so that nothing of that would be left "
            f"({_examples(both)})", remedy="Leave one of the two out, or part them by include and exclude",
            param="stages",
        )  # fmt: skip
    return [f"{after} replaces what {before} made of {len(both)} of its {len(taken)} weights: {_examples(both)}"]


def _adds_nothing(before: Stage, after: Stage) -> bool:
    """Whether zeros by the rule of `after` are there already once `before` has put its own. Only of methods that do
    nothing but choose zeros."""
    if before.kind != "prune" or after.method not in ("magnitude", "wanda") or getattr(after.options, "refit", None):
        return False
    if after.overrides or before.overrides or not hasattr(before.options, "sparsity"):
        return False
    first, second = parse_pattern(before.options.sparsity), parse_pattern(after.options.sparsity)
    if second.grouped or first.grouped:
        return second == first
    by_row = bool(getattr(after.options, "by_row", False)) and not getattr(before.options, "by_row", False)
    return not by_row and second.sparsity <= first.sparsity


def _check_grid(stages: Sequence[Stage], told: str) -> None:
    """Training in stored values needs some."""
    last = stages[-1]
    formats = [last.format, *(one.format for one in last.overrides)]
    if last.kind != "qat" or any(formats) or any(stage.kind == "quantize" for stage in stages):
        return
    raise UsageError(
        f"{told} trains in the grid of stored codes, and there is none: no stage quantizes before it and it names no "
        "format", remedy="Give it a format, such as q4_0, or put a quantize stage before it; finetune and distill "
        "train floats", param=f"stages[{len(stages) - 1}].qat.format",
    )  # fmt: skip


def _idle_patterns(work: Work, recipe: Recipe) -> list[str]:
    """Patterns that no weight of the model answers to, with the nearest names."""
    found = []
    names = work.names()
    for at, stage in enumerate(recipe.stages):
        overrides = [one.pattern for one in stage.overrides]
        for key, patterns in (("include", stage.include), ("exclude", stage.exclude), ("overrides", overrides)):
            for pattern in patterns:
                if pattern not in ANYONE and not any(matches(pattern, name) for name in names):
                    near = _nearest(pattern, names)
                    found.append(f"stages[{at}].{stage.kind}.{key}: {pattern!r} matches no weight{near}")
    return found


def _nearest(pattern: str, names: Iterable[str]) -> str:
    """` (nearest: mlp.down)`: of whole names and the parts between their dots that recipes write."""
    parts: dict[str, Any] = {}
    for name in names:
        bare = name.removesuffix(".weight").split(".")
        ends = [".".join(bare[i:]) for i in range(len(bare))] + [".".join(bare[:i]) for i in range(1, len(bare))]
        parts |= dict.fromkeys([name, *(end for end in ends if not end.isdigit()), *bare])
    near = difflib.get_close_matches(pattern.removeprefix("re:"), parts, 3, cutoff=0.5)
    return f" (nearest: {', '.join(near)})" if near else ""


def _examples(names: set[str]) -> str:
    shown = sorted(names)[:NAMED]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")
