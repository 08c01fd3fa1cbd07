"""A T5 behind the server and in the library: completions, chats, streams, beams and translations, as transformers
answers them."""

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from openai import BadRequestError, OpenAI

import inhouse
from inhouse.core.errors import UnsupportedError
from tests.cli.program import here
from tests.families.seq2seq import Pair, save_tiny
from tests.serve.launch import server

pytestmark = pytest.mark.torch
TEXT = "The house is wonderful."


@pytest.fixture(scope="module")
def t5(realdata: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A tiny Flan-T5 with the real vocabulary of t5-small."""
    folder = tmp_path_factory.mktemp("models") / "t5-tiny"
    pair = save_tiny("flan-t5", folder, vocab_size=32128, scale=0.3, num_decoder_layers=2)
    source = realdata / "tokenizers" / "t5-small" / "tokenizer.json.gz"
    (folder / "tokenizer.json").write_bytes(gzip.decompress(source.read_bytes()))
    return pair


def theirs(pair: Pair, text: str, **options: Any) -> list[str]:
    """The answers of transformers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(pair.folder)
    options |= {"do_sample": False, "max_new_tokens": 12, "eos_token_id": 1, "pad_token_id": 0}
    out = pair.original.generate(torch.tensor([tokenizer(text).input_ids]), **options)
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in out]


@pytest.mark.parametrize("command", [["eval", "--text", "{file}"], ["bench", "--no-cold", "--rounds", "1"]])
def test_commands_of_decoders_say_so(t5: Pair, command: list[str], tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    ended = here(command[0], str(t5.folder), *(word.format(file=tmp_path / "text") for word in command[1:]))
    assert ended.returncode == 2
    assert "\nerror: " in f"\n{ended.stderr}"  # below a bar, where loading was slow enough to show one
    assert "is of decoders; 't5-tiny' is an encoder-decoder" in ended.stderr


def test_beams_say_how_to_be_rid_of_a_default_penalty(t5: Pair) -> None:
    with inhouse.Engine.open(str(t5.folder), max_sequences=8) as engine:
        with pytest.raises(UnsupportedError, match="repetition_penalty cannot .* give 1") as caught:
            engine.generate(TEXT, num_beams=2, repetition_penalty=1.2)
        assert caught.value.param == "repetition_penalty"


def test_the_library(t5: Pair) -> None:
    with inhouse.Engine.open(str(t5.folder), max_sequences=8) as engine:
        answer = engine.generate(TEXT, max_tokens=12)
        assert answer.text == theirs(t5, TEXT)[0]
        assert answer.usage.prompt_tokens == 6
        assert engine.chat(TEXT, max_tokens=12).text == answer.text
        task = f"translate English to German: {TEXT}"
        german = theirs(t5, task)[0]
        assert engine.translate(TEXT, source="en", target="German", max_tokens=12).text == german != answer.text
        best = engine.generate(TEXT, max_tokens=12, num_beams=4, n=3, length_penalty=0.7)
        found = theirs(t5, TEXT, num_beams=4, num_return_sequences=3, length_penalty=0.7)
        assert [best.text, *(other.text for other in best.others)] == found
        assert best.score is not None
        assert best.score >= max(other.score or 0.0 for other in best.others)
        sampled = engine.generate(TEXT, max_tokens=12, temperature=1.0, seed=5)
        assert engine.generate(TEXT, max_tokens=12, temperature=1.0, seed=5).text == sampled.text != answer.text


def test_the_terminal(t5: Pair) -> None:
    ran = here("run", str(t5.folder), TEXT, "--max-tokens", "12")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == theirs(t5, TEXT)[0]
    shown = here("show", str(t5.folder)).stdout
    assert "encoder of 2 layers, 4 heads of 8, FFN 64, decoder of 2 layers" in shown
    assert "the last message of a chat is read as it is" in shown


@pytest.fixture(scope="module")
def client(t5: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    with server(tmp_path_factory.mktemp("home"), str(t5.folder)) as running:
        yield OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


def test_the_server(t5: Pair, client: OpenAI) -> None:
    greedy, name = theirs(t5, TEXT)[0], "t5-tiny"
    whole = client.completions.create(model=name, prompt=TEXT, max_tokens=12)
    assert whole.choices[0].text == greedy
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == 6
    pieces = client.completions.create(model=name, prompt=TEXT, max_tokens=12, stream=True)
    assert "".join(chunk.choices[0].text for chunk in pieces) == greedy
    said: Any = [{"role": "user", "content": "unread"}, {"role": "assistant", "content": "too"}]
    said.append({"role": "user", "content": TEXT})
    chat = client.chat.completions.create(model=name, messages=said, max_tokens=12)
    assert chat.choices[0].message.content == greedy
    beams = {"use_beam_search": True, "num_beams": 4, "length_penalty": 0.7}
    found = client.completions.create(model=name, prompt=[TEXT, TEXT], max_tokens=12, n=2, extra_body=beams)
    best = theirs(t5, TEXT, num_beams=4, num_return_sequences=2, length_penalty=0.7)
    assert [choice.text for choice in found.choices] == best * 2
    languages = {"source_language": "English", "target_language": "de"}
    translated = client.chat.completions.create(model=name, messages=said, max_tokens=12, extra_body=languages)
    assert translated.choices[0].message.content == theirs(t5, f"translate English to German: {TEXT}")[0]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"use_beam_search": True, "stream": True}, "stream"),
        ({"use_beam_search": True, "temperature": 0.5}, "temperature"),
        ({"use_beam_search": True, "logprobs": 2}, "logprobs"),
        ({"num_beams": 3}, "num_beams"),
        ({"best_of": 3}, "best_of"),
        ({"target_language": "de"}, "source_language"),
        ({"target_language": "de", "source_language": "4"}, "source_language"),
        ({"echo": True, "logprobs": 1}, "logprobs"),
    ],
)
def test_what_is_refused(client: OpenAI, body: dict[str, Any], field: str) -> None:
    with pytest.raises(BadRequestError) as refused:
        client.completions.create(model="t5-tiny", prompt=TEXT, max_tokens=4, extra_body=body)
    assert refused.value.param == field


def test_a_system_message_is_refused(client: OpenAI) -> None:
    said: Any = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": TEXT}]
    with pytest.raises(BadRequestError, match="no place for a system message"):
        client.chat.completions.create(model="t5-tiny", messages=said)
