"""`inhouse delta`: a model's next version as a small file, made and applied."""

from pathlib import Path
from typing import Annotated

import typer

from inhouse.cli.commands import common
from inhouse.cli.output import ProgressBar, human_bytes, print_json, print_note

app = common.app()


@app.callback(epilog="Example: inhouse delta make qwen:1 qwen:2 q.delta (both commands take --json)")
def about() -> None:
    """What turns one version of a model into another, a fraction of its size: exact, hashed, applied all or nothing."""


@app.command(epilog="Example: inhouse delta make qwen:1 qwen:2 qwen-1-2.delta")
def make(
    old: Annotated[str, typer.Argument(metavar="OLD", help="the version that receivers have")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="the version that they shall have")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="the delta file to write")],
    lossy: Annotated[bool, typer.Option("--lossy", help="float matrices as base + one bit an element")] = False,
    json: common.Json = False,
) -> None:
    """Writes the file that makes NEW of OLD."""
    from inhouse.load.delta import make as make_delta
    from inhouse.store.store import Store

    bar = ProgressBar()
    try:
        with Store() as store:
            made = make_delta(old, new, file, store=store, lossy=lossy, progress=bar)
    finally:
        bar.finish()
    if json:
        facts = {"file": str(file), "bytes": made.nbytes, "new_bytes": made.new_nbytes, "share": made.share}
        print_json(facts | {"ways": dict(made.ways), "lossy": made.lossy, "note": made.note})
        return
    ways = ", ".join(f"{way} {human_bytes(size)}" for way, size in sorted(made.ways.items(), key=lambda w: -w[1]))
    print(f"{file}: {human_bytes(made.nbytes)}, {made.share:.1%} of {human_bytes(made.new_nbytes)} ({ways})")
    if made.note:
        print_note(made.note)
    if made.lossy:
        print_note("lossy: what it makes is near NEW, not equal; `inhouse eval --reference` tells how near")


@app.command(epilog="Example: inhouse delta apply qwen:1 qwen-1-2.delta qwen")
def apply(
    old: Annotated[str, typer.Argument(metavar="OLD", help="the version that the delta was made from")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="the delta file")],
    name: Annotated[str, typer.Argument(metavar="NEW", help="name of the model that the new version belongs to")],
    json: common.Json = False,
) -> None:
    """Makes the new version and imports it. Another base, or one flipped byte, is refused and changes nothing."""
    from inhouse.load.delta import apply as apply_delta
    from inhouse.store.store import Store

    bar = ProgressBar()
    try:
        with Store() as store:
            imported = apply_delta(old, file, name, store=store, progress=bar)
    finally:
        bar.finish()
    if json:
        print_json(imported.version.to_dict() | {"new": imported.new})
        return
    print(f"{imported.version.ref}: {human_bytes(imported.version.nbytes)}, from {old} and {file.name}")
    for note in imported.notes:
        print_note(note)
