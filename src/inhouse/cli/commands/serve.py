"""`inhouse serve`: serve models over the OpenAI protocol."""

import logging
from typing import Annotated

import typer

from inhouse.cli.commands import common
from inhouse.cli.commands.servers import run_folder
from inhouse.cli.output import ProgressBar

app = common.app()


@app.command(epilog="Example: inhouse serve demo --port 8080")
def command(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="names, folders or .gguf files")],
    host: Annotated[str | None, typer.Option(help="address to listen on; beyond loopback a key is needed")] = None,
    port: Annotated[int | None, typer.Option(help="port to listen on")] = None,
    api_key: Annotated[str | None, typer.Option(help="key that clients must send; better: $INHOUSE_API_KEY")] = None,
    quantize: common.Quantize = None,
    threads: common.Threads = None,
    executor: common.Executor = None,
    device: common.Device = None,
    kv_dtype: common.KvDtype = None,
    activations: common.Activations = None,
    context: common.Context = None,
    kv_memory: Annotated[str | None, typer.Option(help="memory for the KV cache, such as 2GiB")] = None,
    max_sequences: Annotated[int | None, typer.Option(help="sequences that decode together")] = None,
    max_queue: Annotated[int | None, typer.Option(help="requests that may wait")] = None,
    step_tokens: Annotated[int | None, typer.Option(help="tokens computed in one step")] = None,
    prefix_cache: Annotated[bool | None, typer.Option(help="share computed prefixes between requests")] = None,
    adapters: Annotated[str | None, typer.Option(help="LoRA adapters: name=path,name=path")] = None,
    adapter_folder: Annotated[str | None, typer.Option(help="folder that clients may load adapters from")] = None,
    metrics_prefix: Annotated[str | None, typer.Option(help="inhouse: or vllm:")] = None,
    cors_origins: Annotated[str | None, typer.Option(help="origins browsers may call from")] = None,
    drain_seconds: Annotated[int | None, typer.Option(help="how long answers may finish after SIGTERM")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error")] = None,
) -> None:
    """Serves models at /v1 until SIGTERM or Ctrl-C; answers that run then are finished first."""
    settings = common.settings(
        host=host, port=port, api_key=api_key, quantize=quantize, threads=threads, executor=executor, device=device,
        kv_dtype=kv_dtype, activations=activations, context=context, kv_memory=kv_memory,
        max_sequences=max_sequences, max_queue=max_queue,
        step_tokens=step_tokens, prefix_cache=prefix_cache, adapters=adapters, adapter_folder=adapter_folder,
        metrics_prefix=metrics_prefix,
        cors_origins=cors_origins, drain_seconds=drain_seconds, log_level=log_level,
    )  # fmt: skip
    logging.basicConfig(level=settings.log_level.upper(), format="%(levelname)s:     %(message)s")
    from inhouse.serve.server import run  # a second of imports, not needed for --help

    run(models, settings, run_folder(), ProgressBar())
