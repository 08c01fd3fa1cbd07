"""Runs store work in forked children, each of which dies by SIGKILL at one of its file-system or catalog steps.

Run as `python kill_driver.py HOME SOURCE ACTION`; prints, one JSON line a child: the step at which it died (null if it
ran to its end) and what the store looked like afterwards. Started as a process of its own because it forks.
"""

import builtins
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apsw

from inhouse.store.home import Home
from inhouse.store.store import Store
from inhouse.store.version import NewVersion, Summary

_CALLS = ("open", "replace", "rename", "link", "unlink", "fsync", "fchmod", "mkdir", "symlink", "rmdir")


class Countdown:
    """Kills the process at the n-th step, before the step is done."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def tick(self, *_: object) -> bool:
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            return call(*args, **kwargs)

        return counted


def arm(steps: int) -> Countdown:
    """Counts the os calls below, each 20 SQLite instructions, and each commit, from now on."""
    countdown = Countdown(steps)
    for name in _CALLS:
        setattr(os, name, countdown.wrap(getattr(os, name)))
    builtins.open = countdown.wrap(builtins.open)

    def hook(db: apsw.Connection) -> None:
        db.set_progress_handler(countdown.tick, 20)
        db.set_commit_hook(countdown.tick)

    apsw.connection_hooks.append(hook)
    return countdown


def act(home: Home, source: Path, action: str) -> None:
    """`add` records a version of the source folder with a view; `remove` forgets the one that is there."""
    with Store(home) as store:
        if action == "remove":
            store.remove("m")
            return
        sources = [(path.name, path) for path in sorted(source.iterdir())]
        added = store.add(NewVersion("m", "gguf", [], Summary()), sources)
        store.folder(added.version)


def child(home: Home, source: Path, action: str, steps: int) -> bool:
    """Whether the child was killed before its end."""
    pid = os.fork()
    if pid == 0:
        arm(steps)
        act(home, source, action)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"the child failed at step {steps}")
    return os.WIFSIGNALED(status)


def state(home: Home) -> dict[str, Any]:
    """The store after a death: its versions, its problems, and what a sweep finds."""
    with Store(home) as store:
        problems = store.check(deep=True)
        versions = [(version.ref, len(version.files)) for version in store.catalog.versions()]
        for version in store.catalog.versions():
            for file in version.files:
                (store.folder(version) / file.path).read_bytes()
        store.sweep(grace_s=0.0)
        blobs = sorted(store.blobs)
        live = sorted(store.catalog.live_blobs())
        return {
            "problems": problems + store.check(deep=True),
            "versions": versions,
            "leftovers": [path.name for path in home.tmp.iterdir()],
            "unswept": [blob for blob in blobs if blob not in live],
            "missing": [blob for blob in live if blob not in blobs],
        }


def main() -> None:
    home, source, action = Home(Path(sys.argv[1]), Path(sys.argv[1]) / "cache"), Path(sys.argv[2]), sys.argv[3]
    steps, killed = 0, True
    while killed:
        if action == "remove":
            act(home, source, "add")
        killed = child(home, source, action, steps)
        print(json.dumps({"step": steps if killed else None} | state(home)), flush=True)
        with Store(home) as store:
            for version in store.catalog.versions():
                store.remove(version.ref)
        steps += 1


if __name__ == "__main__":
    main()
