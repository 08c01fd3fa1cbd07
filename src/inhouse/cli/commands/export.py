"""`inhouse export`: a model as files that other programs read."""

from pathlib import Path
from typing import Annotated

import typer

from inhouse.cli.commands.common import Json, Reference, Threads
from inhouse.cli.commands.common import app as new_app
from inhouse.cli.output import ProgressBar, human_bytes, print_json, print_note
from inhouse.core.errors import UsageError

app = new_app()


@app.command(epilog="Example: inhouse export qwen --to gguf --type q4_k_m qwen-q4.gguf")
def command(
    model: Reference,
    out: Annotated[Path, typer.Argument(help="file (gguf, onnx) or folder to make; it must not exist")],
    to: Annotated[str, typer.Option(help="safetensors, gguf, gptq, awq, compressed-tensors, onnx or lora")],
    kind: Annotated[
        str, typer.Option("--type", help="of the weights, e.g. bf16, q4_k_m, int4; default: as stored")
    ] = "",
    base: Annotated[str | None, typer.Option(help="with --to lora: the model that this one was tuned from")] = None,
    rank: Annotated[int, typer.Option(help="with --to lora: of each adapter matrix")] = 16,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Writes a model for other programs; weights that the form can hold as they are keep every bit.

    Whatever changes is listed, tensor by tensor; what the form cannot express is an error.
    """
    if (to == "lora") != (base is not None):
        raise UsageError("--base and --to lora go together", param="base")
    if base is not None:
        _adapter(model, base, out.expanduser(), rank, json)
        return
    from inhouse.load.export import export_model

    bar = ProgressBar(unit="weights")
    try:
        report = export_model(model, to, out.expanduser(), wish=kind.lower(), threads=threads, progress=bar)
    finally:
        bar.finish()
    if json:
        print_json(report.to_dict())
        return
    for note in report.notes:
        print_note(note)
    by_note: dict[str, list[str]] = {}
    for tensor in report.fallbacks:
        by_note.setdefault(f"{tensor.became}: {tensor.note}", []).append(tensor.name)
    for note, names in by_note.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        print_note(f"{', '.join(names[:3])}{more} became {note}")
    exact = sum(tensor.exact for tensor in report.tensors)
    size = human_bytes(report.nbytes)
    print(f"exported {report.path} ({report.format}, {size}; {exact} of {len(report.tensors)} tensors exact)")


def _adapter(model: str, base: str, out: Path, rank: int, json: bool) -> None:
    """The difference to the base as a LoRA adapter."""
    from inhouse.compress.lora_extraction import extract_adapter
    from inhouse.store.store import Store

    bar = ProgressBar(unit="tensors")
    try:
        with Store() as store:
            made = extract_adapter(base, model, out, rank, store=store, progress=bar)
    finally:
        bar.finish()
    if json:
        print_json(
            {"path": str(made.folder), "matrices": made.matrices, "worst": made.worst, "left_out": made.left_out}
        )
        return
    if made.left_out:
        print_note(
            f"{len(made.left_out)} tensors differ that an adapter of linears cannot carry: {made.left_out[0]} .."
        )
    print(f"{made.folder}: {made.matrices} matrices of rank {rank}, at most {made.worst:.1%} of a difference left out")
