"""Running a recipe: checked up front, done unit by unit, resumable after any kill, ended with a proven, judged version.

Knows the order of things; each is a page's own. A run lives in its folder under the model home until it is finished.
"""

import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from inhouse.compress import finish
from inhouse.compress.baseline import comparable, write_baseline
from inhouse.compress.blocks import BlockRunner
from inhouse.compress.budget import Need, check_disk, check_memory, estimate
from inhouse.compress.calibrate import Calibration, Text, calibrate, read_texts
from inhouse.compress.checks import check_shapes
from inhouse.compress.fingerprint import details, fingerprint
from inhouse.compress.gate import Judged, gate
from inhouse.compress.memory import PeakMemory
from inhouse.compress.own_text import OwnText
from inhouse.compress.plan import disk_need, predict
from inhouse.compress.recipe import Recipe
from inhouse.compress.report import Inputs, write_report
from inhouse.compress.runs import RunFolder
from inhouse.compress.speed import measure
from inhouse.compress.stages import StageRun
from inhouse.compress.tensor_facts import spectra, tensor_facts
from inhouse.compress.upfront import check_family, check_files, check_gate, check_stages, check_teachers, check_weights
from inhouse.compress.work import Work
from inhouse.core.errors import CapacityError, ConflictError, NotFoundError, UsageError
from inhouse.core.progress import Progress, silent
from inhouse.load.importer import import_model
from inhouse.load.locate import content_digest, locate
from inhouse.model.spec import ModelSpec
from inhouse.store.home import Home
from inhouse.store.refs import check_name
from inhouse.store.store import Store
from inhouse.store.stored_model import StoredModel

OUT = "out"
BASELINE = "baseline"  # beside OUT: plain rounding, to be compared with
REPORTS = "reports"  # in the model home: a folder for each version
EARLY = ("recipe", "model")  # parts of the fingerprint that are known before anything is opened


