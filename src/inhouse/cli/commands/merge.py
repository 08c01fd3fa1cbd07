"""`inhouse merge`: a LoRA adapter into its base, as a new model of the store."""

from pathlib import Path
from typing import Annotated

import typer

from inhouse.cli.commands import common
from inhouse.cli.output import ProgressBar, print_json
from inhouse.core.errors import NotFoundError

app = common.app()


@app.command(epilog="Example: inhouse merge kind --base qwen --adapter ./kind-lora")
def command(
    name: Annotated[str, typer.Argument(metavar="NEW", help="name of the merged model in the store")],
    base: Annotated[str, typer.Option(help="float model that the adapter was trained on: name or folder")],
    adapter: Annotated[Path, typer.Option(help="a PEFT folder or a GGUF adapter")],
    max_kld: Annotated[float | None, typer.Option(help="nats a token that its logits may drift")] = None,
    json: common.Json = False,
) -> None:
    """Writes base + adapter as one model. Refused where the merged logits drift from those of adapter and base."""
    from inhouse.compress.lora_merge import MAX_KLD, merge_adapter, to_dict
    from inhouse.store.store import Store

    if not adapter.expanduser().exists():
        raise NotFoundError(f"there is no adapter at {adapter}", remedy="Check the path", param="adapter")
    bar = ProgressBar(unit="tensors")
    limit = MAX_KLD if max_kld is None else max_kld
    try:
        with Store() as store:
            merged = merge_adapter(base, adapter.expanduser(), name, store=store, max_kld=limit, progress=bar)
    finally:
        bar.finish()
    if json:
        print_json(to_dict(merged))
        return
    print(
        f"merged {merged.tensors} tensors into {merged.imported.version.ref}: mean KL {merged.kld_mean:.2g} nats from "
        f"adapter and base, likeliest token equal at {merged.top1:.1%}"
    )
