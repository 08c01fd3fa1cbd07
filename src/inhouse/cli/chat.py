"""The chat in the terminal: what is typed becomes messages or settings, answers are written as they come.

Knows sessions and a reader of lines; knows nothing of flags. Ctrl-C stops the answer and not the program; Ctrl-D ends.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TextIO

from inhouse.core.errors import ContextLengthError, InhouseError, UsageError
from inhouse.engine.request import SamplingParams
from inhouse.engine.session import Session
from inhouse.engine.text import TextDelta, TextEnd, TextEvent, TextFailed

HELP = """\
/help              this list
/set NAME VALUE    a sampling parameter: temperature, top_p, top_k, min_p, seed, max_tokens, ...
/show              the parameters in force
/system TEXT       the system message (empty: none); begins the conversation anew
/clear             begin the conversation anew
/stats             tokens and speed of the last answer
/bye               end (or Ctrl-D)
\"\"\"                begin and end a message of several lines
Ctrl-C             stop the answer; the program goes on"""

_NUMBERS: dict[str, type] = {
    "temperature": float, "top_p": float, "min_p": float, "typical_p": float, "repetition_penalty": float,
    "presence_penalty": float, "frequency_penalty": float, "top_k": int, "seed": int,
}  # fmt: skip
QUOTES = '"""'
_MAY_BE_NONE = ("seed", "max_tokens")


@dataclass(slots=True)
class Chat:
    """One conversation.

    Args:
        session: the model that answers.
        params: sampling parameters to begin with.
        max_tokens: of an answer; None: what the context leaves.
        system: system message; empty: none.
        raw: continue the text as it is, without template and history.
        adapter: the name of a LoRA adapter that the session has loaded; None: none.
        out: where answers go.
    """

    session: Session
    params: SamplingParams
    max_tokens: int | None = None
    system: str = ""
    raw: bool = False
    adapter: str | None = None
    out: TextIO = field(default_factory=lambda: sys.stdout)
    messages: list[dict[str, Any]] = field(default_factory=list)
    last: str = "nothing answered yet"

    def loop(self, lines: Iterator[str]) -> None:
        """Answers every message that the reader gives until it ends or /bye is typed."""
        for text in lines:
            if not text.strip():
                continue
            try:
                if not text.startswith("/"):
                    self.answer(text)
                elif self._command(text.strip()):
                    return
            except ContextLengthError as error:
                print(f"error: {error.message}. /clear begins the conversation anew", file=sys.stderr)
            except InhouseError as error:
                print(f"error: {error}", file=sys.stderr)
            except KeyboardInterrupt:  # before the first token, or a second time
                print(" [stopped]", file=sys.stderr)

    def answer(self, text: str) -> TextEnd | None:
        """Streams the answer to one message; Ctrl-C ends it early. Returns its end, None if it was stopped.

        Raises what the session raises; the conversation is then as it was.
        """
        said: list[str] = []
        end = None
        began, first = time.monotonic(), 0.0
        try:
            for event in self._events(text):
                if isinstance(event, TextDelta):
                    first = first or time.monotonic()
                    said.append(event.text)
                    self._write(event.text)
                elif isinstance(event, TextEnd):
                    end = event
        except KeyboardInterrupt:
            print(" [stopped]", end="", file=sys.stderr, flush=True)
        except InhouseError:
            if said:
                self._write("\n")
            raise
        self._write("\n")
        if not self.raw:
            self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": "".join(said)}]
        if end is not None:
            self.last = _stats(end, began, first)
        return end

    def _events(self, text: str) -> Iterator[TextEvent]:
        """The events of one answer; leaving early cancels it. Raises the error of a step that failed."""
        events = self.session.stream(self._prompt(text), self.params, self.max_tokens, adapter=self.adapter)
        try:
            for event in events:
                if isinstance(event, TextFailed):
                    raise event.error
                yield event
        finally:
            events.close()  # type: ignore[attr-defined]

    def _write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()

    def _prompt(self, text: str) -> list[int]:
        if self.raw:
            return self.session.prompt_ids(text)
        head = [{"role": "system", "content": self.system}] if self.system else []
        return self.session.chat_ids([*head, *self.messages, {"role": "user", "content": text}])

    def _command(self, line: str) -> bool:
        """Obeys a line that begins with a slash; True ends the chat."""
        name, _, rest = line[1:].partition(" ")
        if name in ("bye", "exit", "quit"):
            return True
        actions: dict[str, Callable[[str], None]] = {
            "help": lambda _: print(HELP),
            "?": lambda _: print(HELP),
            "set": self._set,
            "show": lambda _: print("\n".join(self._parameters())),
            "system": self._set_system,
            "clear": lambda _: self._clear(),
            "stats": lambda _: print(self.last),
        }
        if name not in actions:
            raise UsageError(f"there is no command /{name}", remedy="/help lists them")
        actions[name](rest.strip())
        return False

    def _clear(self) -> None:
        self.messages.clear()
        print("the conversation begins anew")

    def _set_system(self, text: str) -> None:
        self.system = text
        self._clear()

    def _parameters(self) -> Iterator[str]:
        """`name = value` of everything that /set changes."""
        for name in _NUMBERS:
            yield f"{name} = {_shown(getattr(self.params, name))}"
        yield f"max_tokens = {_shown(self.max_tokens)}"

    def _set(self, rest: str) -> None:
        """Raises UsageError for an unknown name, or a value that is none."""
        name, _, text = rest.partition(" ")
        if name != "max_tokens" and name not in _NUMBERS:
            known = ", ".join([*_NUMBERS, "max_tokens"])
            raise UsageError(f"there is no parameter {name!r}", remedy=f"Known: {known}")
        try:
            off = text.strip() == "none" and name in _MAY_BE_NONE
            value: Any = None if off else _NUMBERS.get(name, int)(text)
        except ValueError:
            raise UsageError(f"{text!r} is no value for {name}", remedy="Write /set NAME VALUE") from None
        if name == "max_tokens":
            if value is not None and value < 1:
                raise UsageError(f"max_tokens is {value}, allowed is 1 or more, or none")
            self.max_tokens = value
        else:
            self.params = replace(self.params, **{name: value})
        print(f"{name} = {_shown(value)}")


