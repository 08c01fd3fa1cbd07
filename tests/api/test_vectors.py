"""The library's embed, rerank and classify, from folders as sentence-transformers writes them, against transformers."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from inhouse.api import Engine
from inhouse.cli.main import main
from inhouse.core.errors import ContextLengthError, FormatError, UnsupportedError, UsageError
from inhouse.core.settings import Settings
from inhouse.engine.session import Session
from inhouse.load.importer import import_model
from inhouse.store.home import Home
from inhouse.store.store import Store
from tests.load.sentences import TEXTS, WORDS, Original, add_modules, close, unit, write

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
        with pytest.raises(UnsupportedError, match=r"cannot generate text. It can embed, rerank"):
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
    said: dict[str, Any] = {
        "sentence_transformers": {"activation_fn": f"torch.nn.modules.linear.{activation}", "version": "5"}
    }
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


@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_saved_without_its_head_embeds(tmp_path: Path, tied: bool) -> None:
    """As Qwen3-Embedding's folder is: names without `model.`, the last token's state, of length 1."""
    sizes = {"num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": tied}
    original = Original(tmp_path, "Qwen3Model", "Qwen3Config", **sizes)
    add_modules(tmp_path, mode="lasttoken", normalize=True)
    write(tmp_path / "1_Pooling" / "config.json", {"pooling_mode_lasttoken": True})
    wanted = np.stack([unit(original.output(text).last_hidden_state[0, -1].numpy()) for text in TEXTS])
    with Session.open(str(tmp_path), Settings()) as session:
        assert close(session.vectors.embed(TEXTS), wanted)
        assert session.vectors.kinds == (("generate",) if tied else ()) + ("embed", "rerank")


GGUF_TENSORS = {
    "embeddings.word_embeddings": "token_embd", "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types", "embeddings.LayerNorm": "token_embd_norm",
    "attention.self.query": "attn_q", "attention.self.key": "attn_k", "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output", "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up", "output.dense": "ffn_down", "output.LayerNorm": "layer_output_norm",
}  # fmt: skip


def write_gguf(original: Original, path: Path, pooling: int) -> None:
    """The model as llama.cpp's converter names it, by the gguf package."""
    writer = gguf.GGUFWriter(path, "bert")
    config = original.model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType(pooling))
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_type_count(2)
    words = [word if word[0] == "[" else word[2:] if word[:2] == "##" else "\u2581" + word for word in WORDS]
    writer.add_token_list(words)
    writer.add_token_types([3 if word[0] == "[" else 1 for word in WORDS])
    writer.add_uint32("tokenizer.ggml.bos_token_id", 2)
    writer.add_uint32("tokenizer.ggml.cls_token_id", 2)
    writer.add_uint32("tokenizer.ggml.seperator_token_id", 3)
    writer.add_uint32("tokenizer.ggml.unknown_token_id", 1)
    writer.add_uint32("tokenizer.ggml.padding_token_id", 0)
    for name, tensor in original.model.state_dict().items():
        if "pooler" in name:
            continue
        stem, kind = name.rsplit(".", 1)
        layer, _, rest = stem.removeprefix("encoder.layer.").partition(".")
        place = GGUF_TENSORS[stem] if stem in GGUF_TENSORS else f"blk.{layer}.{GGUF_TENSORS[rest]}"
        writer.add_tensor(f"{place}.{kind}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("pooling", [1, 2])
def test_a_gguf_of_llama_cpp(tmp_path: Path, pooling: int) -> None:
    original = Original(tmp_path / "hf")
    write_gguf(original, tmp_path / "tiny.gguf", pooling)
    rows = [original.output(text).last_hidden_state[0].numpy() for text in TEXTS]
    wanted = np.stack([unit(row.mean(0) if pooling == 1 else row[0]) for row in rows])
    with Engine.open(str(tmp_path / "tiny.gguf")) as engine:
        assert close(engine.embed(TEXTS), wanted)


def test_show_describes_an_encoder_and_its_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Original(tmp_path, "BertForSequenceClassification", id2label={0: "calm", 1: "angry"})
    with pytest.raises(SystemExit) as ended:
        main(["show", str(tmp_path)])
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert "2 layers, hidden 32, FFN 48, 2 heads of 16" in shown
    assert "calm, angry" in shown
    assert "chat template" not in shown
    with pytest.raises(SystemExit):
        main(["show", str(tmp_path), "--program"])
    assert "return scores" in capsys.readouterr().out
