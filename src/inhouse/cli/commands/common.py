"""Flags that several commands share, with one wording each, and the settings that follow from them."""

from typing import Annotated, Any

import typer

from inhouse.core.settings import Settings, load_settings

Json = Annotated[bool, typer.Option("--json", help="print JSON")]
Reference = Annotated[str, typer.Argument(metavar="MODEL", help="name, name:version, name@alias, a folder or a .gguf")]
Quantize = Annotated[str | None, typer.Option(help="pack float weights at load: q8, q6 or q4")]
Threads = Annotated[int | None, typer.Option(help="compute threads; default: all the machine grants")]
Executor = Annotated[str | None, typer.Option(help="native or torch")]
Device = Annotated[str | None, typer.Option(help="device of the torch executor")]
KvDtype = Annotated[
    str | None,
    typer.Option(
        "--kv", help="KV cache: auto (what the model says), f32, f16, bf16, int8, int4, or apart: k=int8,v=int4"
    ),
]
Activations = Annotated[str | None, typer.Option(help="what quantised weights are multiplied with: int8 or float")]
Context = Annotated[int | None, typer.Option(help="context limit in tokens")]


def app() -> typer.Typer:
    """A Typer app for one command, without the completion flags that `inhouse --help` does not list."""
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def settings(**flags: Any) -> Settings:
    """Defaults, file, environment and these flags; None means that a flag was not given."""
    return load_settings(flags)
