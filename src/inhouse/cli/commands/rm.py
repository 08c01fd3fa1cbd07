"""`inhouse rm`: remove a model or one version of it."""

from typing import Annotated

import typer

from inhouse.cli.commands.common import Json
from inhouse.cli.commands.common import app as new_app
from inhouse.cli.output import human_bytes, print_json

app = new_app()


@app.command(epilog="Example: inhouse rm qwen:1")
def command(
    model: Annotated[str, typer.Argument(help="name (all its versions) or name:version")],
    force: Annotated[bool, typer.Option("--force", help="also if an alias or a child version needs it")] = False,
    json: Json = False,
) -> None:
    """Removes a model, or one version of it, and frees what only it used."""
    from inhouse.load.cache import forget_packs
    from inhouse.store.store import Store

    with Store() as store:
        removed, swept = store.remove(model, force=force)
        gone = {version.digest for version in removed} - store.catalog.live_digests()
        packs = sum(forget_packs(store.home.packs, digest) for digest in gone)
    refs, freed = [version.ref for version in removed], packs + (swept.nbytes if swept else 0)
    if json:
        print_json({"removed": refs, "freed_bytes": freed})
    else:
        print(f"removed {', '.join(refs)}; {human_bytes(freed)} freed")
