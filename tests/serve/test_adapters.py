"""LoRA over HTTP: loaded while the server answers, asked for by name, unloaded; paths stay in their folder."""

from pathlib import Path

import httpx
import pytest

from tests.adapters.making import peft_folder
from tests.serve.launch import server

pytestmark = [pytest.mark.native, pytest.mark.torch]


def talk(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, trust_env=False, timeout=60)


def complete(client: httpx.Client, model: str) -> str:
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


def test_an_adapter_comes_and_goes(stories: Path, tmp_path: Path) -> None:
    peft_folder(stories / "hf", tmp_path / "all" / "a", r=4, lora_alpha=10, target_modules=["q_proj", "down_proj"])
    flags = ("--adapter-folder", str(tmp_path / "all"))
    with server(tmp_path / "home", str(stories / "hf"), *flags) as up, talk(up.url) as client:
        base = client.get("/v1/models").json()["data"][0]["id"]
        plain = complete(client, base)
        loaded = client.post("/v1/load_lora_adapter", json={"lora_name": "kind", "lora_path": "a"})
        assert loaded.status_code == 200, loaded.text
        assert loaded.json()["rank"] == 4
        cards = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
        assert cards["kind"]["parent"] == base
        assert client.get("/v1/models/kind").json()["parent"] == base
        assert complete(client, "kind") != plain
        assert complete(client, base) == plain
        prints = [
            client.post("/v1/completions", json={"model": name, "prompt": "a", "max_tokens": 1}).json()[
                "system_fingerprint"
            ]
            for name in (base, "kind")
        ]
        assert prints[0] != prints[1], "other weights, another fingerprint"
        for route, body in (("/v1/embeddings", {"input": "a"}), ("/v1/rerank", {"query": "a", "documents": ["b"]})):
            refused = client.post(route, json={"model": "kind", **body})
            assert refused.status_code == 400
            assert "is an adapter" in refused.json()["error"]["message"], "not answered by the base in silence"
        again = client.post("/v1/load_lora_adapter", json={"lora_name": base, "lora_path": "a"})
        assert again.status_code == 409
        for path in ("../all/../../etc", "/etc", "b", "."):
            refused = client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": path})
            assert refused.status_code == 404, path
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "kind"}).status_code == 200
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "kind"}).status_code == 404
        gone = client.post("/v1/completions", json={"model": "kind", "prompt": "a", "max_tokens": 1})
        assert gone.status_code == 404


def test_without_a_folder_clients_load_nothing(stories: Path, tmp_path: Path) -> None:
    peft_folder(stories / "hf", tmp_path / "a", r=2, lora_alpha=4, target_modules=["q_proj"])
    flags = ("--adapters", f"start={tmp_path / 'a'}")
    with server(tmp_path / "home", str(stories / "hf"), *flags) as up, talk(up.url) as client:
        refused = client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": str(tmp_path / "a")})
        assert refused.status_code == 400
        assert "adapter-folder" in refused.json()["error"]["message"]
        assert complete(client, "start")