@dataclass(frozen=True, slots=True)
class Compressed:
    """What came of it. `ref` is the version in the store; `fresh`: False where the run had been finished before."""

    ref: str
    result: Mapping[str, Any]
    fresh: bool = True

    @property
    def failed(self) -> bool:
        """Whether the gate refused it."""
        return bool(self.result.get("gate") and self.result["gate"]["passed"] is False)

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {"ref": self.ref, "fresh": self.fresh, **self.result}


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run that was checked: nothing of it is done yet, and nothing that can be known before stands against it."""

    work: Work
    recipe: Recipe
    calibration: Calibration | None
    memory: int  # bytes for the activations of a chunk
    need: Need
    print: Mapping[str, Any]
    plan: Mapping[str, Any]


def compress(
    model: str,
    name: str,
    recipe: Recipe,
    *,
    resume: bool | None = None,
    home: Home | None = None,
    searched: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Compressed:
    """Makes a compressed version `name` of a model, by a recipe.

    Args:
        model: name, name:version, name@alias, a folder or a .gguf. name: of the new model in the store.
        resume: True: only go on with an unfinished run; False: forget it and begin anew; None: go on with one of the
            same fingerprint, if there is one.
        searched: what a search that chose the recipe measured (`search.Found.to_dict`), for the report.

    Raises:
        UsageError, UnsupportedError, NotFoundError, CapacityError: it cannot be done as asked, known before it begins.
        ConflictError: an unfinished run of another fingerprint is in the way, or another process works on it.
        CapacityError: the disk is full; what was finished is kept. KeyboardInterrupt leaves a resumable run.
    """
    home = home or Home.find()
    home.create()
    folder = RunFolder(home, check_name(name))
    with folder.held(), PeakMemory() as peak:
        if resume is False:
            folder.restart()
        began = time.time()
        _check_early(folder, model, recipe, home, resume)
        prepared = prepare(model, recipe, folder.path, home, progress)
        with prepared.work:
            done = _finished(folder, prepared.print, home)
            if done is not None:
                return done
            going_on = folder.check_resume(prepared.print, details(recipe, model, prepared.calibration))
            if resume and not going_on:
                raise NotFoundError(
                    f"there is no unfinished run of {name}", remedy="Leave --resume out", param="resume"
                )
            if not going_on:
                _begin(folder, prepared, model)
            return _run(folder, prepared, home, peak, began, searched, progress)


def prepare(
    model: str, recipe: Recipe, folder: Path, home: Home, progress: Progress = silent, own: OwnText | None = None
) -> Prepared:
    """Opens and checks everything that a run needs. The caller closes `work`. `own`: what the model writes itself,
    where several runs share it."""
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    check_files(recipe.gate)
    texts = [text for group, files in recipe.calibration.files.items() for text in read_texts(files, group)]
    work = Work.open(model, folder, home=home)
    try:
        check_weights(work)
        check_family(work, recipe)
        check_shapes(work, recipe)
        check_teachers(work, recipe)
        work.notes += check_stages(work, recipe)
        need = None
        if _samples(work, recipe, texts):  # before an hour of sampling: what it would then be too large for
            need = estimate(work, recipe, min(recipe.calibration.options.length, work.spec.context_length))
            check_memory(need, recipe.ram)
        calibration = _calibration(work, recipe, texts, own or OwnText(model, recipe.threads), progress)
        check_gate(recipe, calibration)
        if need is None:
            need = estimate(work, recipe, calibration.tokens.shape[1] if calibration is not None else None)
        memory = check_memory(need, recipe.ram)
        plan = predict(work, recipe)
        if calibration is not None:
            runner = BlockRunner(work, calibration, folder, memory)
            chunk, dtype = runner.chunks.size, runner.dtype
        else:
            chunk, dtype = 0, ""
        check_disk(folder, disk_need(work, recipe, calibration, plan["bytes"]))
        return Prepared(
            work, recipe, calibration, memory, need, fingerprint(recipe, work, calibration, chunk, dtype), plan
        )
    except BaseException:
        work.close()
        raise


def dry_run(model: str, recipe: Recipe, home: Home | None = None, scratch: Path | None = None) -> dict[str, Any]:
    """What a run would do and take, without doing any of it: sizes, memory, disk, units."""
    import tempfile

    home = home or Home.find()
    with tempfile.TemporaryDirectory(prefix="compress-", dir=scratch) as folder:
        prepared = prepare(model, recipe, Path(folder), home)
        with prepared.work:
            need, print_ = prepared.need, prepared.print
            return {
                "recipe": recipe.summary(), **prepared.plan, "ram_needed": need.least,
                "disk_needed": disk_need(prepared.work, recipe, prepared.calibration, prepared.plan["bytes"]),
                "chunk_sequences": print_["chunk"], "activations": print_["activations"],
                "calibration": prepared.calibration.manifest() | {"texts": len(prepared.calibration.texts)}
                if prepared.calibration is not None else None,
                "notes": prepared.work.notes, "fingerprint": dict(print_),
            }  # fmt: skip


def _check_early(folder: RunFolder, model: str, recipe: Recipe, home: Home, resume: bool | None) -> None:
    """Refuses a journal that belongs to another recipe or model before it is read."""
    there = folder.described()
    if there is None or folder.result() is not None:
        if resume:
            _need_unfinished(folder)
        folder.drop_data()  # of a run that was finished, or killed before it wrote what it is
        return
    now = {"recipe": recipe.hash, "model": content_digest(locate(model, home))}
    then = there.get("fingerprint", {})
    folder.check_resume({**then, **{key: now[key] for key in EARLY}}, details(recipe, model))


def _need_unfinished(folder: RunFolder) -> None:
    if folder.result() is None:
        raise NotFoundError(f"there is no unfinished run of {folder.name}", remedy="Leave --resume out", param="resume")


def _begin(folder: RunFolder, prepared: Prepared, model: str) -> None:
    folder.restart_results()
    folder.begin(
        {
            "name": folder.name, "model": model, "summary": prepared.recipe.summary(),
            "details": details(prepared.recipe, model, prepared.calibration), "fingerprint": dict(prepared.print),
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
    )  # fmt: skip


def _finished(folder: RunFolder, print_: Mapping[str, Any], home: Home) -> Compressed | None:
    """The result of the same run, done before, if its version is still there."""
    there, result = folder.described(), folder.result()
    if there is None or result is None or there.get("fingerprint") != dict(print_):
        return None
    with Store(home) as store:
        try:
            store.catalog.resolve(str(result["ref"]))
        except (NotFoundError, UsageError):
            return None
    return Compressed(str(result["ref"]), result, fresh=False)


def _calibrates(recipe: Recipe) -> bool:
    return any(stage.needs() != {"nothing"} for stage in recipe.stages)


def _samples(work: Work, recipe: Recipe, texts: list[Text]) -> bool:
    """Whether the model has to write its calibration text itself. Raises UsageError for one that writes none."""
    if texts or not _calibrates(recipe):
        return False
    if not isinstance(work.spec, ModelSpec) or work.spec.headless:
        raise UsageError(
            f"{work.spec.family} writes no text to calibrate on", remedy="Give --calibration FILE", param="calibration"
        )
    return True


def _calibration(work: Work, recipe: Recipe, texts: list[Text], own: OwnText, progress: Progress) -> Calibration | None:
    """The rows that any stage needs; of the model's own text where the recipe names none."""
    if not _calibrates(recipe):
        return None
    options = recipe.calibration.options
    if texts:
        return calibrate(texts, work.tokenizer, options, work.spec.context_length)
    return own.rows(options, progress)


