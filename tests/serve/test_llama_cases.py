"""The 84 cases of another server's test-suite: each is run here, or listed with the reason why it cannot apply.

Prompt-token counts are those that the suite states for this very model; sampled words are not compared, because they
depend on that server's sampler.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.launch import server

pytestmark = [pytest.mark.server, pytest.mark.native, pytest.mark.realdata]

OWN_ROUTE = "a route of that server's own, which is no part of the OpenAI protocol"
NEEDS_MODEL = "needs checkpoints that are not at hand"
TOOLS = "tool calls are refused by name (tests/serve/test_schema.py)"
EMBEDDING = "an embedding model is needed; embeddings are not served yet"

NOT_APPLICABLE: dict[str, str] = {
    "test_server_props": OWN_ROUTE, "test_server_slots": OWN_ROUTE, "test_apply_chat_template": OWN_ROUTE,
    "test_load_split_model": "split files are tested in tests/store_readers", "test_no_webui": "there is no web page",
    "test_chat_completion_with_timings_per_token": "a field of that server's own; refused as unknown",
    "test_completion_response_fields": "a field of that server's own; refused as unknown",
    "test_n_probs_post_sampling": "a field of that server's own; refused as unknown",
    "test_ctx_shift_enabled": "nothing is ever shifted or truncated here (docs/server.md, the context rule)",
    **dict.fromkeys(
        ["test_slot_save_restore", "test_slot_erase", "test_tokenize_detokenize", "test_tokenize_with_bos",
         "test_tokenize_with_pieces"], OWN_ROUTE),
    **dict.fromkeys(
        ["test_infill_without_input_extra", "test_infill_with_input_extra", "test_invalid_input_extra_req",
         "test_with_qwen_model", "test_lora", "test_lora_per_request", "test_with_big_model",
         "test_with_and_without_draft", "test_different_draft_min_draft_max", "test_slot_ctx_not_exceeded",
         "test_with_ctx_shift", "test_multi_requests_parallel"], NEEDS_MODEL),
    **dict.fromkeys(
        ["test_embedding_single", "test_embedding_multiple", "test_embedding_mixed_input",
         "test_embedding_pooling_none",
         "test_embedding_pooling_none_oai", "test_embedding_openai_library_single",
         "test_embedding_openai_library_multiple", "test_embedding_error_prompt_too_long",
         "test_same_prompt_give_same_result", "test_embedding_usage_single", "test_embedding_usage_multiple",
         "test_embedding_openai_library_base64", "test_rerank", "test_rerank_tei_format", "test_invalid_rerank_req",
         "test_rerank_usage"], EMBEDDING),
    **dict.fromkeys(
        ["test_completion_with_required_tool_tiny_fast", "test_completion_with_required_tool_tiny_slow",
         "test_completion_with_required_tool_real_model", "test_completion_without_tool_call_fast",
         "test_completion_without_tool_call_slow", "test_weather", "test_calc_result", "test_thoughts",
         "test_hello_world"], TOOLS),
}  # fmt: skip

PROMPT = "I believe the meaning of life is"


def rows(case: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The parameter rows of a case as mappings; one empty row if it has none."""
    tables = case.get("parametrize", [])
    if not tables:
        yield {}
    for table in tables:
        names = table["args"].split(",")
        for values in table["values"]:
            yield dict(zip(names, values if len(names) > 1 else [values], strict=True))


def fill(value: Any, row: dict[str, Any]) -> Any:
    """A request's literal body with the row's parameters put in."""
    if isinstance(value, dict):
        if "$param" in value:
            return row[value["$param"]]
        return {key: fill(entry, row) for key, entry in value.items()}
    return [fill(entry, row) for entry in value] if isinstance(value, list) else value


def as_completion(data: dict[str, Any]) -> dict[str, Any]:
    """That server's own completion body in the protocol's words."""
    renamed = {"n_predict": "max_tokens", "n_probs": "logprobs"}
    return {renamed.get(k, k): v for k, v in data.items() if k not in ("cache_prompt", "return_tokens")}


