"""`inhouse ps`: servers that run on this machine."""

import time

from inhouse.cli.commands.common import Json
from inhouse.cli.commands.common import app as new_app
from inhouse.cli.commands.servers import running
from inhouse.cli.output import human_seconds, print_json, print_table

app = new_app()


@app.command(epilog="Example: inhouse ps --json")
def command(json: Json = False) -> None:
    """The servers that run on this machine under this model home, with their models and addresses."""
    servers = list(running())
    if json:
        print_json(servers)
        return
    if not servers:
        print("No server runs. `inhouse serve MODEL` starts one.")
        return
    rows = [
        {
            "pid": server["pid"],
            "address": f"http://{server['host']}:{server['port']}",
            "models": ", ".join(server["models"]),
            "up": human_seconds(max(0.0, time.time() - server["started"])),
        }
        for server in servers
    ]
    print_table(rows, list(rows[0]))
