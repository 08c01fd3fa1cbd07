"""The chat on a real terminal: typed at by a test, with real control keys."""

import re
from pathlib import Path

import pytest

from inhouse.cli.chat import quotes_open, unquoted
from tests.cli.program import terminal

pytestmark = [pytest.mark.native, pytest.mark.realdata]
UP, ENTER, CTRL_C, CTRL_D = "\x1b[A", "\r", "\x03", "\x04"


def test_a_conversation(stories: Path) -> None:
    model = str(stories / "hf")
    with terminal("run", model, "--temperature", "0", "--max-tokens", "24") as screen:
        screen.wait(r"type a message, /help for help, Ctrl-D to end")
        screen.wait(r">>>")
        screen.type("Once upon a time" + ENTER)
        screen.wait(r"Once upon a time\s")
        first = screen.wait(r">>>")
        assert len(re.findall("[a-z]+", first)) > 5

        screen.type("/stats" + ENTER)
        assert "24 answered" in screen.wait(r"ended by length")
        screen.type("/show" + ENTER)
        assert "temperature = 0.0" in screen.wait(r"max_tokens = 24")
        screen.type("/help" + ENTER)
        screen.wait(r"/system TEXT")
        screen.wait(r">>>")

        screen.type(UP + UP + UP + UP + ENTER)  # /help, /show, /stats, the first message
        screen.wait(r"Once upon a time\s")
        second = screen.wait(r">>>")
        assert second.strip() != first.strip()  # the history was part of the prompt

        screen.type("/clear" + ENTER)
        screen.wait(r"begins anew")
        screen.wait(r">>>")
        screen.type("Once upon a time" + ENTER)
        screen.wait(r"Once upon a time\s")
        assert screen.wait(r">>>").split() == first.split()  # and now it was not

        screen.type(CTRL_D)
        assert screen.exit_status() == 0


def test_settings_are_changed_and_faults_explained(stories: Path) -> None:
    with terminal("run", str(stories / "hf"), "--max-tokens", "4") as screen:
        screen.wait(r">>>")
        for line, answer in (
            ("/set temperature 0.25", r"temperature = 0\.25"),
            ("/set seed 7", r"seed = 7"),
            ("/set seed none", r"seed = none"),
            ("/set top_p 3", r"error: top_p is 3"),
            ("/set warmth 3", r"there is no parameter 'warmth'"),
            ("/set top_k many", r"'many' is no value for top_k"),
            ("/set max_tokens 0", r"max_tokens is 0"),
            ("/set max_tokens 600", r"max_tokens = 600"),
            ("hello", r"the context holds 512\. Shorten|the context holds 512\. /clear"),
            ("/nonsense", r"there is no command /nonsense"),
            ("/system Be brief.", r"begins anew"),
        ):
            screen.type(line + ENTER)
            screen.wait(re.escape(line) + r"\s")
            screen.wait(answer)
            screen.wait(r">>>")
        screen.type("/bye" + ENTER)
        assert screen.exit_status() == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(stories: Path) -> None:
    with terminal("run", str(stories / "hf"), "--temperature", "0") as screen:
        screen.wait(r">>>")
        screen.type("dropped" + CTRL_C)  # at the prompt it drops the line
        screen.wait(r"dropped\s")
        screen.wait(r">>>")
        for _ in range(5):  # an answer may be over before the key comes
            screen.type("Tell me a story" + ENTER)
            screen.wait(r"a story\s+\S+\s")
            screen.type(CTRL_C)
            stopped = "[stopped]" in screen.wait(r">>>")
            if stopped:
                break
            screen.type("/clear" + ENTER)
            screen.wait(r"begins anew\s")
            screen.wait(r">>>")
        assert stopped
        screen.type("/stats" + ENTER)
        screen.wait(r"answered")
        screen.wait(r">>>")
        screen.type(CTRL_D)
        assert screen.exit_status() == 0


def test_three_quotes_begin_and_end_a_message_of_several_lines(stories: Path) -> None:
    with terminal("run", str(stories / "hf"), "--raw", "--temperature", "0", "--max-tokens", "2") as screen:
        screen.wait(r">>>")
        screen.type('"""One day' + ENTER)
        screen.wait(r"\.\.\.")
        screen.type("Lily saw" + ENTER + '"""' + ENTER)
        screen.wait(r'Lily saw\s+\.\.\. """\s')
        screen.wait(r">>>")
        screen.type("/stats" + ENTER)
        told = screen.wait(r"2 answered")
        assert int(re.findall(r"(\d+) prompt tokens", told)[0]) > 5
        screen.wait(r">>>")
        screen.type(CTRL_D)
        assert screen.exit_status() == 0


@pytest.mark.parametrize(
    ("text", "is_open", "message"),
    [
        ("plain", False, "plain"),
        ('say """x', False, 'say """x'),
        ('"""', True, ""),
        ('"""""', True, '""'),
        ('"""one"""', False, "one"),
        ('"""one\n two\n"""', False, "one\n two"),
        ('  """\none', True, "one"),
    ],
)
def test_quotes(text: str, is_open: bool, message: str) -> None:
    assert quotes_open(text) is is_open
    assert unquoted(text) == message
