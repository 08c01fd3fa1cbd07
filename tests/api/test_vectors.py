"""The library's embed, rerank and classify, from folders as sentence-transformers writes them, against transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inhouse.api import Engine
from inhouse.core.errors import ContextLengthError, FormatError, UnsupportedError, UsageError
from inhouse.core.settings import Settings
from inhouse.engine.session import Session
from inhouse.load.importer import import_model
from inhouse.store.home import Home
from inhouse.store.store import Store
from tests.load.sentences import TEXTS, Original, add_modules, close, unit, write

pytestmark = [pytest.mark.torch, pytest.mark.native]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("INHOUSE_HOME", str(tmp_path / "home"))
    return Home.find()


def test_a_folder_with_mean_pooling_imported_and_run(tmp_path: Path, home: Home) -> None:
    original = Original(tmp_path / "m")
    add_modules(tmp_path / "m", prompts={"query": "the cat: ", "document": "a "}, longest=24)
    with Store(home) as store:
        import_model(tmp_path / "m", "minilm", store=store)
    with Engine.open("minilm") as engine:
        found = engine.embed(TEXTS)
        assert close(found, np.stack([original.mean(text) for text in TEXTS]))
        assert close(engine.embed("a dog", prompt="query"), original.mean("the cat: a dog")[None])
        with pytest.raises(UsageError, match="no prompt 'other'"):
            engine.embed("a", prompt="other")
        with pytest.raises(ContextLengthError, match="takes 24 at once"):
            engine.embed("cat " * 30)
        with pytest.raises(UnsupportedError, match="not trained for shorter vectors"):
            engine.embed("a", dimensions=8)
        with pytest.raises(UnsupportedError, match=r"cannot generate|no program 'step'"):
            engine.generate("a")
        ranks = engine.rerank("dog", TEXTS)
        query = unit(original.mean("the cat: dog"))
        assert close(np.array(ranks), np.array([query @ unit(original.mean("a " + text)) for text in TEXTS]))
        with pytest.raises(UnsupportedError, match=r"cannot classify. It can embed, rerank"):
            engine.classify("a")


def test_dense_layers_norms_and_shorter_vectors(tmp_path: Path) -> None:
    original = Original(tmp_path, matryoshka_dimensions=[4, 8])
    torch.manual_seed(3)
    dense = torch.nn.Linear(32, 12)
    add_modules(tmp_path, mode="cls_token", normalize=True, dense=dense)
    wanted = []
    for text in TEXTS:
        with torch.no_grad():
            wanted.append(unit(torch.tanh(dense(original.output(text).last_hidden_state[0, 0])).numpy()))
    with Engine.open(str(tmp_path)) as engine:
        assert close(engine.embed(TEXTS), np.stack(wanted))
        short = engine.embed(TEXTS, dimensions=8)
        assert close(short, np.stack([unit(vector[:8]) for vector in wanted]))
        with pytest.raises(UsageError, match="Ask for 4, 8"):
            engine.embed("a", dimensions=5)


def test_a_plain_encoder_gives_the_mean_of_length_one(tmp_path: Path) -> None:
    original = Original(tmp_path, "BertForMaskedLM")
    with torch.no_grad():
        hidden = original.model.bert(**original.tokenizer(TEXTS[0], return_tensors="pt")).last_hidden_state[0]
    with Engine.open(str(tmp_path)) as engine:
        assert close(engine.embed(TEXTS[0])[0], unit(hidden.mean(0).numpy()))


def test_quantised_weights_stay_near(tmp_path: Path) -> None:
    original = Original(tmp_path)
    add_modules(tmp_path, normalize=True)
    with Engine.open(str(tmp_path), quantize="q8") as engine:
        ours = engine.embed(TEXTS)
    for vector, text in zip(ours, TEXTS, strict=True):
        assert float(vector @ unit(original.mean(text))) > 0.995


def test_classes_and_their_probabilities(tmp_path: Path) -> None:
    labels = {0: "calm", 1: "angry", 2: "glad"}
    original = Original(tmp_path, "BertForSequenceClassification", id2label=labels)
    with Engine.open(str(tmp_path)) as engine:
        found = engine.classify(TEXTS)
    for text, answer in zip(TEXTS, found, strict=True):
        assert list(answer) == ["calm", "angry", "glad"]
        wanted = torch.softmax(original.output(text).logits[0], -1).numpy()
        assert close(np.array(list(answer.values())), wanted)


@pytest.mark.parametrize("activation", ["Sigmoid", "Identity"])
def test_a_cross_encoder_reads_both_texts(tmp_path: Path, activation: str) -> None:
    said = {"sentence_transformers": {"activation_fn": f"torch.nn.modules.linear.{activation}", "version": "5"}}
    original = Original(tmp_path, "BertForSequenceClassification", num_labels=1, **said)
    scores = torch.tensor([float(original.output("where the dog?", text).logits[0, 0]) for text in TEXTS])
    wanted = torch.sigmoid(scores) if activation == "Sigmoid" else scores
    with Engine.open(str(tmp_path)) as engine:
        assert close(np.array(engine.rerank("where the dog?", TEXTS)), wanted.numpy())


def test_tokens_are_classified(tmp_path: Path) -> None:
    original = Original(tmp_path, "BertForTokenClassification", num_labels=4)
    with Session.open(str(tmp_path), Settings()) as session:
        (found,) = session.vectors.classify(TEXTS[:1])
        assert close(found, torch.softmax(original.output(TEXTS[0]).logits[0], -1).numpy())
        assert session.vectors.kinds == ("classify",)


def test_cut_texts_equal_transformers(tmp_path: Path) -> None:
    original = Original(tmp_path)
    text = "the cat sat on the mat. " * 20
    with Session.open(str(tmp_path), Settings()) as session:
        for most in (0, 7, 2):
            wanted = original.tokenizer(text, truncation=True, max_length=most or 40)["input_ids"]
            assert list(session.vectors.text(text, None, most).ids) == wanted


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"modules": [{"type": "x.Transformer", "path": ""}, {"type": "x.LSTM", "path": "1"}]}, UnsupportedError, "LSTM"),
    ({"modules": {"a": 1}}, FormatError, "list"),
    ({"modules": [{"type": "x.Transformer", "path": ""}]}, UnsupportedError, "no Pooling"),
    ({"pooling": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}}, UnsupportedError, "cls_token"),
    ({"pooling": {"pooling_mode_weightedmean_tokens": True}}, UnsupportedError, "weightedmean"),
    ({"pooling": {"pooling_mode_mean_sqrt_len_tokens": True}}, UnsupportedError, "mean_sqrt_len"),
    ({"pooling": {"pooling_mode_mean_tokens": True, "include_prompt": False}}, UnsupportedError, "include_prompt"),
    ({"settings": {"do_lower_case": True}}, UnsupportedError, "do_lower_case"),
])  # fmt: skip
def test_what_a_folder_cannot_have_is_named(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    Original(tmp_path)
    add_modules(tmp_path)
    files = {"modules": "modules.json", "pooling": "1_Pooling/config.json", "settings": "sentence_bert_config.json"}
    for name, content in change.items():
        write(tmp_path / files[name], content)
    with pytest.raises(error, match=message):
        Engine.open(str(tmp_path))


def test_a_decoder_folder_pools_as_it_says(tmp_path: Path, stories: Path) -> None:
    """A decoder with modules.json: the last token's state, not normalised, beside plain generation."""
    for file in (stories / "hf").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with Engine.open(str(tmp_path)) as engine:
        plain = engine.embed("Once upon a time")
        text = engine.generate("Once upon a time", max_tokens=8, temperature=0.0).text
    add_modules(tmp_path, mode="lasttoken")
    pooling = json.loads((tmp_path / "1_Pooling" / "config.json").read_text())
    write(tmp_path / "1_Pooling" / "config.json", pooling | {"pooling_mode_lasttoken": True})
    with Engine.open(str(tmp_path)) as engine:
        raw = engine.embed("Once upon a time")
        assert engine.generate("Once upon a time", max_tokens=8, temperature=0.0).text == text
    assert np.linalg.norm(plain) == pytest.approx(1, abs=1e-5)
    assert np.linalg.norm(raw) != pytest.approx(1, abs=1e-2)
    assert close(raw / np.linalg.norm(raw), plain)