def post(http: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    parsed: dict[str, Any] = answer.json()
    return parsed


def complete(http: httpx.Client, **body: Any) -> dict[str, Any]:
    return post(http, "/v1/completions", {"max_tokens": 16} | body)


def simple(http: httpx.Client, case: dict[str, Any]) -> None:
    for request in case["requests"]:
        assert http.get(request["path"]).status_code == 200


def chat(http: httpx.Client, case: dict[str, Any]) -> None:
    ran = 0
    for row in rows(case):
        if row.get("chat_template") not in (None, "chatml"):
            continue  # that server is started with another template
        body = fill(case["requests"][0]["data"], row) | {"model": None, "max_tokens": min(row.get("max_tokens", 8), 64)}
        if body.get("stream"):
            text = http.post("/chat/completions", json=body | {"stream_options": {"include_usage": True}}).text
            events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
            usage, reason = events[-1]["usage"], events[-2]["choices"][0]["finish_reason"]
        else:
            answer = post(http, "/chat/completions", body)
            assert answer["object"] == "chat.completion"
            usage, reason = answer["usage"], answer["choices"][0]["finish_reason"]
        if "n_prompt" in row:
            assert usage["prompt_tokens"] == row["n_prompt"], row
            assert usage["completion_tokens"] == row["n_predicted"]
            assert reason == row["finish_reason"]
        ran += 1
    assert ran


def refused(http: httpx.Client, case: dict[str, Any]) -> None:
    """Constrained output is refused; what is malformed is refused too."""
    for row in rows(case):
        answer = http.post("/chat/completions", json=fill(case["requests"][0]["data"], row))
        assert answer.status_code == 400, row
        assert answer.json()["error"]["message"]


def completion(http: httpx.Client, case: dict[str, Any]) -> None:
    for row in rows(case):
        body = as_completion(fill(case["requests"][0]["data"], row))
        body["max_tokens"] = min(body.get("max_tokens", 16), 64)
        if body["max_tokens"] < 0:
            assert http.post("/v1/completions", json=body).status_code == 400  # "without end" is not in the protocol
            continue
        if body.get("stream"):
            body["stream_options"] = {"include_usage": True}
            lines = http.post("/v1/completions", json=body).text.splitlines()
            usage = [json.loads(line[6:]) for line in lines if line.startswith("data: {")][-1]["usage"]
            assert lines[-2] == "data: [DONE]"
        else:
            usage = complete(http, **body)["usage"]
        if "n_prompt" in row:
            assert (usage["prompt_tokens"], usage["completion_tokens"]) == (row["n_prompt"], row["n_predicted"])


def stream_equals_whole(http: httpx.Client, case: dict[str, Any]) -> None:
    stream, whole = (as_completion(request["data"]) | {"temperature": 0} for request in case["requests"])
    lines = http.post("/v1/completions", json=stream).text.splitlines()
    pieces = [json.loads(line[6:])["choices"][0]["text"] for line in lines if line.startswith("data: {")]
    assert "".join(pieces) == complete(http, **whole)["choices"][0]["text"]


def same_seed(http: httpx.Client, case: dict[str, Any]) -> None:
    texts = {complete(http, prompt=PROMPT, seed=42, temperature=1.0)["choices"][0]["text"] for _ in range(4)}
    assert len(texts) == 1


def different_seeds(http: httpx.Client, case: dict[str, Any]) -> None:
    texts = {complete(http, prompt=PROMPT, seed=seed, temperature=1.0)["choices"][0]["text"] for seed in range(4)}
    assert len(texts) == 4


def cached_or_not(http: httpx.Client, case: dict[str, Any]) -> None:
    """A salt of its own keeps a request from sharing cached prefixes."""
    long = PROMPT * 4
    bodies = [complete(http, prompt=long, seed=42, cache_salt=salt) for salt in ("one", "one", "two")]
    cached = [body["usage"]["prompt_tokens_details"]["cached_tokens"] for body in bodies]
    assert cached[0] == cached[2] == 0 < cached[1]
    assert len({body["choices"][0]["text"] for body in bodies}) == 1


def tokens_as_input(http: httpx.Client, case: dict[str, Any]) -> None:
    expected = complete(http, prompt=[1, 317, 261], temperature=0)["choices"][0]["text"]
    both = complete(http, prompt=[[1, 317, 261], [1, 317, 261]], temperature=0)["choices"]
    assert [choice["text"] for choice in both] == [expected, expected]
    mixed = http.post("/v1/completions", json={"prompt": [[1, 2], "text"]})
    assert mixed.status_code == 400  # the protocol has no mixed lists


def parallel(http: httpx.Client, case: dict[str, Any]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def ask(i: int) -> str:
        return str(complete(http, prompt=PROMPT, seed=i, temperature=0.8)["choices"][0]["text"])

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, range(6))) == [ask(i) for i in range(6)]


