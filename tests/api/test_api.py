"""The library's face on a real checkpoint, and the text side of the queue."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import inhouse
from inhouse.core.errors import ContextLengthError, NotFoundError, UsageError
from inhouse.engine.request import Event, Finished, FinishReason, Timings, TokenEvent, Usage
from inhouse.engine.text import TextAssembler, TextDelta, TextEnd
from inhouse.model.tokens.tokenizer import Tokenizer

pytestmark = [pytest.mark.native, pytest.mark.realdata]


@pytest.fixture(scope="module")
def engine(stories: Path) -> Iterator[Any]:
    with inhouse.Engine.open(str(stories / "hf"), threads=1) as opened:
        yield opened


def test_generate_gives_golden_text_and_says_why_it_ended(engine: Any, stories: Path) -> None:
    case = next(c for c in json.loads((stories / "golden.json").read_text())["greedy"] if c["prompt"])
    answer = engine.generate(case["prompt"], max_tokens=32, temperature=0)
    assert case["text"].startswith(case["prompt"] + answer.text)
    assert answer.finish_reason == "length"
    assert answer.usage.completion_tokens == 32
    assert str(answer) == answer.text


def test_chat_and_its_stream_agree_and_leaving_a_stream_is_safe(engine: Any) -> None:
    whole = engine.chat("Tell me a story", max_tokens=30, temperature=1, seed=7)
    assert "".join(engine.stream("Tell me a story", max_tokens=30, temperature=1, seed=7)) == whole.text
    for _piece in engine.stream("Tell me a story", max_tokens=400):
        break
    assert (
        engine.chat([{"role": "user", "content": "Tell me a story"}], max_tokens=30, temperature=1, seed=7).text
        == whole.text
    )


def test_errors_are_ours(engine: Any) -> None:
    with pytest.raises(UsageError, match="temperature"):
        engine.chat("hi", temperature=-1)
    with pytest.raises(ContextLengthError):
        engine.generate("a " * 2000)
    with pytest.raises(NotFoundError):
        inhouse.Engine.open("no-such-model")
    with pytest.raises(UsageError, match="threads"):
        inhouse.Engine.open("demo", treads=2)


def test_the_face_is_exactly_what_it_says() -> None:
    assert sorted(inhouse.__all__) == inhouse.__all__
    assert all(hasattr(inhouse, name) for name in inhouse.__all__)
    with pytest.raises(AttributeError):
        inhouse.nothing  # noqa: B018


USAGE, TIMINGS = Usage(1, 1, 0), Timings(0, 0, 0, 0)


def assemble(tokenizer: Tokenizer, tokens: list[int], stops: list[str], include: bool = False) -> tuple[str, TextEnd]:
    """The text of a choice whose tokens come one an event."""
    stopped: list[int] = []
    assembler = TextAssembler(tokenizer, [1, 403], stops, include_stop=include, stop_choice=stopped.append)
    events: list[Event] = [TokenEvent("r", 0, (token,)) for token in tokens]
    events.append(Finished("r", 0, FinishReason.LENGTH, USAGE, TIMINGS, 0, True))
    given = [event for one in events for event in assembler.feed([one])]
    text = "".join(event.text for event in given if isinstance(event, TextDelta))
    end = given[-1]
    assert isinstance(end, TextEnd)
    assert bool(stopped) == (end.reason == "stop")
    return text, end


def test_stop_strings_wherever_they_are_cut(engine: Any) -> None:
    tokenizer = engine._session.tokenizer
    text = " there was a little girl named Lily. She loved"
    tokens = tokenizer.encode("Once" + text, add_special=False)[len(tokenizer.encode("Once", add_special=False)) :]
    plain, end = assemble(tokenizer, tokens, [])
    assert plain == text
    assert end.reason == "length"
    for start in range(len(text) - 1):
        for length in (1, 2, 5):
            stop = text[start : start + length]
            got, end = assemble(tokenizer, tokens, [stop, "never"])
            assert got == text[: text.index(stop)]
            assert (end.reason, end.stop) == ("stop", stop)
            kept, _ = assemble(tokenizer, tokens, [stop], include=True)
            assert kept == text[: text.index(stop)] + stop
    assert assemble(tokenizer, tokens, ["loved by"])[0] == text  # what was withheld comes at the end
