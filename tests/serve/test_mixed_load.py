"""A T5, a BERT and stories260K in one server: translations, vectors and streams at the same time for eight seconds, and
for ten minutes as a soak. Every answer is that of the same request alone; memory, threads and files do not grow."""

import gzip
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.families.seq2seq import save_tiny
from tests.load.sentences import TEXTS, Original, add_modules
from tests.serve.launch import Running, server
from tests.serve.mixed_load import HANG_UP, Body, Load, Request

pytestmark = [pytest.mark.server, pytest.mark.native, pytest.mark.torch, pytest.mark.realdata]

MEBI = 1 << 20
SOURCES = ["The house is wonderful.", "A dog runs far away", "Where is the cat that sat on the mat?", "Good morning!"]
OPENINGS = ["Once upon a time", "Once upon a time there was a little girl", "Tom had a big red ball. He", "The dog"]


@pytest.fixture(scope="module")
def holding(realdata: Path, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One server with three models of three kinds: `t5`, `mini`, `stories260K-Q8_0`."""
    root = tmp_path_factory.mktemp("models")
    save_tiny("flan-t5", root / "t5", vocab_size=32128, scale=0.3, num_decoder_layers=2)
    vocabulary = realdata / "tokenizers" / "t5-small" / "tokenizer.json.gz"
    (root / "t5" / "tokenizer.json").write_bytes(gzip.decompress(vocabulary.read_bytes()))
    Original(root / "mini")
    add_modules(root / "mini", normalize=True)
    paths = [str(root / "t5"), str(root / "mini"), str(stories / "stories260K-Q8_0.gguf")]
    with server(tmp_path_factory.mktemp("home"), *paths, "--threads", "1") as started:
        yield started


def _translations() -> list[Body]:
    languages = {"source_language": "en", "target_language": "de"}
    said: list[Body] = [{"messages": [{"role": "user", "content": text}], **languages} for text in SOURCES]
    said += [{"messages": [{"role": "user", "content": text}], "stream": True} for text in SOURCES]
    return said


def _generations() -> list[Body]:
    beams: Body = {"use_beam_search": True, "num_beams": 3, "n": 2}
    extras: list[Body] = [{}, {"temperature": 1.0, "seed": 5}, {"temperature": 0.7, "seed": 6, "n": 2}, beams]
    return [{"prompt": text} | extra for text, extra in zip(SOURCES, extras, strict=True)]


def _streams() -> list[Body]:
    said: list[Body] = [{"messages": [{"role": "user", "content": text}]} for text in OPENINGS]
    return [
        body | {"stream": True, "max_tokens": 24 + 8 * i, "seed": i, "temperature": float(i % 2)}
        for i, body in enumerate(said)
    ]


def _requests() -> list[Request]:
    """Some thirty requests, the same ones each time."""
    t5, mini, stories = {"model": "t5", "max_tokens": 16}, {"model": "mini"}, {"model": "stories260K-Q8_0"}
    chat, whole, vectors = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
    made = [Request("translations", chat, t5 | body) for body in _translations()]
    made += [Request("generations", whole, t5 | body) for body in _generations()]
    inputs = [*([text] for text in TEXTS), TEXTS, TEXTS[::-1] * 4]
    made += [Request("vectors", vectors, mini | {"input": given, "encoding_format": "base64"}) for given in inputs]
    made += [Request("chat streams", chat, stories | body) for body in _streams()]
    long: Body = {"prompt": OPENINGS[0], "max_tokens": 300, "ignore_eos": True, "stream": True, "temperature": 0}
    made.append(Request(HANG_UP, whole, stories | long))
    made += [Request("generations", whole, stories | long | {"stream": False, "max_tokens": 60, "prompt": OPENINGS})]
    return made


def _running(url: str) -> float:
    """Requests that the engines still hold."""
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    held = re.findall(r"^inhouse:num_requests_(?:running|waiting)\{[^}]*\} (\S+)$", text, re.M)
    assert len(held) == 6
    return sum(float(number) for number in held)


@pytest.mark.parametrize(
    ("warm", "seconds", "growth"),
    [(4, 8, 24 * MEBI), pytest.param(30, 600, 16 * MEBI, marks=[pytest.mark.soak, pytest.mark.timeout(1200)])],
    ids=["short", "ten-minutes"],
)
def test_every_answer_is_the_one_of_the_request_alone(
    holding: Running, warm: float, seconds: float, growth: int
) -> None:
    requests, process = _requests(), psutil.Process(holding.process.pid)
    load = Load(holding.url, requests)
    first = load.run(process, warm)
    outcome = load.run(process, seconds)
    print(outcome.summary())
    assert not first.wrong + outcome.wrong, (first.wrong + outcome.wrong)[:3]
    assert set(outcome.done) == {request.kind for request in requests}
    assert load.alone_again()
    assert _running(holding.url) == 0
    later = len(outcome.rss) // 2
    assert max(outcome.rss[later:]) - max(outcome.rss[:later]) < growth, outcome.rss
    assert max(outcome.threads) <= max(first.threads) + 2, outcome.threads
    assert max(outcome.files) <= max(first.files) + 8, outcome.files
    log = holding.log.read_text()
    assert "Traceback" not in log, log[-4000:]
    assert "ERROR" not in log, log[-4000:]
