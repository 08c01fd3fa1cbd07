"""`inhouse run`: chat with a model in the terminal, or answer one prompt."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inhouse.cli.commands import common
from inhouse.cli.output import ProgressBar, print_json, print_note
from inhouse.core.errors import UsageError

if TYPE_CHECKING:
    from inhouse.cli.chat import Chat
    from inhouse.engine.text import TextEnd

ADAPTER = "adapter"  # what the one of the command line is called
STOPPED = 130  # exit status of a program that Ctrl-C ended

app = common.app()


@app.command(epilog='Example: inhouse run demo "What is Inhouse?"')
def command(
    model: common.Reference,
    prompt: Annotated[str | None, typer.Argument(help="one message; left out: stdin, or a chat at a terminal")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="continue the text as it is, without the chat template")] = False,
    system: Annotated[str, typer.Option(help="system message")] = "",
    temperature: Annotated[float | None, typer.Option(help="0: greedy")] = None,
    top_p: Annotated[float | None, typer.Option(help="keep the likeliest tokens of this share")] = None,
    top_k: Annotated[int | None, typer.Option(help="keep the k likeliest tokens")] = None,
    seed: Annotated[int | None, typer.Option(help="equal seed and prompt give an equal answer")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="longest answer; default: what the context leaves")] = None,
    adapter: Annotated[Path | None, typer.Option(help="LoRA adapter: a PEFT folder or a GGUF adapter")] = None,
    quantize: common.Quantize = None,
    threads: common.Threads = None,
    executor: common.Executor = None,
    device: common.Device = None,
    kv_dtype: common.KvDtype = None,
    context: common.Context = None,
    json: common.Json = False,
) -> None:
    """Chats with a model (/help lists what can be typed), or answers one prompt given as argument or on stdin."""
    settings = common.settings(
        quantize=quantize, threads=threads, executor=executor, device=device, kv_dtype=kv_dtype, context=context,
        max_sequences=1,
    )  # fmt: skip
    interactive = prompt is None and sys.stdin.isatty() and sys.stdout.isatty()
    if json and interactive:
        raise UsageError("--json needs a prompt", remedy="Give it as an argument or on stdin")
    if raw and system:
        raise UsageError("--raw has no system message", remedy="Write it into the prompt", param="system")
    if prompt is None and not interactive:
        prompt = _read_stdin()
    if not interactive and not raw and not (prompt or "").strip():
        raise UsageError("the prompt is empty", remedy="Write one, or --raw to begin from nothing", param="prompt")
    from inhouse.cli.chat import Chat, typed_lines
    from inhouse.engine.session import Session

    with Session.open(model, settings, ProgressBar()) as session:
        for note in session.model.report.notes:
            print_note(note)
        given: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
        params = replace(session.defaults, **{k: v for k, v in given.items() if v is not None})
        if adapter is not None:
            session.load_adapter(ADAPTER, adapter.expanduser())
        chat = Chat(session, params, max_tokens, system, raw, None if adapter is None else ADAPTER)
        if interactive:
            print(f"{session.name}: type a message, /help for help, Ctrl-D to end")
            chat.loop(typed_lines())
            return
        end = _answer_json(chat, prompt or "") if json else chat.answer(prompt or "")
        if end is None:
            sys.exit(STOPPED)


def _read_stdin() -> str:
    """The prompt that is piped in, less its last line end. Raises UsageError if it is empty or no text."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"stdin is no UTF-8 text: {error}", param="prompt") from None
    text = text.removesuffix("\n").removesuffix("\r")
    if not text.strip():
        raise UsageError("there is no prompt: stdin is empty", remedy="Give one as an argument", param="prompt")
    return text


def _answer_json(chat: "Chat", prompt: str) -> "TextEnd | None":
    """One answer with its usage as JSON; None if it was stopped."""
    import io

    chat.out = io.StringIO()
    end = chat.answer(prompt)
    usage = None if end is None else end.usage
    print_json(
        {
            "text": chat.out.getvalue()[:-1],
            "finish_reason": "cancelled" if end is None else end.reason,
            "prompt_tokens": usage and usage.prompt_tokens,
            "completion_tokens": usage and usage.completion_tokens,
            "seed": None if end is None else end.seed,
        }
    )
    return end
