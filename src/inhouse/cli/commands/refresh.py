"""`inhouse refresh`: running servers look again which versions the names they serve mean."""

from typing import Annotated, Any

import typer

from inhouse.cli.commands.common import Json, settings
from inhouse.cli.commands.common import app as new_app
from inhouse.cli.commands.servers import running
from inhouse.cli.output import print_json
from inhouse.core.errors import NotFoundError, UnavailableError

app = new_app()


@app.command(epilog="Example: inhouse refresh --port 8080")
def command(
    port: Annotated[int | None, typer.Option(help="only the server at this port; default: all")] = None,
    api_key: Annotated[str | None, typer.Option(help="the servers' key")] = None,
    json: Json = False,
) -> None:
    """After a new version or a moved alias: servers load it beside the old one and switch; no request fails."""
    chosen = [server for server in running() if port is None or server["port"] == port]
    if not chosen:
        where = f" at port {port}" if port is not None else ""
        raise NotFoundError(f"no server runs{where}", remedy="`inhouse ps` lists them")
    key = settings(api_key=api_key).api_key
    answers = {f"{server['host']}:{server['port']}": _ask(server, key) for server in chosen}
    if json:
        print_json(answers)
        return
    for address, replaced in answers.items():
        changes = ", ".join(f"{one['name']}: {one['before']} -> {one['now']}" for one in replaced)
        print(f"{address}  {changes or 'nothing has changed'}")


def _ask(server: dict[str, Any], key: str) -> list[dict[str, str]]:
    """What a server replaced. Raises UnavailableError with the server's own words."""
    import httpx

    host = "127.0.0.1" if server["host"] in ("0.0.0.0", "") else server["host"]
    host = f"[{host}]" if ":" in host else host
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.post(f"http://{host}:{server['port']}/v1/refresh_models", headers=headers, timeout=600)
        body = answer.json()
    except (httpx.HTTPError, ValueError) as error:
        raise UnavailableError(f"the server at port {server['port']} did not answer: {error}") from None
    if answer.status_code != 200:
        raise UnavailableError(f"the server at port {server['port']} refused: {body['error']['message']}")
    return list(body["replaced"])
