"""The server as the official OpenAI client sees it, over a socket."""

import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam

pytestmark = [pytest.mark.server, pytest.mark.native, pytest.mark.realdata]

MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "Book"},
    {"role": "user", "content": "What is the best book"},
]


def golden(stories: Path) -> list[dict[str, Any]]:
    texts: list[dict[str, Any]] = json.loads((stories / "golden.json").read_text())["greedy"]
    return texts


def test_greedy_text_is_golden(client: OpenAI, model: str, stories: Path) -> None:
    for case in golden(stories):
        if not case["prompt"]:
            continue
        count = min(64, len(case["output_ids"]))
        answer = client.completions.create(model=model, prompt=case["prompt"], max_tokens=count, temperature=0)
        assert answer.choices[0].text
        assert case["text"].startswith(case["prompt"] + answer.choices[0].text)
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(case["prompt_ids"]), count)


def test_chat_stream_equals_the_whole(client: OpenAI, model: str) -> None:
    whole = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=24, temperature=0)
    stream = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=24, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    deltas = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in deltas) == whole.choices[0].message.content
    assert deltas[0].delta.role == "assistant"
    assert [c.finish_reason for c in deltas if c.finish_reason] == [whole.choices[0].finish_reason] == ["length"]
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens == 77 + 24
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].system_fingerprint == whole.system_fingerprint


def test_logprobs_of_the_chat_join_to_its_text(client: OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=12, temperature=0, logprobs=True, top_logprobs=5
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content) == answer.choices[0].message.content
    for entry in logprobs.content:
        assert entry.bytes is not None
        assert bytes(entry.bytes).decode("utf-8", "replace") == entry.token
        assert len(entry.top_logprobs) == 5
        assert entry.top_logprobs[0].token == entry.token  # greedy
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0


def test_logprobs_of_a_completion_with_echo(client: OpenAI, model: str) -> None:
    answer = client.completions.create(
        model=model, prompt="Once upon a time", max_tokens=5, temperature=0, logprobs=2, echo=True
    )
    choice = answer.choices[0]
    assert choice.text.startswith("Once upon a time, there")
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.text_offset is not None
    assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == 5 + 5  # BOS + 4, then 5
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in choice.logprobs.token_logprobs[1:])
    assert choice.logprobs.text_offset == sorted(choice.logprobs.text_offset)


def test_seed_fixes_the_draws_and_n_gives_different_ones(client: OpenAI, model: str) -> None:
    def draw(seed: int, n: int = 1) -> list[str]:
        answer = client.completions.create(model=model, prompt="Once", max_tokens=24, seed=seed, n=n, temperature=1)
        assert [choice.index for choice in answer.choices] == list(range(n))
        return [choice.text for choice in answer.choices]

    assert draw(42) == draw(42)
    assert draw(42) != draw(43)
    several = draw(42, 4)
    assert several[0] == draw(42)[0]
    assert len(set(several)) == 4


def test_stop_strings_end_the_answer_and_are_not_part_of_it(client: OpenAI, model: str) -> None:
    full = client.completions.create(model=model, prompt="Once upon a time", max_tokens=40, temperature=0)
    assert "Lily" in full.choices[0].text
    for stream in (False, True):
        create: Any = client.completions.create
        answer = create(
            model=model, prompt="Once upon a time", max_tokens=40, temperature=0, stop=["zebra", "ily."], stream=stream
        )
        if isinstance(answer, openai.Stream):
            chunks = [chunk.choices[0] for chunk in answer if chunk.choices]
            text, reason = "".join(c.text for c in chunks), chunks[-1].finish_reason
        else:
            text, reason = answer.choices[0].text, answer.choices[0].finish_reason
        assert text == full.choices[0].text.split("ily.")[0]
        assert reason == "stop"


def test_prompts_as_ids_and_several_at_once(client: OpenAI, model: str, stories: Path) -> None:
    cases = [case for case in golden(stories) if case["prompt"]][:2]
    ids = [case["prompt_ids"] for case in cases]
    both = client.completions.create(model=model, prompt=ids, max_tokens=10, temperature=0)
    texts = client.completions.create(
        model=model, prompt=[case["prompt"] for case in cases], max_tokens=10, temperature=0
    )
    assert [c.text for c in both.choices] == [c.text for c in texts.choices]
    assert both.usage is not None
    assert both.usage.prompt_tokens == sum(map(len, ids))
    assert both.usage.completion_tokens == 20


def test_logit_bias_forces_and_forbids(client: OpenAI, model: str) -> None:
    forced = client.completions.create(
        model=model, prompt="Once", max_tokens=4, temperature=0, logit_bias={"403": 100}
    ).choices[0].text  # fmt: skip
    assert len(set(forced.split())) == 1


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        ({"max_tokens": 600}, openai.BadRequestError, ["max_tokens is 600", "512"]),
        ({"prompt": "a b " * 600, "max_tokens": 1}, openai.BadRequestError, ["prompt has", "512"]),
        ({"model": "stories260K-F3"}, openai.NotFoundError, ["Did you mean stories260K-F32"]),
        ({"suffix": "x"}, openai.BadRequestError, ["suffix"]),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, ["temprature"]),
        ({"temperature": 3}, openai.BadRequestError, ["temperature"]),
        ({"prompt": [9999]}, openai.BadRequestError, ["9999", "511"]),
        ({"logit_bias": {"x": 1}}, openai.BadRequestError, ["'x'"]),
        ({"n": 129}, openai.BadRequestError, ["n"]),
    ],
)
def test_what_cannot_be_done_is_said(
    client: OpenAI, model: str, call: dict[str, Any], error: type[openai.APIStatusError], says: list[str]
) -> None:
    create: Any = client.completions.create
    with pytest.raises(error) as caught:
        create(**({"model": model, "prompt": "Once", "max_tokens": 1} | call))
    for text in says:
        assert text in caught.value.message
    assert caught.value.body is not None


def test_models_are_listed(client: OpenAI, model: str) -> None:
    listed = client.models.list().data
    assert [entry.id for entry in listed] == [model]
    assert client.models.retrieve(model).id == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_health_ready_and_unknown_paths(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ready"}
    missing = http.get("/nowhere")
    assert missing.status_code == 404
    assert missing.json()["error"]["message"] == "Not Found"
    assert http.post("/v1/completions", content=b"{").json()["error"]["type"] == "invalid_request_error"
    assert http.post("/v1/completions", content=b"\xff\xfe").status_code == 400
    assert http.post("/v1/completions", content=b"[" * 100_000).status_code == 400
    for page in ("/docs", "/redoc"):
        assert http.get(page).status_code == 404
    assert "http://" not in http.get("/openapi.json").text
    assert "https://" not in http.get("/openapi.json").text
