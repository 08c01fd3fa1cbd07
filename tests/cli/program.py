"""The real program as a process, and as a process on a terminal of its own."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress

from inhouse.cli.main import main

PROGRAM = (sys.executable, "-m", "inhouse")
# Ours is a terminal that says nothing when it is asked where the cursor is.
_TERMINAL = {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
_ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[a-zA-Z]|[=>]|\][^\x07]*\x07)")


def inhouse(
    *arguments: str, stdin: str | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs `inhouse ARGUMENTS` to its end; without `stdin` it reads nothing."""
    return subprocess.run(
        [*PROGRAM, *arguments],
        input=stdin if stdin is not None else "",
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        env=os.environ | dict(environment or {}),
    )


def done(*arguments: str, stdin: str | None = None) -> str:
    """What a command that must succeed prints on stdout."""
    ended = inhouse(*arguments, stdin=stdin)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def here(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The same as `inhouse`, in this process: for commands of which only what they say and do matters."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 0
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


class Terminal:
    """A program on a terminal: what it shows, and keys that are typed."""

    def __init__(self, fd: int, pid: int) -> None:
        self._fd, self._pid, self._shown, self._seen = fd, pid, "", 0

    def type(self, keys: str) -> None:
        """Types keys; \\r is Enter, \\x03 Ctrl-C, \\x04 Ctrl-D."""
        os.write(self._fd, keys.encode())

    def wait(self, wanted: str, seconds: float = 60.0) -> str:
        """Everything shown since the last wait up to and with `wanted`, a regular expression, without escapes."""
        end = time.monotonic() + seconds
        while True:
            text = _ESCAPES.sub("", self._shown)
            found = re.compile(wanted).search(text, self._seen)
            if found:
                before, self._seen = text[self._seen : found.end()], found.end()
                return before
            assert time.monotonic() < end, f"{wanted!r} was not shown: {text[self._seen :]!r}"
            self._read(0.1)

    def exit_status(self, seconds: float = 30.0) -> int:
        """The exit status, once the program has ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._pid = 0
                return os.waitstatus_to_exitcode(status)
            self._read(0.05)
        raise AssertionError(f"the program did not end: {self._shown[-500:]!r}")

    def close(self) -> None:
        """Ends the program whatever it does."""
        if self._pid:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        os.close(self._fd)

    def _read(self, seconds: float) -> None:
        if select.select([self._fd], [], [], seconds)[0]:
            with suppress(OSError):  # the program has closed its end
                self._shown += os.read(self._fd, 65536).decode("utf-8", "replace")


@contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    """`inhouse ARGUMENTS` on a terminal."""
    process, fd = _spawn([*PROGRAM, *arguments], os.environ | _TERMINAL)
    shown = Terminal(fd, process)
    try:
        yield shown
    finally:
        shown.close()


def _spawn(command: list[str], environment: dict[str, str]) -> tuple[int, int]:
    """(process id, our end of its terminal). The child leads a session whose terminal it is, so Ctrl-C reaches it."""
    ours, theirs = pty.openpty()
    script = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", script, *command],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        start_new_session=True,
        close_fds=True,
    )
    os.close(theirs)
    process.returncode = 0  # waited for by Terminal
    return process.pid, ours
