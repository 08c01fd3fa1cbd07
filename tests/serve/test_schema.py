"""Every field of the two request bodies is honoured or refused by name: proven against the OpenAPI document."""

import gzip
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from inhouse.core.errors import UnsupportedError
from inhouse.serve.schema import HARMLESS, REFUSED, ChatRequest, CompletionRequest

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT: dict[str, Any] = {"model": "m", "prompt": "hi"}


@pytest.fixture(scope="module")
def document(realdata: Path) -> dict[str, Any]:
    with gzip.open(realdata / "server" / "openai" / "openapi.yaml.gz") as file:
        schemas: dict[str, Any] = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["components"]
    return schemas["schemas"]  # type: ignore[no-any-return]


def properties(document: dict[str, Any], name: str) -> set[str]:
    """The property names of a schema and of all that it is made of."""
    schema, found = document[name], set()
    for part in schema.get("allOf", []):
        if "$ref" in part:
            found |= properties(document, part["$ref"].rsplit("/", 1)[1])
        found |= set(part.get("properties", {}))
    return found | set(schema.get("properties", {}))


@pytest.mark.null
@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "model", "count"),
    [("CreateChatCompletionRequest", ChatRequest, 37), ("CreateCompletionRequest", CompletionRequest, 18)],
)
def test_no_field_is_dropped_in_silence(
    document: dict[str, Any], name: str, model: type[ChatRequest] | type[CompletionRequest], count: int
) -> None:
    fields = properties(document, name)
    assert len(fields) == count
    assert fields <= set(model.model_fields) | set(REFUSED)
    assert not set(model.model_fields) & set(REFUSED)


@pytest.mark.null
@pytest.mark.parametrize("field", sorted(REFUSED))
def test_a_refused_field_is_named_with_its_reason(field: str) -> None:
    for model, body in ((ChatRequest, CHAT), (CompletionRequest, TEXT)):
        with pytest.raises(UnsupportedError) as caught:
            model.model_validate(body | {field: "anything"})
        assert caught.value.param == field
        assert field in str(caught.value)
        assert caught.value.http_status == 400
        assert REFUSED[field] in str(caught.value)


@pytest.mark.null
@pytest.mark.parametrize(("field", "value"), [(f, v) for f, vs in HARMLESS.items() for v in vs])
def test_a_value_that_asks_for_nothing_is_let_pass(field: str, value: Any) -> None:
    assert ChatRequest.model_validate(CHAT | {field: value}).model == "m"


@pytest.mark.null
@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 2.1}, {"temperature": "1"}, {"temperature": float("nan")}, {"top_p": 0}, {"n": 0}, {"n": 129},
        {"seed": 2**63}, {"stop": ["a"] * 17}, {"logit_bias": {"1": 101}}, {"logit_bias": {"1": "x"}},
        {"messages": []}, {"messages": None}, {"messages": "x"}, {"messages": [123]}, {"messages": [{}]},
        {"messages": [{"role": 123}]}, {"messages": [{"role": "system", "content": 123}]},
        {"messages": [{"role": "user"}]}, {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"top_logprobs": 3}, {"logprobs": True, "top_logprobs": 21}, {"stream_options": {"include_usage": True}},
        {"stream": True, "stream_options": {"other": 1}}, {"response_format": {"type": "json_object"}},
        {"max_tokens": 3, "max_completion_tokens": 4}, {"max_tokens": 0}, {"store": True}, {"store": 0},
        {"service_tier": "flex"},
        {"modalities": ["audio"]}, {"unknown_field": 1}, {"model": 3}, {"n": True},
    ],
)  # fmt: skip
def test_what_a_chat_body_may_not_say(change: dict[str, Any]) -> None:
    with pytest.raises((ValidationError, UnsupportedError)):
        ChatRequest.model_validate(CHAT | change)


@pytest.mark.null
@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_the_four_shapes_of_a_prompt(prompt: Any, expected: Any) -> None:
    assert CompletionRequest.model_validate(TEXT | {"prompt": prompt}).prompts() == expected


@pytest.mark.null
@pytest.mark.parametrize("prompt", [[], [[]], [1, "a"], [-1], None, 3, [[1], "a"], {"a": 1}])
def test_what_is_no_prompt(prompt: Any) -> None:
    with pytest.raises(ValidationError):
        CompletionRequest.model_validate(TEXT | {"prompt": prompt})


@pytest.mark.null
def test_both_names_of_the_token_limit() -> None:
    assert ChatRequest.model_validate(CHAT).limit() is None
    assert ChatRequest.model_validate(CHAT | {"max_tokens": 3}).limit() == 3
    assert ChatRequest.model_validate(CHAT | {"max_completion_tokens": 4}).limit() == 4
