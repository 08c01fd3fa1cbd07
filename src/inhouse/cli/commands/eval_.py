"""`inhouse eval`: perplexity of a text, and divergence from a reference model."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from inhouse.cli.commands import common
from inhouse.cli.output import ProgressBar, print_json, print_note
from inhouse.core.errors import NotFoundError, UsageError

app = common.app()


@app.command(epilog="Example: inhouse eval mine --text book.txt --reference mine:1 --protocol window:512")
def command(
    model: common.Reference,
    text: Annotated[Path, typer.Option(help="UTF-8 text to score (.gz too)")],
    reference: Annotated[str | None, typer.Option(help="model to compare with: KL divergence, top-1 agreement")] = None,
    protocol: Annotated[str, typer.Option(help="stories, full, or window:N (see docs/commands.md)")] = "full",
    quantize: common.Quantize = None,
    threads: common.Threads = None,
    executor: common.Executor = None,
    device: common.Device = None,
    kv_dtype: common.KvDtype = None,
    activations: common.Activations = None,
    context: common.Context = None,
    force: Annotated[
        bool, typer.Option("--force", help="even a text that the model was calibrated or healed on")
    ] = False,
    json: common.Json = False,
) -> None:
    """Scores a text. Flags for quantize and executor hold for MODEL; the reference runs as it is."""
    from inhouse.compress.evaluate import documents, evaluate
    from inhouse.compress.seen import refuse_seen
    from inhouse.engine.session import Session

    content = read_text(text)
    warning = refuse_seen(model, documents(content, protocol), force)
    if warning is not None:
        print_note(f"{warning}; the figures flatter it")
    shared = {"threads": threads, "context": context, "max_sequences": 1}
    use = common.settings(
        quantize=quantize,
        executor=executor,
        device=device,
        kv_dtype=kv_dtype,
        activations=activations,
        **shared,
    )
    bar = ProgressBar()
    with ExitStack() as stack:
        session = stack.enter_context(Session.open(model, use, bar))
        session.need_decoder("perplexity")
        other = None
        if reference is not None:
            other = stack.enter_context(Session.open(reference, common.settings(**shared), bar))
            other.need_decoder("perplexity")
        counter = ProgressBar(unit="tokens")
        result = evaluate(session, content, protocol, other, counter)
        counter.finish()
        kind, kept = session.model.executor.name, session.model.executor.kv_dtype
    if json:
        print_json(result.to_dict() | {"model": model, "reference": reference, "executor": kind, "kv_dtype": kept})
        return
    print(f"perplexity  {result.perplexity:.4f}  over {result.tokens} tokens, protocol {protocol}, {kind}, KV {kept}")
    if reference is not None:
        print(f"reference   {result.reference_perplexity:.4f}")
        print(f"KL mean     {result.kld_mean:.6f} nats a token, 99th percentile {result.kld_p99:.6f}")
        print(f"same top-1  {result.top1:.2%}")


def read_text(path: Path) -> str:
    """The text of a file, gzipped or not. Raises NotFoundError, UsageError."""
    import gzip

    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
    except FileNotFoundError:
        raise NotFoundError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise UsageError(f"cannot read {path} as UTF-8 text: {error}") from error
