"""Embeddings, rerank, classify and score over HTTP, with the official client, against transformers; models of other
kinds are refused by name."""

import base64
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from openai import BadRequestError, OpenAI

from inhouse.serve.vector_schema import EmbeddingRequest
from inhouse.serve.vector_shapes import Classification, EmbeddingList, Ranking, ScoreList
from tests.load.sentences import TEXTS, Original, add_modules, close, unit
from tests.serve.launch import Running, server
from tests.serve.test_schema import document, properties

__all__ = ["document"]
pytestmark = [pytest.mark.server, pytest.mark.native, pytest.mark.torch, pytest.mark.realdata]


class Fleet:
    """The originals, and a server that holds their folders and stories260K."""

    def __init__(self, root: Path) -> None:
        self.mini = Original(root / "mini", matryoshka_dimensions=[8])
        add_modules(root / "mini", prompts={"query": "the cat: "}, normalize=False)
        said: dict[str, Any] = {"id2label": {0: "calm", 1: "angry", 2: "glad"}}
        self.mood = Original(root / "mood", "BertForSequenceClassification", **said)
        self.cross = Original(root / "cross", "BertForSequenceClassification", num_labels=1)
        self.names = Original(root / "names", "BertForTokenClassification", num_labels=4)
        self.paths = [str(root / name) for name in ("mini", "mood", "cross", "names")]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    return Fleet(tmp_path_factory.mktemp("fleet"))


