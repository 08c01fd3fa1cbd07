"""serve, ps and stop know one another through the model home."""

import json
import os
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.cli.program import PROGRAM, here
from tests.serve.launch import server

pytestmark = [pytest.mark.native, pytest.mark.realdata, pytest.mark.server]


@pytest.fixture
def home() -> Path:
    """The model home of this test, whose servers `ps` and `stop` see."""
    return Path(os.environ["INHOUSE_HOME"])


def test_a_server_is_seen_reached_and_stopped(stories: Path, home: Path) -> None:
    assert here("ps").stdout.startswith("No server runs.")
    with server(home, str(stories / "stories260K-Q4_0.gguf")) as running:
        (entry,) = json.loads(here("ps", "--json").stdout)
        assert running.url == f"http://{entry['host']}:{entry['port']}"
        assert (entry["pid"], len(entry["models"])) == (running.process.pid, 1)
        assert running.url in here("ps").stdout
        assert f"serving {entry['models'][0]} at {running.url}/v1" in running.log.read_text()

        taken = here("serve", str(stories / "hf"), "--port", str(entry["port"]))
        assert (taken.returncode, "Address already in use" in taken.stderr) == (4, True)
        assert here("stop", "--port", "1").returncode == 3

        with subprocess.Popen([*PROGRAM, "stop", "--json"], stdout=subprocess.PIPE) as stop:
            out, _ = stop.communicate(timeout=60)
        assert (stop.returncode, json.loads(out)) == (0, [entry])
        assert running.process.wait(30) == 0
    assert json.loads(here("ps", "--json").stdout) == []
    assert here("stop").returncode == 3


def test_stop_lets_a_running_answer_finish(stories: Path, home: Path) -> None:
    body = {"model": "stories260K-F32", "prompt": "Once upon a time", "max_tokens": 300, "stream": True,
            "temperature": 0, "ignore_eos": True}  # fmt: skip
    with server(home, str(stories / "stories260K-F32.gguf")) as running:
        url = f"{running.url}/v1/completions"
        with httpx.stream("POST", url, json=body, timeout=60, trust_env=False) as response:
            lines = response.iter_lines()
            next(line for line in lines if line)
            with subprocess.Popen([*PROGRAM, "stop"], stdout=subprocess.DEVNULL) as stop:
                rest = [line for line in lines if line]
                assert stop.wait(60) == 0
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert running.process.wait(30) == 0


def test_files_of_servers_that_died_are_swept(home: Path) -> None:
    folder = home / "run"
    folder.mkdir(parents=True)
    dead = subprocess.Popen(["true"])
    dead.wait()
    entry = {"pid": dead.pid, "host": "127.0.0.1", "port": 1, "models": ["x"], "started": 1}
    (folder / f"{dead.pid}.json").write_text(json.dumps(entry))
    (folder / f"{os.getpid()}.json").write_text(json.dumps(entry | {"pid": os.getpid()}))  # a pid used again
    (folder / "damaged.json").write_text("{")
    assert json.loads(here("ps", "--json").stdout) == []
    assert list(folder.iterdir()) == []


def test_listening_beyond_this_machine_needs_a_key(stories: Path) -> None:
    refused = here("serve", str(stories / "hf"), "--host", "0.0.0.0", "--port", "0")
    assert refused.returncode == 2
    assert "--api-key" in refused.stderr
