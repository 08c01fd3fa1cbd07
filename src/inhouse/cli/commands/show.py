"""`inhouse show`: what a model is."""

from typing import Annotated

import typer

from inhouse.cli.commands import common
from inhouse.cli.output import human_bytes, print_json, print_note, print_pairs, print_table
from inhouse.core.errors import UsageError

app = common.app()


@app.command(epilog="Example: inhouse show demo --program")
def command(
    model: common.Reference,
    program: Annotated[bool, typer.Option("--program", help="the Programs that the executor would run")] = False,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="every weight: layout, bytes as stored, exact zeros")
    ] = False,
    quantize: common.Quantize = None,
    context: common.Context = None,
    json: common.Json = False,
) -> None:
    """Shows a model: shapes, files, formats, lineage, aliases, context, licence; its Programs; its tensors.

    Reads headers and the tokenizer; weights for --tensors alone.
    """
    from inhouse.cli.facts import fact_lines, facts, open_headers, program_facts, program_text, tensor_rows

    if program and tensors:
        raise UsageError("--program and --tensors are two answers", remedy="Ask for one of them")
    settings = common.settings(quantize=quantize, context=context)
    with open_headers(model, settings.quantize or None, settings.context or None) as opened:
        if json:
            asked = program_facts(opened.programs) if program else None
            print_json(asked or (tensor_rows(opened) if tensors else facts(opened)))
            return
        for note in opened.plan.notes:
            print_note(note)
        if program:
            print(program_text(opened.programs))
        elif tensors:
            rows = [row | {"shape": "x".join(map(str, row["shape"]))} for row in tensor_rows(opened)]
            print_table(rows, ["name", "shape", "layout", "bytes", "zeros", "source", "stored"])
        else:
            found = facts(opened)
            print_pairs(fact_lines(found))
            print()
            print_table([file | {"bytes": human_bytes(file["bytes"])} for file in found["files"]], ["path", "bytes"])
