"""`inhouse alias`: point a name such as `qwen@prod` at a version."""

from typing import Annotated

import typer

from inhouse.cli.commands.common import Json
from inhouse.cli.commands.common import app as new_app
from inhouse.cli.output import print_json

app = new_app()


@app.command(epilog="Example: inhouse alias qwen@prod qwen:2")
def command(
    alias: Annotated[str, typer.Argument(help="name@word, or a name of its own")],
    model: Annotated[
        str | None, typer.Argument(help="the version it shall mean; left out: take the alias away")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="even at a version that failed its gate")] = False,
    json: Json = False,
) -> None:
    """Points an alias at a version, or takes it away. Servers started later follow it."""
    from inhouse.store.store import Store

    with Store() as store:
        store.catalog.set_alias(alias, model, force=force)
        aliases = store.catalog.aliases()
    if json:
        print_json(aliases)
    else:
        print(f"{alias} -> {aliases[alias]}" if model else f"{alias} is gone")