def n_probs(http: httpx.Client, case: dict[str, Any]) -> None:
    body = as_completion(case["requests"][0]["data"])
    body.pop("stream", None)
    logprobs = complete(http, **body)["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == 5
    assert all(len(top) == 10 for top in logprobs["top_logprobs"])


def long_prompt(http: httpx.Client, case: dict[str, Any]) -> None:
    answer = http.post("/v1/completions", json={"prompt": "Once upon a time " * 300, "max_tokens": 64})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert answer.json()["error"]["context_length"] == 512


def cancelled(http: httpx.Client, case: dict[str, Any]) -> None:
    """A client that goes away frees what it had: the gauge of running requests falls back to zero."""
    import time

    body = {"prompt": PROMPT, "max_tokens": 480, "ignore_eos": True, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_raw(64))
    end = time.monotonic() + 5
    while time.monotonic() < end:
        line = next(x for x in http.get("/metrics").text.splitlines() if x.startswith("inhouse:num_requests_running{"))
        if line.endswith(" 0.0"):
            return
        time.sleep(0.02)
    raise AssertionError(line)


def with_client(http: httpx.Client, case: dict[str, Any]) -> None:
    """These use the official client, which tests/serve/test_openai_client.py does throughout; once more here."""
    from openai import OpenAI

    with OpenAI(base_url=f"{http.base_url}/v1", api_key="x", max_retries=0) as client:
        answer = client.completions.create(model="stories260K-F32", prompt=PROMPT, max_tokens=8, temperature=0.8)
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (18, 8)


CASES: dict[str, Callable[[httpx.Client, dict[str, Any]], None]] = {
    "test_server_start_simple": simple, "test_server_models": simple, "test_chat_completion": chat,
    "test_chat_completion_stream": chat, "test_chat_template": chat,
    "test_chat_completion_with_openai_library": with_client, "test_logprobs": with_client,
    "test_logprobs_stream": with_client, "test_completion_with_openai_library": with_client,
    "test_completion_stream_with_openai_library": with_client,
    "test_completion_with_response_format": refused, "test_completion_with_json_schema": refused,
    "test_completion_with_grammar": refused, "test_invalid_chat_completion_req": refused,
    "test_completion": completion, "test_completion_stream": completion,
    "test_completion_stream_vs_non_stream": stream_equals_whole, "test_consistent_result_same_seed": same_seed,
    "test_different_result_different_seed": different_seeds,
    "test_consistent_result_different_batch_size": parallel, "test_cache_vs_nocache_prompt": cached_or_not,
    "test_completion_with_tokens_input": tokens_as_input, "test_completion_parallel_slots": parallel,
    "test_n_probs": n_probs, "test_n_probs_stream": n_probs, "test_cancel_request": cancelled,
    "test_ctx_shift_disabled_short_prompt": completion, "test_ctx_shift_disabled_long_prompt": long_prompt,
}  # fmt: skip

SECURITY = ("test_access_public_endpoint", "test_incorrect_api_key", "test_correct_api_key",
            "test_openai_library_correct_api_key", "test_cors_options")  # fmt: skip


@pytest.fixture(scope="module")
def cases(realdata: Path) -> list[dict[str, Any]]:
    loaded: list[dict[str, Any]] = json.loads((realdata / "server" / "llama_server_test_cases.json").read_text())
    return loaded


def test_every_case_is_run_or_has_its_reason(cases: list[dict[str, Any]]) -> None:
    names = {case["test"] for case in cases}
    assert len(cases) == 84
    assert names == set(CASES) | set(NOT_APPLICABLE) | set(SECURITY)
    assert not set(CASES) & set(NOT_APPLICABLE)


@pytest.mark.parametrize("name", sorted(CASES))
def test_case(http: httpx.Client, cases: list[dict[str, Any]], name: str) -> None:
    CASES[name](http, next(case for case in cases if case["test"] == name))


def test_keys_and_origins(stories: Path, tmp_path: Path) -> None:
    """The five cases of the security file, on a server that has a key and an allowed origin."""
    model = str(stories / "stories260K-Q8_0.gguf")
    origin = "http://web.mydomain.fr"
    with (
        server(tmp_path, model, "--cors-origins", origin, INHOUSE_API_KEY="sk-secret") as started,
        httpx.Client(base_url=started.url, trust_env=False) as http,
    ):
        assert http.get("/health").status_code == 200
        for key in (None, "invalid-key"):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            answer = http.post("/completions", json={"prompt": PROMPT}, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        answer = http.post("/completions", json={"prompt": PROMPT}, headers={"Authorization": "Bearer sk-secret"})
        assert answer.status_code == 200
        preflight = {"Origin": origin, "Access-Control-Request-Method": "POST",
                     "Access-Control-Request-Headers": "Authorization"}  # fmt: skip
        allowed = http.options("/completions", headers=preflight)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == origin
        assert http.options("/completions", headers=preflight | {"Origin": "http://evil"}).status_code == 400
        assert "sk-secret" not in started.log.read_text()
