"""One server on stories260K for all tests of the protocol."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from tests.serve.launch import Running, server


@pytest.fixture(scope="session")
def running(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that holds stories260K (F32) under the name `stories260K-F32`, and no other."""
    home = tmp_path_factory.mktemp("serve")
    with server(home, str(stories / "stories260K-F32.gguf")) as started:
        yield started


@pytest.fixture(scope="session")
def model() -> str:
    return "stories260K-F32"


@pytest.fixture
def client(running: Running) -> Iterator[OpenAI]:
    """The official client, without retries so that errors are seen."""
    with OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def http(running: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, trust_env=False, timeout=60) as http:
        yield http
