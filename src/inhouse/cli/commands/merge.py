"""`inhouse merge`: several models into one, or a LoRA adapter into its base, as a new model of the store."""

from pathlib import Path
from typing import Annotated

import typer

from inhouse.cli.commands import common
from inhouse.cli.output import ProgressBar, print_json, print_note
from inhouse.core.errors import NotFoundError, UsageError

app = common.app()


@app.command(epilog="Example: inhouse merge both --method ties --base qwen --model chat:0.5 --model code:0.5")
def command(
    name: Annotated[str, typer.Argument(metavar="NEW", help="name of the merged model in the store")],
    base: Annotated[str | None, typer.Option(help="float model that adapter or models were tuned from")] = None,
    adapter: Annotated[Path | None, typer.Option(help="a PEFT folder or a GGUF adapter, to merge into --base")] = None,
    max_kld: Annotated[float | None, typer.Option(help="with --adapter: nats a token that logits may drift")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="linear, slerp, task_arithmetic, ties, dare_linear, dare_ties, breadcrumbs or breadcrumbs_ties"
        ),
    ] = None,
    model: Annotated[list[str] | None, typer.Option(help="MODEL:WEIGHT, as often as there are models")] = None,
    density: Annotated[float, typer.Option(help="share of each difference that is kept")] = 1.0,
    gamma: Annotated[float, typer.Option(help="share of the largest entries dropped (breadcrumbs)")] = 0.01,
    scale: Annotated[float, typer.Option("--lambda", help="factor on the merged difference")] = 1.0,
    t: Annotated[float, typer.Option(help="slerp: 0 the base, 1 the model")] = 0.5,
    normalize: Annotated[bool | None, typer.Option(help="divide by the weights; default: as the method does")] = None,
    rescale: Annotated[str, typer.Option(help="DARE: inverse (the paper's), l1 (mergekit's) or none")] = "inverse",
    seed: Annotated[int, typer.Option(help="of what DARE drops")] = 0,
    json: common.Json = False,
) -> None:
    """Writes one model of several, tensor by tensor (--method), or base + adapter (--adapter).

    Refused where vocabularies or shapes differ; with --adapter where the merged logits drift.
    """
    if (method is None) == (adapter is None):
        raise UsageError("--method merges models, --adapter an adapter", remedy="Give one of the two")
    if adapter is not None:
        if base is None or model:
            raise UsageError("an adapter is merged into its --base, and into nothing else", param="base")
        _merge_adapter(name, base, adapter.expanduser(), max_kld, json)
        return
    from inhouse.compress.merge import merge_models, parse_ingredient
    from inhouse.compress.methods.merging import MergeOptions
    from inhouse.store.store import Store

    options = MergeOptions(str(method), density, gamma, scale, t, normalize, rescale, seed)  # type: ignore[arg-type]
    bar = ProgressBar()
    try:
        with Store() as store:
            models = [parse_ingredient(text) for text in model or ()]
            imported = merge_models(base, models, name, options, store=store, progress=bar)
    finally:
        bar.finish()
    if json:
        print_json(imported.version.to_dict() | {"notes": list(imported.notes)})
        return
    print(f"{imported.version.ref}: {imported.version.origin}")
    for note in imported.notes:
        print_note(note)


def _merge_adapter(name: str, base: str, adapter: Path, max_kld: float | None, json: bool) -> None:
    from inhouse.compress.lora_merge import MAX_KLD, merge_adapter, to_dict
    from inhouse.store.store import Store

    if not adapter.exists():
        raise NotFoundError(f"there is no adapter at {adapter}", remedy="Check the path", param="adapter")
    bar = ProgressBar(unit="tensors")
    limit = MAX_KLD if max_kld is None else max_kld
    try:
        with Store() as store:
            merged = merge_adapter(base, adapter, name, store=store, max_kld=limit, progress=bar)
    finally:
        bar.finish()
    if json:
        print_json(to_dict(merged))
        return
    print(
        f"merged {merged.tensors} tensors into {merged.imported.version.ref}: mean KL {merged.kld_mean:.2g} nats from "
        f"adapter and base, likeliest token equal at {merged.top1:.1%}"
    )
