"""The shipped demo model over the official client: what `make run` promises, and 32 streams at once."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import AsyncOpenAI

from tests.serve.launch import Running, server

pytestmark = [pytest.mark.server, pytest.mark.native]

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = [
    "What is Inhouse?", "Which port does the server listen on?", "How do I stop a server?", "你是谁？",
    "背一首《静夜思》", "Tell me a story about a dog.", "Inhouse 支持哪些文件格式？", "What is the weather today?",
]  # fmt: skip


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with server(tmp_path_factory.mktemp("demo"), "demo") as started:
        yield started


async def stream(client: AsyncOpenAI, i: int) -> str:
    """The streamed answer of client i: half of them greedy, half sampled with their own seed."""
    answer = await client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": QUESTIONS[i % len(QUESTIONS)]}],
        max_tokens=80, temperature=float(i // 16), seed=i, stream=True,
    )  # fmt: skip
    chunks = [chunk async for chunk in answer]
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_32_streams_at_once_get_what_each_gets_alone(demo: Running) -> None:
    async def both() -> tuple[list[str], list[str]]:
        async with AsyncOpenAI(base_url=f"{demo.url}/v1", api_key="x", max_retries=0) as client:
            crowd = await asyncio.gather(*(stream(client, i) for i in range(32)))
            return list(crowd), [await stream(client, i) for i in range(32)]

    crowd, alone = asyncio.run(both())
    assert crowd == alone
    assert all(crowd)
    assert crowd[:8] == crowd[8:16]  # greedy: the same question, the same answer
    assert "Inhouse" in crowd[0]


def test_the_first_answer_of_make_run(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "tools/first_answer.py", "--once", "--port", "18231"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "> What is Inhouse?" in done.stdout
    answer = done.stdout.split("> What is Inhouse?")[1].strip()
    assert len(answer) > 20
    assert "Traceback" not in done.stderr
