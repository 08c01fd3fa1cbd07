"""`inhouse list`: the models in the store."""

from typing import Any

from inhouse.cli.commands.common import Json
from inhouse.cli.commands.common import app as new_app
from inhouse.cli.output import human_bytes, human_count, print_json, print_table

app = new_app()


@app.command(epilog="Example: inhouse list --json")
def command(json: Json = False) -> None:
    """The models in the store, with their versions and aliases. The embedded `demo` needs no import."""
    from inhouse.store.store import Store

    with Store() as store:
        versions, aliases = store.catalog.versions(), store.catalog.aliases()
    if json:
        print_json({"models": [version.to_dict() for version in versions], "aliases": aliases})
        return
    if not versions:
        print("The store is empty. `inhouse import PATH` brings a model in; `inhouse run demo` works at once.")
        return
    rows: list[dict[str, Any]] = [
        {
            "model": version.ref,
            "family": version.summary.family,
            "parameters": human_count(version.summary.parameters),
            "type": version.summary.dtype,
            "size": human_bytes(version.nbytes),
            "context": version.summary.context,
            "aliases": ", ".join(version.aliases) or "-",
            "created": version.created[:16].replace("T", " "),
        }
        for version in versions
    ]
    print_table(rows, list(rows[0]))
