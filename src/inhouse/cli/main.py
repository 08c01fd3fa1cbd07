"""The command `inhouse`: one table of commands; a command's module is imported only when it is named.

So `inhouse --help` costs a Python start and no more.
"""

import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from inhouse.core.errors import InhouseError, UsageError


class Command(NamedTuple):
    """One row: `inhouse NAME` runs the Typer app `app` of `inhouse.cli.commands.MODULE`."""

    name: str
    help: str
    example: str
    module: str


COMMANDS: tuple[Command, ...] = (
    Command(
        "import", "bring a model into the store: a folder or a .gguf", "inhouse import ./qwen --name qwen", "import_"
    ),
    Command("pull", "fetch a model from a hub and import it", "inhouse pull Qwen/Qwen2.5-0.5B-Instruct", "pull"),
    Command("list", "the models in the store", "inhouse list", "list_"),
    Command("show", "what a model is: shapes, files, lineage, Program", "inhouse show demo --program", "show"),
    Command("rm", "remove a model or a version", "inhouse rm qwen:1", "rm"),
    Command("alias", "point a name such as qwen@prod at a version", "inhouse alias qwen@prod qwen:2", "alias"),
    Command("run", "chat with a model in the terminal", "inhouse run demo", "run"),
    Command("serve", "serve models over the OpenAI protocol", "inhouse serve demo --port 8080", "serve"),
    Command("ps", "servers that run on this machine", "inhouse ps", "ps"),
    Command("stop", "stop a server, letting running answers finish", "inhouse stop", "stop"),
    Command("refresh", "let servers look again which versions their names mean", "inhouse refresh", "refresh"),
    Command("eval", "perplexity, and divergence from a reference", "inhouse eval demo --text book.txt", "eval_"),
    Command("export", "a model as files for other programs", "inhouse export demo --to gguf demo.gguf", "export"),
    Command(
        "merge",
        "several models into one, or an adapter into its base",
        "inhouse merge kind --base qwen --adapter ./kind",
        "merge",
    ),
    Command(
        "compress",
        "a smaller version of a model, measured and gated",
        "inhouse compress qwen qwen-small --to q4",
        "compress",
    ),
    Command("delta", "a model's next version as a small file", "inhouse delta make qwen:1 qwen:2 q.delta", "delta"),
    Command("bench", "speed on this machine, beside its limits", "inhouse bench demo", "bench"),
)


def usage() -> str:
    """The text of `inhouse --help`, made from the table."""
    width = max(len(c.name) for c in COMMANDS)
    lines = [
        "Run large language models on your own machines, offline, end to end.",
        "",
        "Usage: inhouse COMMAND [ARGUMENTS]     (inhouse COMMAND --help tells the rest)",
        "",
        *(f"  {c.name:<{width}}  {c.help}" for c in COMMANDS),
        "",
        "Begin with: inhouse run demo",
    ]
    return "\n".join(lines)


def own_version() -> str:
    """The installed version, `0+source` when run from a source tree."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("inhouse")
    except PackageNotFoundError:
        return "0+source"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command and exits with its status; every InhouseError becomes one readable message."""
    args = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a character shows its code
            stream.reconfigure(errors="backslashreplace")
    try:
        status = _dispatch(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status)


def _dispatch(args: list[str]) -> int:
    """The exit status of a command line."""
    if len(args) == 2 and args[0] == "help":
        args = [args[1], "--help"]
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if args else 2
    if args[0] in ("-V", "--version", "version"):
        print(f"inhouse {own_version()}")
        return 0
    row = next((c for c in COMMANDS if c.name == args[0]), None)
    return _unknown(args[0]) if row is None else _run(row, args[1:])


def _unknown(name: str) -> int:
    import difflib

    near = difflib.get_close_matches(name, [c.name for c in COMMANDS], 1)
    hint = f"did you mean {near[0]}?" if near else "`inhouse --help` lists them"
    print(f"error: there is no command {name!r}; {hint}", file=sys.stderr)
    return UsageError.exit_code


def _run(row: Command, args: list[str]) -> int:
    """The exit status of a command."""
    import typer

    as_json = "--json" in args
    app: typer.Typer = importlib.import_module(f"inhouse.cli.commands.{row.module}").app
    command = typer.main.get_command(app)
    try:
        return int(command.main(args, prog_name=f"inhouse {row.name}", standalone_mode=False) or 0)
    except InhouseError as error:
        _report(error, as_json)
        return error.exit_code
    except SystemExit as error:  # the parser's own way with a broken pipe; main has a better one
        if isinstance(error.__context__, BrokenPipeError):
            raise error.__context__ from None
        raise
    except Exception as error:
        status = _usage_fault(error, as_json)
        if status is None:
            raise
        return status


def _usage_fault(error: Exception, as_json: bool) -> int | None:
    """Shows what the argument parser has to say and gives its exit status; None: the error is not the parser's."""
    show, message = getattr(error, "show", None), getattr(error, "format_message", None)
    if show is not None and message is not None:
        if as_json:
            _report(UsageError(message()), as_json)
        else:
            show()
        return int(getattr(error, "exit_code", UsageError.exit_code))
    if type(error).__name__ in ("Abort", "Exit"):
        return int(getattr(error, "exit_code", 130))
    return None


def _report(error: InhouseError, as_json: bool) -> None:
    """Writes an error to stderr: as JSON where the caller reads JSON, else cause and remedy on two lines."""
    sys.stdout.flush()
    if as_json:
        import json

        print(json.dumps({"error": error.to_dict()}), file=sys.stderr)
        return
    print(f"error: {error.message}", file=sys.stderr)
    if error.remedy:
        print(f"  {error.remedy}", file=sys.stderr)
