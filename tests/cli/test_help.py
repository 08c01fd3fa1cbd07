"""Help: at once, whole, and true."""

import os
import resource
import subprocess
import sys

import pytest

from inhouse.cli.main import COMMANDS
from tests.cli.program import PROGRAM, done, inhouse

pytestmark = pytest.mark.null

HEAVY = ("numpy", "typer", "pydantic", "torch", "inhouse.engine", "inhouse.load", "inhouse.store", "inhouse.serve")
PRINTS_NO_DATA = ("serve",)
NAMES = [command.name for command in COMMANDS]


def imported(*arguments: str) -> set[str]:
    """The modules that a command imports."""
    command = [sys.executable, "-X", "importtime", *PROGRAM[1:], *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line for line in ended.stderr.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[1].strip() for line in lines[1:]}


def loads(modules: set[str], names: tuple[str, ...]) -> list[str]:
    return sorted(m for m in modules if m.startswith(tuple(f"{name}." for name in names)) or m in names)


def test_help_answers_in_a_fifth_of_a_second() -> None:
    modules = imported("--help")
    assert loads(modules, HEAVY) == []
    assert len(modules) < 120
    spent = []
    for _ in range(3):  # CPU time, not wall time: other processes are not ours
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*PROGRAM, "--help"], stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.2


def test_help_lists_every_command_with_what_it_does() -> None:
    text = done("--help")
    for command in COMMANDS:
        assert f"  {command.name} " in text
        assert command.help in text
    assert inhouse().returncode == 2
    assert inhouse().stdout == text


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_help_with_an_example_and_json(name: str) -> None:
    modules = imported(name, "--help")
    assert loads(modules, ("numpy", "torch", "inhouse.engine", "inhouse.load", "uvicorn", "prompt_toolkit")) == []
    text = done(name, "--help")
    assert f"Example: inhouse {name}" in text
    assert ("--json" in text) == (name not in PRINTS_NO_DATA)
    assert done("help", name) == text


@pytest.mark.parametrize("command", COMMANDS, ids=NAMES)
def test_examples_of_the_table_name_their_command(command: object) -> None:
    assert isinstance(command, tuple)
    assert command[2].startswith(f"inhouse {command[0]}")


def test_the_version_is_told() -> None:
    assert done("--version").startswith("inhouse ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("lst",), "did you mean list?"),
        (("frobnicate",), "`inhouse --help` lists them"),
        (("list", "--jsno"), "--json"),
        (("run",), "MODEL"),
        (("run", "demo", "hi", "--temperature", "warm"), "--temperature"),
        (("run", "demo", "hi", "--quantize", "q5"), "'q8', 'q6', 'q4'"),
        (("run", "demo", "hi", "--raw", "--system", "x"), "--raw has no system message"),
        (("run", "demo"), "stdin is empty"),
        (("show", "demo", "--program", "--tensors"), "--program and --tensors"),
        (("import", "x", "--how", "cut"), "--parent"),
        (("pull", "not a name"), "OWNER/NAME"),
    ],
)
def test_wrong_usage_says_what_is_wrong_on_stderr_and_exits_with_2(arguments: tuple[str, ...], said: str) -> None:
    ended = inhouse(*arguments)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


def test_settings_that_are_unknown_are_refused_with_a_hint() -> None:
    ended = inhouse("run", "demo", "hi", environment={"INHOUSE_THREAD": "2"})
    assert ended.returncode == 2
    assert "INHOUSE_THREADS" in ended.stderr


@pytest.mark.parametrize("arguments", [("--help",), ("list", "--help")])
def test_a_reader_that_has_seen_enough_ends_it_quietly(arguments: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run([*PROGRAM, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (0, "")
