"""Faults that a reviewer found once, each kept from coming back."""

import json
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam

pytestmark = [pytest.mark.server, pytest.mark.native, pytest.mark.realdata]

USER: ChatCompletionMessageParam = {"role": "user", "content": "Hello"}


def fault(http: httpx.Client, path: str, body: Any, kind: str = "application/json") -> dict[str, Any]:
    """The error object of a request that must be a 400."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = http.post(path, content=content, headers={"content-type": kind})
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


def test_our_own_answer_may_be_sent_back(client: OpenAI, model: str) -> None:
    first = client.chat.completions.create(model=model, messages=[USER], max_tokens=5)
    again: Any = [USER, first.choices[0].message, {"role": "user", "content": "And then?"}]
    assert client.chat.completions.create(model=model, messages=again, max_tokens=5).choices[0].message.content
    dumped: Any = [USER, first.choices[0].message.model_dump(), USER]
    assert client.chat.completions.create(model=model, messages=dumped, max_tokens=5).usage
    for name, value in (("tool_calls", [{"id": "x"}]), ("refusal", "no"), ("audio", {"id": "x"})):
        messages: Any = [USER, {"role": "assistant", "content": "x", name: value}]
        with pytest.raises(openai.BadRequestError, match=f"'{name}' cannot be honoured"):
            client.chat.completions.create(model=model, messages=messages, max_tokens=5)


def test_token_counts_of_a_stopped_answer_do_not_depend_on_when_the_engine_heard(client: OpenAI, model: str) -> None:
    def counts(stop: list[str] | None, limit: int) -> tuple[str, int]:
        answer = client.completions.create(
            model=model, prompt="Once upon a time", max_tokens=limit, temperature=0, stop=stop
        )
        assert answer.usage is not None
        return answer.choices[0].text, answer.usage.completion_tokens

    seen = {counts(["Lily"], 400) for _ in range(6)}
    assert len(seen) == 1
    text, count = seen.pop()
    shorter, _ = counts(None, count - 1)
    longer, _ = counts(None, count)
    assert "Lily" not in shorter
    assert longer.startswith(text + "Lily")


def test_template_variables_may_not_replace_ours(http: httpx.Client) -> None:
    for name in ("messages", "self", "tools"):
        error = fault(http, "/v1/chat/completions", {"messages": [USER], "chat_template_kwargs": {name: []}})
        assert error["param"] == "chat_template_kwargs"
    body = {"messages": [USER], "max_tokens": 1, "chat_template_kwargs": {"add_generation_prompt": False}}
    shorter = http.post("/v1/chat/completions", json=body).json()["usage"]["prompt_tokens"]
    del body["chat_template_kwargs"]
    assert shorter < http.post("/v1/chat/completions", json=body).json()["usage"]["prompt_tokens"]


@pytest.mark.parametrize("stream", [False, True])
def test_every_choice_has_the_prompt_s_logprobs(client: OpenAI, model: str, stream: bool) -> None:
    create: Any = client.completions.create
    answer = create(
        model=model, prompt="Once there", echo=True, max_tokens=3, logprobs=1, temperature=0, n=2, stream=stream
    )
    found: dict[int, list[Any]] = {0: [], 1: []}
    for body in answer if stream else [answer]:
        for choice in body.choices:
            if choice.logprobs is not None:
                found[choice.index] += list(zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True))
    assert found[0] == found[1]
    assert [token for token, _ in found[0]][:1] == ["<s>"]
    assert len(found[0]) > 3


def test_offsets_count_characters_of_the_text(client: OpenAI, model: str) -> None:
    answer = client.completions.create(
        model=model, prompt="a\U0001f600b", echo=True, max_tokens=2, logprobs=2, temperature=0
    ).choices[0]
    assert answer.logprobs is not None
    assert answer.logprobs.tokens is not None
    assert answer.logprobs.text_offset is not None
    spelled = [token for token in answer.logprobs.tokens if token.startswith("bytes:")]
    assert spelled == ["bytes:\\xf0", "bytes:\\x9f", "bytes:\\x98", "bytes:\\x80"]
    plain = [(t, o) for t, o in zip(answer.logprobs.tokens, answer.logprobs.text_offset, strict=True)
             if not t.startswith(("bytes:", "<s>")) and o]  # fmt: skip
    assert plain
    for token, offset in plain:
        assert answer.text[offset : offset + len(token)] == token


def test_offsets_of_text_that_was_withheld(client: OpenAI, model: str) -> None:
    stream = client.completions.create(
        model=model, prompt="Once upon a time", max_tokens=12, temperature=0, logprobs=0, stream=True,
        stop=[", there wasp", "girlx"],
    )  # fmt: skip
    text, tokens = "", []
    for chunk in stream:
        choice = chunk.choices[0]
        text += choice.text
        if choice.logprobs is not None:
            tokens += list(zip(choice.logprobs.tokens or [], choice.logprobs.text_offset or [], strict=True))
    assert len(tokens) == 12
    for token, offset in tokens:
        assert text[offset : offset + len(token)] == token


def test_faults_are_named_as_the_client_wrote_them(http: httpx.Client) -> None:
    image = {"type": "image_url", "image_url": {"url": "x"}}
    error = fault(http, "/v1/chat/completions", {"messages": [{"role": "user", "content": [image]}]})
    assert "'image_url' cannot be honoured" in error["message"]
    for body, param in (
        ({"prompt": []}, "prompt"), ({"prompt": "x", "stream_options": {}}, "stream_options"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"), ({"prompt": "x " * 900}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"), ({"prompt": "x", "stop": 3}, "stop"),
    ):  # fmt: skip
        error = fault(http, "/v1/completions", body)
        assert error["param"] == param, error
        assert "str" not in error["message"].split(":")[0].split(".")
    nothing: tuple[Any, ...] = ([], None)
    for content in nothing:
        messages = [{"role": "user", "content": content}]
        assert fault(http, "/v1/chat/completions", {"messages": messages})["param"] == "messages.0.content"
    error = fault(http, "/v1/chat/completions", {"messages": [USER], "response_format": {"type": "json_object"}})
    assert error["param"] == "response_format"
    assert "cannot be honoured" in error["message"]


def test_bodies_that_are_no_json(http: httpx.Client) -> None:
    assert "UTF-8" in fault(http, "/v1/completions", b'{"prompt": "\xff"}')["message"]
    assert "not JSON" in fault(http, "/v1/completions", b"[" * 100_000)["message"]
    assert "empty" in fault(http, "/v1/completions", b"")["message"]
    assert "Content-Type" in fault(http, "/v1/completions", {"prompt": "x"}, "text/plain")["message"]


def test_every_row_of_the_table_of_metrics_moves(http: httpx.Client) -> None:
    from inhouse.serve.metrics import TABLE

    body = {"prompt": "Once upon a time there was a little girl " * 3, "max_tokens": 4, "cache_salt": "metrics"}
    for _ in range(2):
        assert http.post("/v1/completions", json=body).status_code == 200
    assert http.post("/v1/completions", json={"prompt": "x " * 900}).status_code == 400
    with http.stream("POST", "/v1/completions", json={"prompt": "Once", "max_tokens": 400, "stream": True}) as answer:
        next(answer.iter_raw(16))
    text = http.get("/metrics").text
    unmoved = {"num_preemptions", "corrupted_requests", "embed_inputs"}  # a full pool, a broken step, vectors
    for row in TABLE:
        names = {"counter": f"inhouse:{row.name}_total{{", "histogram": f"inhouse:{row.name}_count{{"}
        assert row.name in unmoved or names.get(row.kind, f"inhouse:{row.name}{{") in text, row.name
    assert 'finished_reason="abort"' in text
