"""`inhouse import`: bring a model into the store."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from inhouse.cli.commands.common import Json
from inhouse.cli.commands.common import app as new_app
from inhouse.cli.output import ProgressBar, human_bytes, human_count, print_json, print_note
from inhouse.core.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from inhouse.load.importer import Imported
    from inhouse.store.blobs import How

app = new_app()


@app.command(epilog="Example: inhouse import ./qwen --name qwen")
def command(
    path: Annotated[Path, typer.Argument(help="a model folder, a .gguf, or a .safetensors with its config beside it")],
    name: Annotated[str | None, typer.Option(help="name in the store; default: the folder's or file's own")] = None,
    link: Annotated[
        bool, typer.Option("--link", help="share the files instead of copying; editing them then damages the model")
    ] = False,
    parent: Annotated[str | None, typer.Option(help="model of the store that this one was made of")] = None,
    how: Annotated[str | None, typer.Option(help="in a few words, how it was made of the parent")] = None,
    json: Json = False,
) -> None:
    """Checks a model whole (names, shapes, numbers, tokenizer, template) and brings it in as a new version.

    A model that fails a check leaves the store as it was; the error names what is wrong.
    """
    from inhouse.load.importer import import_model
    from inhouse.store.store import Store

    if how is not None and parent is None:
        raise UsageError("--how needs --parent", remedy="Name the model that this one was made of", param="how")
    path = path.expanduser()
    if not path.exists():  # before a store is made
        raise NotFoundError(f"there is no file or folder {path}", remedy="Check the path")
    bar = ProgressBar()
    try:
        with Store() as store:
            kind: How = "link" if link else "copy"
            imported = import_model(path, name, store=store, how=kind, parent=parent, derived=how, progress=bar)
    finally:
        bar.finish()
    report(imported, json)


def report(imported: "Imported", as_json: bool) -> None:
    """Says what a model became: the version on stdout, what was noticed on stderr."""
    version = imported.version
    if as_json:
        more = {"new": imported.new, "left_out": list(imported.left_out), "notes": list(imported.notes)}
        print_json(version.to_dict() | more)
        return
    for note in imported.notes:
        print_note(note)
    if imported.left_out:
        print_note(f"not part of the model, left out: {', '.join(imported.left_out)}")
    summary = version.summary
    what = f"{summary.family}, {human_count(summary.parameters)} parameters, {summary.dtype}"
    verb = "imported" if imported.new else "already there:"
    print(f"{verb} {version.ref} ({what}, {human_bytes(version.nbytes)})")
