"""Starts the real server as a process on a free port, for tests; the client side is whatever the test brings."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


class Running(NamedTuple):
    """A server that is ready."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path


@contextmanager
def server(home: Path, *arguments: str, seconds: float = 60.0, **environment: str) -> Iterator[Running]:
    """`inhouse serve ARGUMENTS` on a port of the system's choice, stopped at the end whatever happens."""
    home.mkdir(parents=True, exist_ok=True)
    log = home / "server.log"
    env = {k: v for k, v in os.environ.items() if not k.startswith("INHOUSE_")}
    env |= {"INHOUSE_HOME": str(home), "HF_HUB_OFFLINE": "1"} | environment
    if "INHOUSE_NATIVE_LIB" in os.environ:
        env["INHOUSE_NATIVE_LIB"] = os.environ["INHOUSE_NATIVE_LIB"]
    command = [sys.executable, "-m", "inhouse", "serve", *arguments, "--port", "0"]
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
    try:
        yield Running(_wait(home, process, log, seconds), process, log)
    finally:
        process.terminate()
        try:
            process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(home: Path, process: subprocess.Popen[bytes], log: Path, seconds: float) -> str:
    import httpx

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, f"the server ended: {log.read_text()}"
        for file in (home / "run").glob(f"{process.pid}.json"):
            url = "http://127.0.0.1:{port}".format(**json.loads(file.read_text()))
            try:
                if httpx.get(f"{url}/ready", trust_env=False).status_code == 200:
                    return url
            except httpx.TransportError:
                pass
        time.sleep(0.05)
    raise AssertionError(f"the server was not ready after {seconds} s: {log.read_text()}")
