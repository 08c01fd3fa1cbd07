"""`inhouse pull`: fetch a model from a hub and import it."""

from typing import Annotated

import typer

from inhouse.cli.commands.common import Json
from inhouse.cli.commands.common import app as new_app
from inhouse.cli.commands.import_ import report
from inhouse.cli.output import ProgressBar

app = new_app()


@app.command(epilog="Example: inhouse pull Qwen/Qwen2.5-0.5B-Instruct")
def command(
    model: Annotated[
        str, typer.Argument(metavar="[HUB:]OWNER/NAME[:TAG][@REVISION]", help="HUB: hf or modelscope; TAG: a GGUF")
    ],
    name: Annotated[str | None, typer.Option(help="name in the store; default: the repository's own")] = None,
    json: Json = False,
) -> None:
    """Fetches a model, checks it whole and brings it in; called again after a failure, it goes on where it stopped.

    Honours HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, MODELSCOPE_ENDPOINT and MODELSCOPE_API_TOKEN.
    """
    from inhouse.load.pull import pull
    from inhouse.store.store import Store

    bar = ProgressBar()
    try:
        with Store() as store:
            pulled = pull(model, name, store=store, progress=bar)
    finally:
        bar.finish()
    report(pulled, json)
