"""Our own OpenAPI document, tested by schemathesis against the running server: no body, however odd, gives a 5xx.

One check is left out: `positive_data_acceptance`. A schema cannot say that a token id must be in the vocabulary, or
that a prompt must fit the context, so some bodies that fit the document are refused, with a 400 that says why.
"""

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.serve.launch import Running

pytestmark = [pytest.mark.server, pytest.mark.native, pytest.mark.realdata]


def test_schemathesis_finds_nothing(running: Running, tmp_path: Path) -> None:
    command = [
        str(Path(sys.executable).parent / "schemathesis"), "run", f"{running.url}/openapi.json",
        "--phases", "examples,coverage,fuzzing", "--max-examples", "20", "--seed", "1", "--no-color",
        "--request-timeout", "60", "--exclude-checks", "positive_data_acceptance",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "14 selected / 14 total" in done.stdout
    assert "Traceback" not in running.log.read_text()


def test_the_document_names_every_route(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    assert set(paths) == {
        "/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/{name}", "/health", "/ready", "/metrics",
        "/v1/embeddings", "/v1/rerank", "/v1/score", "/classify", "/v1/load_lora_adapter", "/v1/unload_lora_adapter",
        "/v1/refresh_models",
    }  # fmt: skip
