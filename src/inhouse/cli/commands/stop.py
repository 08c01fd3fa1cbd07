"""`inhouse stop`: stop servers, letting running answers finish."""

import os
import signal
import time
from typing import Annotated

import typer

from inhouse.cli.commands.common import Json
from inhouse.cli.commands.common import app as new_app
from inhouse.cli.commands.servers import running
from inhouse.cli.output import print_json
from inhouse.core.errors import NotFoundError, UnavailableError

app = new_app()


@app.command(epilog="Example: inhouse stop --port 8080")
def command(
    port: Annotated[int | None, typer.Option(help="only the server at this port; default: all")] = None,
    wait: Annotated[float, typer.Option(help="seconds to wait for it to end")] = 60.0,
    json: Json = False,
) -> None:
    """Tells servers to finish what runs and end, and waits until they have."""
    chosen = [server for server in running() if port is None or server["port"] == port]
    if not chosen:
        where = f" at port {port}" if port is not None else ""
        raise NotFoundError(f"no server runs{where}", remedy="`inhouse ps` lists them")
    for server in chosen:
        os.kill(server["pid"], signal.SIGTERM)
    end = time.monotonic() + wait
    pids = {server["pid"] for server in chosen}
    while pids & {server["pid"] for server in running()}:
        if time.monotonic() > end:
            raise UnavailableError(f"still finishing after {wait:.0f} s", remedy="Wait, or kill the process")
        time.sleep(0.05)
    if json:
        print_json(chosen)
    else:
        print(f"stopped {', '.join(str(pid) for pid in sorted(pids))}")
