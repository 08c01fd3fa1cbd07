"""A Marian folder from import to translation: its two SentencePiece models go along, and bad words are honoured."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import transformers

import inhouse
from tests.cli.program import here
from tests.families.seq2seq import save_tiny
from tests.tokens.test_mapped import LINES, marian

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")]


def test_marian_translates_from_the_store(tmp_path: Path) -> None:
    folder = tmp_path / "opus-tiny"
    folder.mkdir()
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(LINES * 20), model_writer=out, vocab_size=90, model_type="unigram", minloglevel=2,
        bos_id=1, eos_id=2, unk_id=0, hard_vocab_limit=False,
    )  # fmt: skip
    marian(folder, out.getvalue())
    size = len(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
    ids = {"pad_token_id": size - 1, "decoder_start_token_id": size - 1, "bos_token_id": 0, "vocab_size": size}
    pair = save_tiny("marian", folder, decoder_layers=2, decoder_vocab_size=size, **ids)
    generation: dict[str, Any] = {"decoder_start_token_id": size - 1, "eos_token_id": 0, "pad_token_id": size - 1}
    generation |= {"bad_words_ids": [[size - 1], [12]], "forced_eos_token_id": 0, "num_beams": 4}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = transformers.MarianTokenizer.from_pretrained(folder)
    text = "The cat is green."
    given = torch.tensor([tokenizer(">>fra<< " + text).input_ids])
    theirs = pair.original.generate(
        given, max_new_tokens=10, num_beams=1, do_sample=False, bad_words_ids=[[size - 1], [12]], forced_eos_token_id=0
    )
    assert here("import", str(folder), "--name", "opus").returncode == 0
    with inhouse.Engine.open("opus") as engine:
        answer = engine.translate(text, target="fra", max_tokens=10)
    assert answer.text == tokenizer.decode(theirs[0], skip_special_tokens=True)
    assert answer.usage.completion_tokens == theirs.shape[1] - 1
