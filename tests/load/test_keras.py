"""Keras weights of BERT and T5: names and transposes, a whole import, and what is refused."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import transformers

from inhouse.core.errors import FormatError, InhouseError, UnsupportedError
from inhouse.load.importer import import_model
from inhouse.store.keras import FILE, read_keras, torch_weight
from inhouse.store.source import materialise, open_source
from inhouse.store.store import Store

pytestmark = pytest.mark.torch

Arrays = dict[str, np.ndarray]


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=64,
    )  # fmt: skip
    return transformers.BertModel(config)


def t5() -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    config.decoder_start_token_id = 0
    return transformers.T5ForConditionalGeneration(config)


def state_of(model: Any) -> Arrays:
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


def bert_in_keras(state: Arrays) -> Arrays:
    """As TFBertModel names them: kernels [in, out], gamma and beta, `layer_._0`."""
    out = {}
    for name, value in state.items():
        parts = name.split(".")
        last = {"weight": "kernel", "bias": "bias"}[parts[-1]]
        if "LayerNorm" in parts:
            last = {"weight": "gamma", "bias": "beta"}[parts[-1]]
        elif parts[-2].endswith("embeddings"):
            last = "weight" if parts[-2] == "word_embeddings" else "embeddings"
        path = re.sub(r"/(\d+)/", r"_._\1/", "/".join(["tf_bert_model", "bert", *parts[:-1], last]))
        out[f"{path}:0"] = value.T if last == "kernel" else value
    return out


def t5_in_keras(state: Arrays) -> Arrays:
    out = {"tf_t5_for_conditional_generation/shared/shared/weight:0": state["shared.weight"]}
    for name, value in state.items():
        if "embed_tokens" in name or name in ("shared.weight", "lm_head.weight"):
            continue
        parts = name.split(".")[:-1]
        last = "weight" if parts[-1].endswith("norm") else "kernel"
        if parts[-1] == "relative_attention_bias":
            last = "embeddings"
        path = re.sub(r"/(\d+)/", r"_._\1/", "/".join(["tf_t5_for_conditional_generation", *parts, last]))
        out[f"{path}:0"] = value.T if last == "kernel" else value
    return out


def write_keras(path: Path, weights: Arrays) -> None:
    """The tree that Keras' save_weights makes: a group for each layer, its weights listed among its attributes."""
    with h5py.File(path, "w") as file:
        layers: dict[str, list[str]] = {}
        for name in weights:
            layers.setdefault(name.split("/")[1], []).append(name)
        file.attrs["layer_names"] = [layer.encode() for layer in layers]
        file.attrs["backend"] = "tensorflow"
        for layer, names in layers.items():
            group = file.create_group(layer)
            group.attrs["weight_names"] = [name.encode() for name in names]
            for name in names:
                group.create_dataset(name, data=weights[name])


def test_names_and_transposes() -> None:
    query = "tf_bert_model/bert/encoder/layer_._11/attention/self/query/kernel:0"
    assert torch_weight(query) == ("bert.encoder.layer.11.attention.self.query.weight", True)
    norm = "tf_bert_for_masked_lm/mlm___cls/predictions/transform/LayerNorm/gamma:0"
    assert torch_weight(norm) == ("cls.predictions.transform.LayerNorm.weight", False)
    assert torch_weight("tf_t5_for_conditional_generation/shared/shared/weight:0") == ("shared.weight", False)


def test_bert_and_t5_are_read_whole(tmp_path: Path) -> None:
    state = state_of(bert())
    write_keras(tmp_path / "bert.h5", bert_in_keras(state))
    found = dict(read_keras(tmp_path / "bert.h5"))
    assert found.keys() == {f"bert.{name}" for name in state}
    assert all(np.array_equal(found[f"bert.{name}"], value) for name, value in state.items())

    state = state_of(t5())
    write_keras(tmp_path / "t5.h5", t5_in_keras(state))
    found = dict(read_keras(tmp_path / "t5.h5"))
    tied = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
    assert found.keys() == state.keys() - tied
    assert all(np.array_equal(found[name], state[name]) for name in found)


@pytest.mark.realdata
@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_import_converts_it(stories: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / f"tiny-{kind}"
    folder.mkdir()
    model = bert() if kind == "bert" else t5()
    model.config.vocab_size = 512
    if kind == "t5":
        model.resize_token_embeddings(512)
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    (folder / "config.json").write_text(json.dumps(config, default=str))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(stories / "hf" / name, folder / name)
    weights = bert_in_keras(state_of(model)) if kind == "bert" else t5_in_keras(state_of(model))
    write_keras(folder / FILE, weights)
    with Store() as store:
        version = import_model(folder, store=store).version
        assert (version.name, version.format) == (f"tiny-{kind}", "safetensors")
        source = open_source(store.folder(version))
        for name, value in dict(read_keras(folder / FILE)).items():
            assert np.array_equal(materialise(source, name), value)
        source.close()


def test_what_is_no_keras_file_or_reaches_out_of_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write_keras(path, bert_in_keras(state_of(bert())))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FormatError):
        list(read_keras(path))
    path.write_bytes(b"nothing")
    with pytest.raises(FormatError, match="not a whole HDF5 file"):
        list(read_keras(path))
    with h5py.File(path, "w") as file:
        file.create_group("x")
    with pytest.raises(FormatError, match="layer_names"):
        list(read_keras(path))
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [b"bert"]
        group = file.create_group("bert")
        group.attrs["weight_names"] = [b"m/w/kernel:0"]
        group["m/w/kernel:0"] = h5py.ExternalLink("/etc/passwd", "/x")
    with pytest.raises(UnsupportedError, match="a link"):
        list(read_keras(path))
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [b"bert"]
        group = file.create_group("bert")
        group.attrs["weight_names"] = [b"m/w/kernel:0"]
        group.create_dataset("m/w/kernel:0", data=np.zeros((2, 2), np.int32))
    with pytest.raises(UnsupportedError, match="int32"):
        list(read_keras(path))


def test_random_damage_never_crashes(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write_keras(path, bert_in_keras(state_of(bert())))
    whole = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    for _ in range(40):
        damaged = bytearray(whole)
        for at in rng.integers(0, min(len(whole), 20000), 4):
            damaged[at] = int(rng.integers(256))
        path.write_bytes(damaged)
        try:
            list(read_keras(path))
        except InhouseError:
            continue
