"""Encoders against transformers: hidden states, scores of every head, alone and batched, with token types."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inhouse.core.errors import FormatError, UnsupportedError
from inhouse.model.encoder import EncoderSpec
from inhouse.model.families.table import resolve
from tests.families.parity import F32, OTHER, PROMPT, TOLERANCE, open_tiny, record, step_of, transformers_oracle, worst

pytestmark = pytest.mark.torch

SHAPE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 128,
    "max_position_embeddings": 64,
}  # fmt: skip
DISTIL: dict[str, Any] = {
    "dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 48, "vocab_size": 128, "max_position_embeddings": 64,
}  # fmt: skip
MODERN: dict[str, Any] = SHAPE | {
    "num_hidden_layers": 4, "local_attention": 8, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SIX = {"id2label": {i: f"label {i}" for i in range(6)}, "label2id": {f"label {i}": i for i in range(6)}}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {  # case -> (family, model of transformers, settings)
    "bert": ("bert", "BertModel", SHAPE),
    "bert-masked": ("bert", "BertForMaskedLM", SHAPE),
    "bert-texts": ("bert", "BertForSequenceClassification", SHAPE | SIX),
    "bert-tokens": ("bert", "BertForTokenClassification", SHAPE | SIX),
    "roberta": ("roberta", "RobertaModel", SHAPE | {"type_vocab_size": 1, "pad_token_id": 1}),
    "roberta-texts": ("roberta", "RobertaForSequenceClassification", SHAPE | {"type_vocab_size": 1, "pad_token_id": 1}),
    "roberta-xlm": ("roberta", "XLMRobertaForTokenClassification", SHAPE | {"type_vocab_size": 1, "pad_token_id": 1}),
    "roberta-camembert": ("roberta", "CamembertModel", SHAPE | {"type_vocab_size": 1, "pad_token_id": 1}),
    "electra": ("electra", "ElectraModel", SHAPE | {"embedding_size": 16}),
    "electra-texts": ("electra", "ElectraForSequenceClassification", SHAPE | {"embedding_size": 16}),
    "albert": ("albert", "AlbertModel", SHAPE | {"embedding_size": 16, "num_hidden_layers": 4, "num_hidden_groups": 2}),
    "albert-texts": ("albert", "AlbertForSequenceClassification", SHAPE | {"embedding_size": 32}),
    "distilbert": ("distilbert", "DistilBertModel", DISTIL),
    "distilbert-texts": ("distilbert", "DistilBertForSequenceClassification", DISTIL | SIX),
    "distilbert-tokens": ("distilbert", "DistilBertForTokenClassification", DISTIL),
    "mpnet": ("mpnet", "MPNetModel", SHAPE),
    "mpnet-texts": ("mpnet", "MPNetForSequenceClassification", SHAPE),
    "modernbert": ("modernbert", "ModernBertModel", MODERN),
    "modernbert-biased": ("modernbert", "ModernBertModel", MODERN | {
        "attention_bias": True, "mlp_bias": True, "norm_bias": True}),
    "modernbert-texts": ("modernbert", "ModernBertForSequenceClassification", MODERN),
    "modernbert-mean": ("modernbert", "ModernBertForSequenceClassification", MODERN | SIX | {
        "classifier_pooling": "mean", "classifier_bias": True}),
    "modernbert-tokens": ("modernbert", "ModernBertForTokenClassification", MODERN | SIX),
}  # fmt: skip


def theirs(model: Any, tokens: Sequence[int], types: Sequence[int]) -> dict[str, F32]:
    """What the original says of one text: role -> array."""
    more = {"token_type_ids": torch.tensor([list(types)])} if any(types) else {}
    with torch.no_grad():
        found = model(torch.tensor([list(tokens)]), output_hidden_states=True, **more)
    out = {"hidden": np.asarray(found.hidden_states[-1][0].numpy())}
    if "last_hidden_state" in found:
        out["hidden"] = np.asarray(found.last_hidden_state[0].numpy())
    if "logits" in found and type(model).__name__.endswith("Classification"):
        out["scores"] = np.asarray(found.logits.reshape(-1, found.logits.shape[-1]).numpy())
    return out


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_and_scores(case: str, tmp_path: Path) -> None:
    family, name, settings = CASES[case]
    config = "".join(part for part in name.split("For")[0].removesuffix("Model")) + "Config"
    model = transformers_oracle(name, config, settings).model
    model.save_pretrained(tmp_path)
    tiny = open_tiny(tmp_path)
    assert tiny.family == family
    assert isinstance(tiny.spec, EncoderSpec)
    types = [int(i >= 9) if tiny.spec.types > 1 else 0 for i in range(len(PROMPT))]
    wanted = theirs(model, PROMPT, types)
    for executor_name in ("native", "torch"):
        executor = tiny.executor(executor_name)
        step = step_of(tiny.programs, [(PROMPT, 0, 0)])
        alone = executor.run("embed", replace(step, types=np.array(types, np.int32)))
        alone = {role: np.array(array) for role, array in alone.items()}
        error = max(worst(alone[role], wanted[role]) for role in wanted)
        assert error < TOLERANCE, f"{executor_name}: off by {error:.2e}"
        step = step_of(tiny.programs, [(OTHER, 0, 0), (PROMPT, 0, 0), ((7,), 0, 0)])
        among = executor.run("embed", replace(step, types=np.array([0] * len(OTHER) + types + [0], np.int32)))
        for role, array in alone.items():
            first = len(OTHER) if len(among[role]) > 3 else 1
            ours = among[role][first : first + len(array)]
            if executor_name == "native":
                assert np.array_equal(ours, array), f"{role} differs among others"
            else:
                assert worst(np.array(ours), array) < 1e-5
        executor.close()
        record(tiny.family, case.removeprefix(family).strip("-"), tiny.format, executor_name, error)


def config_of(name: str, **more: Any) -> dict[str, Any]:
    return {"architectures": [name], **SHAPE, **more}


def spec_of(config: dict[str, Any]) -> EncoderSpec:
    spec, _ = resolve(config)
    assert isinstance(spec, EncoderSpec)
    return spec


def test_labels_and_answers_are_read() -> None:
    plain = spec_of(config_of("BertForSequenceClassification")).classifier
    assert plain is not None
    assert (plain.labels, plain.answer) == (("LABEL_0", "LABEL_1"), "softmax")
    ranker = {"id2label": {"0": "LABEL_0"}}
    one = spec_of(config_of("BertForSequenceClassification", **ranker)).classifier
    assert one is not None
    assert one.answer == "sigmoid"
    told = {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity", "version": "5.0"}}
    raw = spec_of(config_of("BertForSequenceClassification", **ranker, **told)).classifier
    assert raw is not None
    assert raw.answer == "none"
    several = spec_of(config_of("BertForSequenceClassification", problem_type="multi_label_classification")).classifier
    assert several is not None
    assert several.answer == "sigmoid"


@pytest.mark.parametrize(("more", "error", "message"), [
    ({"is_decoder": True}, UnsupportedError, "is_decoder"),
    ({"position_embedding_type": "relative_key"}, UnsupportedError, "position_embedding_type"),
    ({"id2label": {"0": "a", "2": "b"}}, FormatError, "id2label"),
    ({"num_attention_heads": 5}, FormatError, "multiple of 5 heads"),
    ({"sentence_transformers": {"activation_fn": "my.Own"}}, UnsupportedError, "activation_fn"),
    ({"surprise": 1}, UnsupportedError, "surprise"),
])  # fmt: skip
def test_what_cannot_be_honoured_is_named(more: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        resolve(config_of("BertForSequenceClassification", **more))
