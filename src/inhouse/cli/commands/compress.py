"""`inhouse compress`: a smaller version of a model, by a recipe, measured and gated."""

from pathlib import Path
from typing import Annotated, Any

import typer

from inhouse.cli.commands import common
from inhouse.cli.output import ProgressBar, human_bytes, human_seconds, print_json, print_note, print_table
from inhouse.core.errors import NotFoundError, UsageError

app = common.app()


@app.command(epilog="Example: inhouse compress qwen qwen-small --to q4 --calibration texts/*.txt --ram 4GB")
def command(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="name, name:version, folder or .gguf")] = None,
    name: Annotated[str | None, typer.Argument(metavar="NEW", help="name of the new model in the store")] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML recipe (see docs/compression.md)")] = None,
    to: Annotated[str | None, typer.Option(help="recipe by name: q8, q6, q5, q4, q3, q2, fp8, nf4, ...")] = None,
    target_size: Annotated[
        str | None, typer.Option(help="search for the best recipe of that size, such as 1.2GB")
    ] = None,
    max_kld: Annotated[float | None, typer.Option(help="search for the smallest recipe of that divergence")] = None,
    calibration: Annotated[list[str] | None, typer.Option(help="text to calibrate on (files, globs; repeat)")] = None,
    ram: Annotated[str | None, typer.Option(help="memory that may be used, such as 4GB")] = None,
    threads: common.Threads = None,
    resume: Annotated[bool, typer.Option("--resume", help="only go on with an unfinished run or search")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="forget an unfinished run and begin anew")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what it would do and take")] = False,
    runs: Annotated[bool, typer.Option("--runs", help="list run folders")] = False,
    clean: Annotated[str | None, typer.Option(metavar="NEW", help="remove the run folder of that name")] = None,
    json: common.Json = False,
) -> None:
    """Makes a compressed version of a model. A run that was stopped goes on when the same command is given again."""
    if runs or clean is not None:
        _runs(clean, json)
        return
    if model is None or (name is None and not dry_run):
        raise UsageError("name the model and the new model", remedy="inhouse compress MODEL NEW --to q4", param="NEW")
    if sum(given is not None for given in (recipe, to, target_size, max_kld)) != 1:
        raise UsageError("give one of --recipe FILE, --to NAME, --target-size and --max-kld", param="recipe")
    if resume and restart:
        raise UsageError("--resume and --restart exclude each other", param="resume")
    from inhouse.compress import pipeline
    from inhouse.compress.asked import asked_recipe
    from inhouse.compress.units import units_of

    searched, again = None, True if resume else False if restart else None
    if target_size is not None or max_kld is not None:
        if dry_run or name is None:
            raise UsageError("a search measures, so it has no --dry-run", param="dry_run")
        chosen, searched = _search(model, name, target_size, max_kld, calibration or [], ram, threads, again)
        again = False if restart else None  # what was resumed may have been the search: then the run begins now
    else:
        if recipe is not None and not recipe.is_file():
            raise NotFoundError(f"there is no recipe {recipe}", remedy="Check the path", param="recipe")
        chosen = asked_recipe(recipe, to, calibration or [], ram, threads)
    if dry_run:
        _dry(pipeline.dry_run(model, chosen), json)
        return
    assert name is not None
    bar = ProgressBar(units=units_of(chosen))
    try:
        done = pipeline.compress(model, name, chosen, resume=again, searched=searched, progress=bar)
    except KeyboardInterrupt:
        bar.finish()
        print_note("stopped; what is finished is kept, the same command goes on")
        raise
    finally:
        bar.finish()
    _show(done, json)
    if done.failed:
        raise typer.Exit(1)


def _search(
    model: str, name: str, size: str | None, kld: float | None, texts: list[str], ram: str | None, threads: int | None,
    resume: bool | None,
) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    """The recipe that keeps the limit best, and what was measured."""
    from inhouse.compress.asked import search_recipe
    from inhouse.compress.units import STAGES

    bar = ProgressBar(unit="recipes", units={name: unit for name, unit in STAGES.items() if name != "search"})
    try:
        found = search_recipe(model, name, size, kld, texts, ram, threads, bar, resume)
    finally:
        bar.finish()
    print_note(f"{len(found.measured)} recipes measured; best: {found.best.name}, {human_bytes(found.best.nbytes)}, "
               f"KL {found.best.kld:.5f}")  # fmt: skip
    return found.recipe, found.to_dict()


def _show(done: Any, json: bool) -> None:
    if json:
        print_json(done.to_dict())
        return
    from inhouse.compress.fallbacks import grouped

    result = done.result
    for note in [*result["notes"], *grouped(result["fallbacks"])]:
        print_note(note)
    was = "" if done.fresh else "was there already: "
    print(
        f"{was}{done.ref}  {human_bytes(result['bytes'])}, {result['bits_per_weight']:.2f} bits a weight, "
        f"{human_seconds(result['seconds'])}, memory peaked at {human_bytes(result['peak_memory'])}"
    )
    found = result["gate"]
    if found is not None:
        limit = "" if found["max_kld"] is None else f" (limit {found['max_kld']:g})"
        word = {True: "gate passed", False: "gate FAILED", None: "measured"}[found["passed"]]
        print(
            f"{word}: KL {found['kld_mean']:.5f} nats a token{limit}, same top-1 {found['top1']:.2%}, perplexity "
            f"{found['perplexity']:.4f} (before {found['reference_perplexity']:.4f}), on {found['text']}"
        )
        for reason in found.get("reasons", ()):
            print_note(reason)
    if result.get("report"):
        print(f"report: {result['report']}")


def _dry(plan: dict[str, Any], json: bool) -> None:
    if json:
        print_json(plan)
        return
    about = "" if plan["exact"] else "about "
    print(f"{plan['recipe']}: {about}{human_bytes(plan['bytes'])}, {plan['bits_per_weight']:.2f} bits a weight")
    print(f"memory needed: about {human_bytes(plan['ram_needed'])}; disk: about {human_bytes(plan['disk_needed'])}")
    for fmt, count in plan["formats"].items():
        print(f"  {fmt:<12} {count} weights")


def _runs(clean: str | None, json: bool) -> None:
    from inhouse.compress.runs import clean_run, list_runs
    from inhouse.store.home import Home

    home = Home.find()
    if clean is not None:
        print(f"removed {human_bytes(clean_run(home, clean))}")
        return
    found = [run.to_dict() for run in list_runs(home)]
    if json:
        print_json(found)
    else:
        names = {"name": "name", "state": "state", "model": "model", "recipe": "recipe", "units": "units done",
                 "nbytes": "on disk", "began": "began"}  # fmt: skip
        shown = [
            {names[key]: human_bytes(one) if key == "nbytes" else one for key, one in run.items()} for run in found
        ]
        print_table(shown, list(names.values()))