def _run(
    folder: RunFolder, prepared: Prepared, home: Home, peak: PeakMemory, began: float,
    searched: Mapping[str, Any] | None, progress: Progress,
) -> Compressed:  # fmt: skip
    work, recipe = prepared.work, prepared.recipe
    for at, stage in enumerate(recipe.stages):
        StageRun(
            work, stage, f"{at}.{stage.kind}", prepared.calibration, prepared.memory, progress, lambda: peak.peak
        ).run()
    out = folder.path / OUT
    told = finish.manifest(recipe, work, prepared.calibration, prepared.print)
    stored, notes = finish.write(work, out, told)
    proven = finish.proof(work, out, prepared.calibration, _may_run(prepared, stored.nbytes), folder.path, progress)
    judged = _inherited(_gate(prepared, folder.path, progress), work.parent, home)
    if judged is None:
        notes.append(f"not measured against its parent: {work.spec.family} is no decoder")
    if judged is not None:
        finish.record_gate(out, judged.report.to_dict())
    with Store(home) as store:
        imported = import_model(
            out, folder.name, store=store, how="move", origin=f"{work.reference} by {recipe.summary()}",
            parent=work.parent, derived=recipe.summary() if work.parent else None, progress=progress,
        )  # fmt: skip
    most = max([peak.peak, *(int(line.get("peak", 0)) for line in work.journal.lines)])
    parameters = sum(math.prod(work.shape(name)) for name in work.names())
    if recipe.ram is not None and most > recipe.ram:
        notes.append(f"memory peaked at {most / 1e9:.2f}GB, above the {recipe.ram / 1e9:.2f}GB that were granted")
    result = {
        "ref": imported.version.ref, "bytes": stored.nbytes, "bits_per_weight": 8 * stored.nbytes / parameters,
        "parameters": parameters, "gate": judged.report.to_dict() if judged is not None else None,
        "proof": {"tensors": proven.tensors, "logits_error": proven.logits_error, "executor": proven.executor},
        "peak_memory": most, "ram": recipe.ram, "seconds": round(time.time() - began, 2),
        "units": {unit: line.get("seconds") for unit, line in work.units().items() if "seconds" in line},
        "fallbacks": told["fallbacks"], "notes": [*work.notes, *notes, *_calibration_notes(prepared)],
        "search": dict(searched) if searched is not None else None,
    }  # fmt: skip
    page = _report(prepared, told, result, judged, stored, home, folder.path, progress)
    result["report"] = str(page)
    folder.finish(result)
    return Compressed(imported.version.ref, result)


def _may_run(prepared: Prepared, nbytes: int) -> bool:
    """Whether opening the written model and running one sequence fits the budget."""
    ram = prepared.recipe.ram
    return ram is None or prepared.need.base + 2 * nbytes + prepared.need.fixed <= ram


def _gate(prepared: Prepared, folder: Path, progress: Progress) -> Judged | None:
    work, recipe = prepared.work, prepared.recipe
    if not isinstance(work.spec, ModelSpec) or work.spec.headless:
        return None
    baseline = None
    if recipe.gate.baseline and recipe.gate.max_kld is not None and comparable(recipe):
        baseline = write_baseline(work, prepared.calibration, prepared.memory, folder / BASELINE, progress)
    try:
        plain = str(baseline.resolve()) if baseline is not None else None
        child = str((folder / OUT).resolve())
        return gate(str(work.described.path), child, recipe, plain, recipe.threads, progress)
    finally:
        shutil.rmtree(folder / BASELINE, ignore_errors=True)


def _inherited(judged: Judged | None, parent: str | None, home: Home) -> Judged | None:
    """A child of a version that failed its gate has failed, too: it was measured beside what nobody may promote."""
    if judged is None or parent is None:
        return judged
    with Store(home) as store:
        if store.catalog.resolve(parent).summary.gate != "failed":
            return judged
    report = judged.report
    reasons = (*report.reasons, f"its parent {parent} failed its own gate")
    return replace(judged, report=replace(report, passed=False, reasons=reasons))


def _report(prepared: Prepared, told: Mapping[str, Any], result: Mapping[str, Any], judged: Judged | None,
            stored: StoredModel, home: Home, folder: Path, progress: Progress) -> Path:  # fmt: skip
    """The page about the version that was just imported, in the model home."""
    work = prepared.work
    speed = None
    if judged is not None and _may_run(prepared, int(result["bytes"])):
        child = locate(str(result["ref"]), home).path
        speed = measure(str(work.described.path), str(child), prepared.recipe.threads)
    source = work.described.source
    with Work.open(str(work.described.path), folder / BASELINE) as original:
        inputs = Inputs(
            f"{result['ref']}, compressed", result, told, tensor_facts(work, original, stored, progress),
            list(spectra(work, original)), judged, speed, sum(source.info(name).nbytes for name in source),
        )  # fmt: skip
    shutil.rmtree(folder / BASELINE, ignore_errors=True)
    return write_report(home.data / REPORTS / str(result["ref"]).replace(":", "-"), inputs)


def _calibration_notes(prepared: Prepared) -> list[str]:
    """What calibration itself, and the inputs that it showed, give reason to say."""
    notes = list(prepared.calibration.notes) if prepared.calibration is not None else []
    dead = {line["unit"].split("/", 1)[1]: line["record"]["dead"] for line in prepared.work.units().values()
            if line.get("record") and line["record"].get("dead")}  # fmt: skip
    if dead:
        most = max(dead, key=lambda name: dead[name])
        notes.append(
            f"{sum(dead.values())} inputs of {len(dead)} linears were 0 throughout (most: {dead[most]} of {most})"
        )
    return notes


__all__ = ["CapacityError", "Compressed", "ConflictError", "Prepared", "compress", "dry_run", "prepare"]
