"""The shipped model: its size, its files, what it answers, its tokenizer, and that transformers reads it alike."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from demo.corpus import Corpus, read_stories
from demo.encode import SPECIALS, VOCABULARY, special_id
from demo.export import from_bf16, to_bf16
from demo.grade import holds_keys
from demo.make import open_answerer
from demo.questions import LANGUAGES, load_facts, load_poems
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM

pytestmark = pytest.mark.torch

FOLDER = Path(__file__).resolve().parents[2] / "src" / "inhouse" / "demo"
ASKED = {
    "Which port does the server use?": "port",
    "怎么停止服务？": "stop",
    "What is Inhouse?": "what_is",
    "支持哪些模型格式？": "formats",
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def test_the_folder_is_whole_and_at_most_12_mb() -> None:
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir() if path.is_file()}
    assert {"config.json", "generation_config.json", "model.safetensors", "MODEL_CARD.md"} <= set(files)
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(files)
    assert sum(files.values()) <= 12e6
    config = json.loads((FOLDER / "config.json").read_text())
    assert (config["hidden_size"], config["head_dim"], config["intermediate_size"]) == (256, 64, 768)
    assert config["vocab_size"] == VOCABULARY
    assert config["tie_word_embeddings"] is True
    assert 4e6 <= (files["model.safetensors"] - 10_000) / 2 <= 5.5e6


def test_special_tokens_are_the_last_entries(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == VOCABULARY
    assert [special_id(tokenizer, name) for name in SPECIALS] == list(range(VOCABULARY - len(SPECIALS), VOCABULARY))
    with_chinese = [i for i in range(VOCABULARY) if len(text := tokenizer.decode([i])) == 1 and "一" <= text <= "鿿"]
    assert 2500 <= len(with_chinese) <= 2800


def test_tokenizer_round_trips_what_the_model_says(tokenizer: Tokenizer) -> None:
    texts = [poem.answer for poem in load_poems()]
    texts += [fact.answers[language] for fact in load_facts().values() for language in LANGUAGES]
    texts += ["Ünïcödé 🙂 \n\n\ttabs  and   spaces ", "鑫龘 rare", ""]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    poem = load_poems()[0].text
    assert len(tokenizer.encode(poem).ids) == len(poem)  # one token a character


@pytest.mark.realdata
def test_tokenizer_round_trips_english_and_all_the_chinese_poems(tokenizer: Tokenizer, realdata: Path) -> None:
    texts = read_stories(realdata / "text" / "tinystories_sample_2MiB.txt.gz")[:300]
    for name in ("tang300.json", "shijing.json", "nantang.json"):
        texts += (realdata / "text" / "zh" / name).read_text().splitlines()
    ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]
    assert tokenizer.decode_batch(ids) == texts


def test_bf16_rounds_half_to_even() -> None:
    values = np.array([1.0, -2.5, 1.00390625, 1.01171875, 3.0e38, 1e-40], np.float32)
    back = from_bf16(to_bf16(values))
    assert back[:4].tolist() == [1.0, -2.5, 1.0, 1.015625]
    assert np.array_equal(from_bf16(to_bf16(back)), back)


def test_it_answers_on_the_torch_executor() -> None:
    facts, poems = load_facts(), load_poems()
    answers = open_answerer(FOLDER).answer([*ASKED, "背诵《静夜思》", "How do I bake bread?"])
    for (question, fact), answer in zip(ASKED.items(), answers, strict=False):
        assert holds_keys(answer, facts[fact].keys), (question, answer)
    assert poems[0].text in answers[-2]
    assert holds_keys(answers[-1], Corpus([]).decline[0].fact.keys)


def test_transformers_gives_the_same_answers() -> None:
    model: Any = LlamaForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    ours = open_answerer(FOLDER).answer(list(ASKED))
    for question, answer in zip(ASKED, ours, strict=True):
        messages = [{"role": "user", "content": question}]
        prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        assert prompt == f"<|user|>{question}<|end|><|assistant|>"
        ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=80, do_sample=False)
        assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == answer