def _shown(value: float | None) -> str:
    return "none" if value is None else str(value)


def _stats(end: TextEnd, began: float, first: float) -> str:
    usage, timings = end.usage, end.timings
    rate = (usage.completion_tokens - 1) / timings.decode if timings.decode > 0 else 0.0
    return (
        f"{usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached), {usage.completion_tokens} answered, "
        f"first after {max(0.0, first - began):.3f} s, then {rate:.1f} tokens/s; ended by {end.reason}"
    )


def typed_lines(prompt: str = ">>> ") -> Iterator[str]:
    """Messages typed at the terminal, with line editing and history (kept in memory only); \"\"\" spans lines."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.application import get_app
    from prompt_toolkit.filters import Condition
    from prompt_toolkit.history import InMemoryHistory

    is_open = Condition(lambda: quotes_open(get_app().current_buffer.text))
    reader: Any = PromptSession(history=InMemoryHistory(), multiline=is_open, prompt_continuation="... ")
    while True:
        try:
            text: str = reader.prompt(prompt)
        except KeyboardInterrupt:  # at the prompt: drop the line
            continue
        except EOFError:
            return
        yield unquoted(text)


def quotes_open(text: str) -> bool:
    """Whether a message that begins with three quotes still lacks the closing ones."""
    stripped = text.strip()
    return stripped.startswith(QUOTES) and not (len(stripped) >= 2 * len(QUOTES) and stripped.endswith(QUOTES))


def unquoted(text: str) -> str:
    """The message inside three quotes; any other text as it is."""
    stripped = text.strip()
    if not stripped.startswith(QUOTES):
        return text
    return stripped.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")