@pytest.fixture(scope="module")
def holding(fleet: Fleet, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("home")
    with server(home, *fleet.paths, str(stories / "stories260K-Q8_0.gguf"), "--threads", "1") as started:
        yield started


@pytest.fixture
def web(holding: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=holding.url, trust_env=False, timeout=60) as client:
        yield client


@pytest.fixture
def sdk(holding: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{holding.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(web: httpx.Client, path: str, status: int = 200, **body: Any) -> dict[str, Any]:
    answer = web.post(path, json=body)
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_the_official_client_gets_mean_pooled_vectors(sdk: OpenAI, fleet: Fleet) -> None:
    found = sdk.embeddings.create(model="mini", input=TEXTS)  # the client asks for base64
    wanted = np.stack([fleet.mini.mean(text) for text in TEXTS])
    assert [one.index for one in found.data] == list(range(len(TEXTS)))
    assert close(np.array([one.embedding for one in found.data], np.float32), wanted)
    tokens = sum(len(fleet.mini.tokenizer(text)["input_ids"]) for text in TEXTS)
    assert (found.usage.prompt_tokens, found.usage.total_tokens, found.model) == (tokens, tokens, "mini")
    plain = sdk.embeddings.create(model="mini", input=TEXTS[0], encoding_format="float", user="me")
    assert plain.data[0].embedding == found.data[0].embedding
    ids = fleet.mini.tokenizer(TEXTS[0])["input_ids"]
    for tokens_in in (ids, [ids]):
        same = sdk.embeddings.create(model="mini", input=tokens_in, encoding_format="float")
        assert same.data[0].embedding == plain.data[0].embedding
    short = sdk.embeddings.create(model="mini", input=TEXTS[0], dimensions=8, encoding_format="float")
    assert short.data[0].embedding == plain.data[0].embedding[:8]


def test_bodies_fit_their_shapes_and_errors_name_the_field(web: httpx.Client, fleet: Fleet) -> None:
    body = post(web, "/v1/embeddings", model="mini", input="a cat", encoding_format="base64")
    EmbeddingList.model_validate(body)
    raw = np.frombuffer(base64.b64decode(body["data"][0]["embedding"]), "<f4")
    assert close(raw, fleet.mini.mean("a cat"))
    asked = post(web, "/embeddings", model="mini", input="a dog", prompt_name="query")["data"][0]["embedding"]
    assert close(np.array(asked), fleet.mini.mean("the cat: a dog"))
    wrong: list[tuple[dict[str, Any], str, str]] = [
        ({"input": "cat " * 60}, "context_length_exceeded", "takes 40 at once"),
        ({"input": []}, "invalid_request", "input"),
        ({"input": [5, 9999]}, "invalid_request", "allowed are"),
        ({"input": "a", "dimensions": 9}, "invalid_request", "Ask for 8"),
        ({"input": "a", "prompt_name": "x"}, "invalid_request", "no prompt"),
        ({"input": "a", "encoding_format": "int8"}, "invalid_request", "encoding_format"),
        ({"input": "a", "surprise": 1}, "invalid_request", "surprise"),
        ({"input": "a", "truncate_prompt_tokens": 99}, "context_length_exceeded", "cut to 99"),
    ]
    for change, code, message in wrong:
        error = post(web, "/v1/embeddings", 400, model="mini", **change)["error"]
        assert error["code"] == code, error
        assert message in error["message"]
    cut = post(web, "/v1/embeddings", model="mini", input="cat " * 60, truncate=True)
    assert cut["usage"]["prompt_tokens"] == 40
    cut = post(web, "/v1/embeddings", model="mini", input="cat " * 60, truncate_prompt_tokens=5)
    assert cut["usage"]["prompt_tokens"] == 5


def test_rerank_by_cross_encoder_and_by_vectors(web: httpx.Client, fleet: Fleet) -> None:
    found = post(web, "/v1/rerank", model="cross", query="where the dog?", documents=TEXTS)
    Ranking.model_validate(found)
    wanted = {
        i: float(torch.sigmoid(fleet.cross.output("where the dog?", t).logits[0, 0])) for i, t in enumerate(TEXTS)
    }
    ours = {one["index"]: one["relevance_score"] for one in found["results"]}
    assert ours == pytest.approx(wanted, rel=1e-4)
    assert [one["relevance_score"] for one in found["results"]] == sorted(ours.values(), reverse=True)
    assert [one["document"]["text"] for one in found["results"]] == [TEXTS[one["index"]] for one in found["results"]]
    top = post(web, "/rerank", model="cross", query="where the dog?", top_n=2, return_documents=False,
               documents=[{"text": text} for text in TEXTS])  # fmt: skip
    assert top["results"] == [{k: one[k] for k in ("index", "relevance_score")} for one in found["results"][:2]]
    vectors = post(web, "/v2/rerank", model="mini", query="dog", documents=TEXTS)
    query = unit(fleet.mini.mean("the cat: dog"))
    for one in vectors["results"]:
        cosine = float(query @ unit(fleet.mini.mean(TEXTS[one["index"]])))
        assert one["relevance_score"] == pytest.approx(cosine, abs=1e-4)


def test_classes_of_texts_and_of_tokens(web: httpx.Client, fleet: Fleet) -> None:
    found = post(web, "/classify", model="mood", input=TEXTS)
    Classification.model_validate(found)
    assert found["labels"] == ["calm", "angry", "glad"]
    for one, text in zip(found["data"], TEXTS, strict=True):
        wanted = torch.softmax(fleet.mood.output(text).logits[0], -1).numpy()
        assert close(np.array(one["probs"]), wanted)
        assert one["label"] == found["labels"][int(wanted.argmax())]
    found = post(web, "/v1/classify", model="names", input=TEXTS[0])
    Classification.model_validate(found)
    wanted = torch.softmax(fleet.names.output(TEXTS[0]).logits[0], -1).numpy()[1:-1]
    assert close(np.array([token["probs"] for token in found["data"][0]["tokens"]]), wanted)
    assert [token["token"] for token in found["data"][0]["tokens"]][:2] == ["the", "cat"]


def test_scores_of_pairs(web: httpx.Client, fleet: Fleet) -> None:
    found = post(web, "/v1/score", model="cross", text_1="the cat", text_2=TEXTS)
    ScoreList.model_validate(found)
    for one, text in zip(found["data"], TEXTS, strict=True):
        assert one["score"] == pytest.approx(
            float(torch.sigmoid(fleet.cross.output("the cat", text).logits[0, 0])), rel=1e-4
        )
    pairs = post(web, "/score", model="mini", text_1=TEXTS[:2], text_2=TEXTS[1:3])["data"]
    for i, one in enumerate(pairs):
        cosine = float(unit(fleet.mini.mean(TEXTS[i])) @ unit(fleet.mini.mean(TEXTS[i + 1])))
        assert one["score"] == pytest.approx(cosine, abs=1e-4)
    assert post(web, "/v1/score", 400, model="mini", text_1=["a", "b"], text_2="c")["error"]["param"] == "text_1"


def test_models_of_another_kind_are_refused_saying_what_they_can(web: httpx.Client, sdk: OpenAI) -> None:
    kinds = {card["id"]: card["kinds"] for card in web.get("/v1/models").json()["data"]}
    assert kinds == {
        "mini": ["embed", "rerank"], "mood": ["classify"], "cross": ["classify", "rerank"], "names": ["classify"],
        "stories260K-Q8_0": ["generate", "embed"],
    }  # fmt: skip
    with pytest.raises(BadRequestError, match=r"'mini' cannot generate text. It can embed, rerank"):
        sdk.chat.completions.create(model="mini", messages=[{"role": "user", "content": "hi"}])
    with pytest.raises(BadRequestError, match=r"'mood' cannot embed. It can classify"):
        sdk.embeddings.create(model="mood", input="a")
    error = post(web, "/v1/rerank", 400, model="stories260K-Q8_0", query="a", documents=["b"])["error"]
    assert error["message"] == "the model 'stories260K-Q8_0' cannot rerank. It can generate text, embed"
    assert error["param"] == "model"


def test_mixed_calls_at_once_are_as_alone_and_are_counted(web: httpx.Client, sdk: OpenAI, fleet: Fleet) -> None:
    def vectors(i: int) -> list[float]:
        found = sdk.embeddings.create(model="mini", input=TEXTS[i % 5], encoding_format="float")
        return found.data[0].embedding

    def state(i: int) -> list[float]:
        found = sdk.embeddings.create(model="stories260K-Q8_0", input=f"Once {i % 5}", encoding_format="float")
        return found.data[0].embedding

    def story(i: int) -> str:
        found = sdk.completions.create(model="stories260K-Q8_0", prompt=f"Once {i % 5}", max_tokens=20, temperature=0)
        return found.choices[0].text

    calls = [(work, i) for i in range(5) for work in (vectors, state, story)]
    alone = [work(i) for work, i in calls]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda call: call[0](call[1]), calls * 2))
    assert together == alone * 2
    text = web.get("/metrics").text
    answered = re.search(r'inhouse:embed_inputs_total\{[^}]*model_name="mini"[^}]*\} (\S+)', text)
    assert answered is not None
    assert float(answered[1]) >= 15
    assert re.search(r'request_success_total\{[^}]*finished_reason="stop"[^}]*model_name="mini"[^}]*\}', text)


def test_every_field_of_the_published_request_is_taken(document: dict[str, Any]) -> None:
    assert properties(document, "CreateEmbeddingRequest") <= set(EmbeddingRequest.model_fields)
