"""The server's life: crowds, SIGTERM, a second server on the same port, a model file cut off under it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from tests.serve.launch import Running, server

pytestmark = [pytest.mark.server, pytest.mark.native, pytest.mark.realdata]

CROWD = 32


def stream_text(client: OpenAI, model: str, prompt: str, seed: int) -> str:
    """The joined text of a streamed completion; every odd seed samples, every even one is greedy."""
    stream = client.completions.create(
        model=model, prompt=prompt, max_tokens=40, stream=True, seed=seed, temperature=float(seed % 2)
    )
    return "".join(chunk.choices[0].text for chunk in stream if chunk.choices)


def test_a_crowd_gets_what_each_gets_alone(client: OpenAI, model: str) -> None:
    words = "Once upon a time there was a little girl who loved to play outside with her big red ball".split()
    prompts = [" ".join(words[: 2 + i % 15]) for i in range(CROWD)]
    with ThreadPoolExecutor(CROWD) as pool:
        crowd = list(pool.map(lambda i: stream_text(client, model, prompts[i], i), range(CROWD)))
    alone = [stream_text(client, model, prompts[i], i) for i in range(CROWD)]
    assert crowd == alone
    assert len(set(crowd)) > CROWD // 2


def test_sigterm_lets_running_answers_finish_and_refuses_new_ones(stories: Path, tmp_path: Path) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": True, "temperature": 0}
    with server(tmp_path, str(stories / "stories260K-F32.gguf")) as started:
        with httpx.Client(base_url=started.url, trust_env=False, timeout=60) as http:
            expected = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
            with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
                lines = answer.iter_lines()
                first = next(lines)
                started.process.send_signal(signal.SIGTERM)
                rest = [line for line in lines if line.startswith("data: ")]
        assert rest[-1] == "data: [DONE]"
        events = [json.loads(line[6:]) for line in [first, *rest[:-1]]]
        assert "".join(event["choices"][0]["text"] for event in events) == expected
        assert started.process.wait(timeout=30) == 0
        assert not list((tmp_path / "run").glob("*.json"))


def test_a_port_in_use_is_told_at_once(running: Running, stories: Path, tmp_path: Path) -> None:
    port = running.url.rsplit(":", 1)[1]
    done = subprocess.run(
        [sys.executable, "-m", "inhouse", "serve", str(stories / "stories260K-F32.gguf"), "--port", port],
        capture_output=True, text=True, timeout=60, env=os.environ | {"INHOUSE_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 4
    assert port in done.stderr
    assert "Traceback" not in done.stderr


def test_another_host_needs_a_key(stories: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "inhouse", "serve", str(stories / "stories260K-F32.gguf"), "--host", "0.0.0.0"],
        capture_output=True, text=True, timeout=60, env=os.environ | {"INHOUSE_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 2
    assert "--api-key" in done.stderr


def test_a_file_cut_off_under_the_server_ends_requests_not_the_process(stories: Path, tmp_path: Path) -> None:
    """The packed cache is what a running server maps; cut off, it must not kill the process."""
    copy = tmp_path / "model.gguf"
    shutil.copy(stories / "stories260K-F32.gguf", copy)
    body = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
    home = tmp_path / "home"
    with server(home, str(copy)):
        pass  # makes the cache; the next start maps it
    with server(home, str(copy)) as started, httpx.Client(base_url=started.url, trust_env=False, timeout=60) as http:
        assert http.post("/v1/completions", json=body).status_code == 200
        mapped = [line.split()[-1] for line in Path(f"/proc/{started.process.pid}/maps").read_text().splitlines()]
        packs = {Path(name) for name in mapped if name.startswith(str(home)) or name == str(copy)}
        assert packs, "the server maps no file of ours"
        for pack in packs:
            os.truncate(pack, 0)
        answer = http.post("/v1/completions", json=body | {"prompt": "Another prompt"})
        assert answer.status_code in (500, 503)
        assert answer.json()["error"]["message"]
        assert started.process.poll() is None
        assert http.get("/health").status_code == 200
        _eventually(lambda: http.get("/ready").status_code == 503, lambda: http.post("/v1/completions", json=body))


def _eventually(true: object, meanwhile: object, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < end
        meanwhile()  # type: ignore[operator]


def test_metrics_under_both_prefixes(stories: Path, tmp_path: Path, http: httpx.Client) -> None:
    http.post("/v1/completions", json={"prompt": "Once", "max_tokens": 4})
    ours = http.get("/metrics").text
    assert 'inhouse:request_success_total{engine="0",finished_reason="length",model_name="stories260K-F32"}' in ours
    assert "inhouse:time_to_first_token_seconds_bucket" in ours
    with (
        server(tmp_path, str(stories / "stories260K-F32.gguf"), "--metrics-prefix", "vllm:") as started,
        httpx.Client(base_url=started.url, trust_env=False) as other,
    ):
        other.post("/v1/completions", json={"prompt": "Once", "max_tokens": 4, "n": 2})
        text = other.get("/metrics").text
    values = {line.rpartition(" ")[0].split("{")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines()
              if line and not line.startswith("#") and "_bucket" not in line}  # fmt: skip
    assert values["vllm:prompt_tokens_total"] == 2  # BOS and one piece, once for both choices
    assert values["vllm:generation_tokens_total"] == 8
    assert values["vllm:e2e_request_latency_seconds_count"] == 1
    assert values["vllm:kv_cache_usage_perc"] >= 0
