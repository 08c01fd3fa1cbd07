"""Distillation: the model in hand learns from the model it was made of, or from any other of the same tokenizer.

Sources: response by temperature (Hinton et al. 2015, arXiv 1503.02531), reverse KL (MiniLLM, 2306.08543), generalised
Jensen-Shannon (GKD, 2306.13649); features (FitNets, 1412.6550; TinyBERT, 1909.10351); relations (RKD, 1904.05068;
MiniLMv2, 2012.15828); healing pruned models by distillation (Minitron, 2407.14679).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inhouse.compress.calibrate import Calibration
from inhouse.compress.heal import (
    BASE,
    HealOptions,
    TeacherModel,
    as_data,
    heal,
    run_folder,
    summary,
    teacher_of,
    vocabulary,
)
from inhouse.compress.losses import DIRECTIONS, Direction
from inhouse.compress.objective import CrossEntropy, FeatureMatch, Mix, Objective, RelationMatch, Response, layer_map
from inhouse.compress.teacher import CachedTeacher, Teacher, shared_ids, write_cache
from inhouse.compress.values import Count, Natural, NotNegative, Positive, Share
from inhouse.compress.work import Work
from inhouse.core.errors import ConflictError, FormatError, UnsupportedError, UsageError
from inhouse.core.progress import Progress, silent
from inhouse.train.data import Dataset


@dataclass(frozen=True, slots=True)
class DistillOptions(HealOptions):
    """What the student is to learn of the teacher.

    teacher: `base`, the model that was opened; or a model of the store, a folder, a .gguf, of the same tokenizer.
    ce: share of cross-entropy beside the response. direction, temperature, beta: of the response.
    top_k: the teacher's likeliest tokens are cached on disk before training, that many a token; 0: it runs beside the
    student. hidden, attention: weights of features. distance, angle, similarity, minilm, between: weights of
    relations.
    response: weight of the response; 0 leaves it out.
    """

    teacher: str = BASE
    response: NotNegative = 1.0
    ce: Share = 0.0
    direction: Direction = "forward"
    temperature: Positive = 1.0
    beta: Share = 0.5
    top_k: Natural = 0
    hidden: NotNegative = 0.0
    attention: NotNegative = 0.0
    distance: NotNegative = 0.0
    angle: NotNegative = 0.0
    similarity: NotNegative = 0.0
    minilm: NotNegative = 0.0
    between: NotNegative = 0.0
    relation_heads: Count = 4

    @property
    def wants_features(self) -> bool:
        return bool(self.hidden or self.attention or self.wants_relations)

    @property
    def wants_relations(self) -> bool:
        return any((self.distance, self.angle, self.similarity, self.minilm, self.between))


def distill(
    work: Work,
    calibration: Calibration | None,
    options: DistillOptions,
    report: dict[str, Any],
    progress: Progress = silent,
) -> None:
    """Trains `work` on the calibration's rows towards the teacher.

    Raises UsageError without rows or with nothing to learn, UnsupportedError for a teacher of another tokenizer (see
    `teacher.shared_ids`) or features asked of cached logits.
    """
    if calibration is None:
        raise UsageError("distillation needs texts", remedy="Name them under calibration", param="calibration")
    check_options(work, "", "", options)
    model = teacher_of(work, options.teacher)
    shared = shared_ids(
        vocabulary(model.tokenizer), vocabulary(work.tokenizer), model.programs.vocab_size, work.programs.vocab_size
    )
    data, held = as_data(calibration)
    teacher = _teacher(model, data, options, shared, run_folder(work, "teacher"), progress)
    result = heal(
        work, data, options, objective=objective(work, model, teacher, options, shared), validation=held,
        judge=Response(model.live(), shared=shared), folder=run_folder(work, "distill"), progress=progress,
        label="distilling",
    )  # fmt: skip
    report.update(summary(result) | {"teacher": options.teacher, "shared_ids": shared})


def objective(work: Work, model: TeacherModel, teacher: Teacher, options: DistillOptions, shared: int) -> Objective:
    """What the options ask for."""
    parts: list[tuple[float, Objective]] = []
    if options.response:
        response = Response(
            teacher, direction=options.direction, temperature=options.temperature, beta=options.beta, shared=shared
        )
        parts.append((options.response * (1.0 - options.ce), response))
    if options.ce:
        parts.append((options.ce, CrossEntropy()))
    if options.wants_features:
        ours, theirs = _shape(work.programs), _shape(model.programs)
        layers = layer_map(ours[0], theirs[0])
        if options.hidden or options.attention:
            widths = (ours[1], theirs[1])
            match = FeatureMatch(
                teacher, layers, widths, hidden=options.hidden, attention=options.attention, seed=options.seed
            )
            parts.append((1.0, match))
        if options.wants_relations:
            relations = RelationMatch(
                teacher, layers, distance=options.distance, angle=options.angle, similarity=options.similarity,
                minilm=options.minilm, between=options.between, relation_heads=options.relation_heads,
            )  # fmt: skip
            parts.append((1.0, relations))
    return parts[0][1] if len(parts) == 1 and parts[0][0] == 1.0 else Mix(*parts)


def learns_nothing(options: DistillOptions) -> tuple[str, str] | None:
    """Why such a stage would do nothing, and the remedy."""
    if options.response or options.ce or options.wants_features:
        return None
    return "nothing is to be learned", "Give response, ce, a feature or a relation a weight"


def check_options(work: Work, name: str, fmt: str, options: DistillOptions) -> None:
    """Refuses options that contradict one another; of a row's `check` (`method.Method`)."""
    if options.direction not in DIRECTIONS:
        raise UsageError(f"unknown direction {options.direction!r}", remedy="Use forward, reverse or js")
    if not 0 <= options.ce <= 1:
        raise UsageError(f"ce is {options.ce}, a share of 0 to 1", param="ce")
    if (why := learns_nothing(options)) is not None:
        raise UsageError(why[0], remedy=why[1])
    if options.top_k and options.wants_features:
        raise UnsupportedError(
            "cached logits have no features", remedy="Set top_k to 0, so that the teacher runs", param="top_k"
        )


def _teacher(
    model: TeacherModel, data: Dataset, options: DistillOptions, shared: int, folder: Path, progress: Progress
) -> Teacher:
    live = model.live(features=options.wants_features)
    if not options.top_k:
        return live
    try:
        cached = CachedTeacher(folder, data)
        if cached.serves(live, options.temperature, min(options.top_k, shared)):
            return cached
    except (ConflictError, FormatError):
        pass  # none yet, or another run's: made anew
    write_cache(
        live, data, folder, k=min(options.top_k, shared), temperature=options.temperature, vocab=shared, shared=shared,
        progress=progress,
    )  # fmt: skip
    return CachedTeacher(folder, data)


def _shape(programs: Any) -> tuple[int, int]:
    """(layers, hidden width) of a decoder."""
    ops = programs.programs["step"].ops
    return 1 + max(op.layer for op in ops), next(op for op in ops if op.kind == "embed").outputs[0].width
