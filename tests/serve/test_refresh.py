"""The next version, as a delta, into a server that is answering a crowd: no request fails, and from the refresh on the
answers are those of the new version."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.load.checkpoints import Arrays, change, copy_hf
from tests.serve.launch import server

pytestmark = [pytest.mark.server, pytest.mark.native, pytest.mark.realdata]

BODY = {"model": "m@prod", "prompt": "Once upon a time", "max_tokens": 24, "temperature": 0, "ignore_eos": True}


def test_a_delta_goes_live_under_load(stories: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "inhouse", *arguments]
        environment = os.environ | {"INHOUSE_HOME": str(home)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120).stdout

    edited = change(copy_hf(stories, tmp_path / "edited"), _swap_layers)
    run("import", str(stories / "hf"), "--name", "m")
    run("delta", "make", "m:1", str(edited), str(tmp_path / "m.delta"))
    run("alias", "m@prod", "m:1")
    with server(home, "m@prod") as started:
        answers: list[tuple[int, str]] = []
        done = threading.Event()
        clients = [threading.Thread(target=_ask_until, args=(started.url, done, answers)) for _ in range(4)]
        for client in clients:
            client.start()
        assert json.loads(run("refresh", "--json")).popitem()[1] == []  # nothing has changed yet
        applied = json.loads(run("delta", "apply", "m:1", str(tmp_path / "m.delta"), "m", "--json"))
        run("alias", "m@prod", applied["ref"])
        ((_, replaced),) = json.loads(run("refresh", "--json")).items()
        assert replaced == [{"name": "m@prod", "before": "m:1", "now": "m:2"}]
        begun = len(answers)
        while len(answers) < begun + 8:
            time.sleep(0.05)
        done.set()
        for client in clients:
            client.join()
        assert {status for status, _ in answers} == {200}
        texts = list(dict.fromkeys(text for _, text in answers))
        assert len(texts) == 2  # of the old version, then of the new one
        assert [text for _, text in answers[-4:]] == [texts[1]] * 4
        with httpx.Client(base_url=started.url, trust_env=False, timeout=60) as http:
            assert http.get("/v1/models").json()["data"][0]["version"] == 2
            time.sleep(6)  # the old version is closed by now
            assert http.post("/v1/completions", json=BODY).json()["choices"][0]["text"] == texts[1]


def _swap_layers(arrays: Arrays) -> None:
    """Another model of the same shape."""
    a, b = "model.layers.1.mlp.down_proj.weight", "model.layers.3.mlp.down_proj.weight"
    arrays[a], arrays[b] = arrays[b], arrays[a]


def _ask_until(url: str, done: threading.Event, answers: list[tuple[int, str]]) -> None:
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
        while not done.is_set():
            answer = http.post("/v1/completions", json=BODY)
            body = answer.json()
            answers.append((answer.status_code, body["choices"][0]["text"] if answer.status_code == 200 else str(body)))
