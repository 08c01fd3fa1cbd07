"""Calibration: rows are a function of texts, tokenizer and seed; what is odd about them is named."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from inhouse.compress.calibrate import Calibration, CalibrationOptions, calibrate, read_texts, rows_of, scripts
from inhouse.compress.stats import Accumulator, collect
from inhouse.core.errors import NotFoundError, UsageError
from inhouse.model.tokens.load import load_tokenizer
from inhouse.model.tokens.tokenizer import Tokenizer

pytestmark = [pytest.mark.torch, pytest.mark.realdata]

STORY = "Once upon a time there was a cat who liked to sit in the sun all day. "


@pytest.fixture(scope="module")
def tokenizer(stories: Path) -> Tokenizer:
    return load_tokenizer(stories / "hf")


def _write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def _made(tokenizer: Tokenizer, *files: Path, **options: object) -> Calibration:
    return calibrate(read_texts(files), tokenizer, CalibrationOptions(**options))  # type: ignore[arg-type]


def test_windows_are_cut_from_the_text_and_begin_with_bos(tokenizer: Tokenizer, tmp_path: Path) -> None:
    made = _made(tokenizer, _write(tmp_path, "a.txt", STORY * 100), samples=6, length=50)
    assert made.tokens.shape == (6, 50)
    assert made.count == 300
    assert set(made.tokens[:, 0].tolist()) == {tokenizer.bos_id}
    ids = tokenizer.encode((STORY * 100).strip(), add_special=False)
    assert made.tokens[:, 1:].flatten().tolist() == ids[: 6 * 49]


def test_documents_are_rows_and_their_padding_does_not_count(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "<|endoftext|>".join([STORY, STORY * 20, "Hello."])
    made = _made(tokenizer, _write(tmp_path, "a.txt", text), samples=3, length=40, mode="documents")
    wanted = sorted(min(40, len(tokenizer.encode(t.strip()))) for t in (STORY, STORY * 20, "Hello."))
    assert sorted(made.lengths.tolist()) == wanted
    assert made.count == sum(wanted)


def test_equal_seeds_give_equal_rows(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "<|endoftext|>".join(f"{STORY} It was day {i}. " * 3 for i in range(40))
    path = _write(tmp_path, "a.txt", text)
    one = _made(tokenizer, path, samples=8, length=32, seed=3)
    two = _made(tokenizer, path, samples=8, length=32, seed=3)
    other = _made(tokenizer, path, samples=8, length=32, seed=4)
    assert one.hash == two.hash
    assert torch.equal(one.tokens, two.tokens)
    assert one.hash != other.hash


def test_the_mix_is_kept(tokenizer: Tokenizer, tmp_path: Path) -> None:
    one = read_texts([_write(tmp_path, "a.txt", STORY * 400)], "general")
    two = read_texts([_write(tmp_path, "b.txt", "The dog ran. " * 2000)], "user")
    options = CalibrationOptions(samples=10, length=64, mix={"general": 0.7, "user": 0.3})
    made = calibrate([*one, *two], tokenizer, options)
    dog = tokenizer.encode(" dog", add_special=False)[-1]
    assert sum(dog in row for row in made.tokens.tolist()) == 3
    with pytest.raises(UsageError, match="no texts are called so"):
        calibrate(one, tokenizer, CalibrationOptions(mix={"generl": 1.0}))


def test_shuffled_tokens_are_the_same_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = _write(tmp_path, "a.txt", STORY * 100)
    plain, shuffled = (_made(tokenizer, path, samples=4, length=64, shuffle_tokens=s) for s in (False, True))
    assert not torch.equal(plain.tokens, shuffled.tokens)
    assert torch.equal(plain.tokens.sort(1).values, shuffled.tokens.sort(1).values)
    assert torch.equal(plain.tokens[:, 0], shuffled.tokens[:, 0])


def test_files_of_every_kind(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"One story.<|endoftext|>Another."))
    _write(tmp_path, "b.jsonl", "\n".join(json.dumps({"text": t}) for t in ("A line.", "Two lines.\nReally.")))
    assert [t.text for t in read_texts([tmp_path / "a.txt.gz"])] == ["One story.", "Another."]
    assert [t.text for t in read_texts([tmp_path / "b.jsonl"])] == ["A line.", "Two lines.\nReally."]
    assert len(read_texts([str(tmp_path / "*")])) == 4
    with pytest.raises(NotFoundError, match="matches"):
        read_texts([tmp_path / "*.csv"])
    with pytest.raises(NotFoundError, match="no calibration file"):
        read_texts([tmp_path / "none.txt"])
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="UTF-8"):
        read_texts([tmp_path / "c.txt"])


def test_empty_is_refused_and_a_line_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"empty\.txt is empty"):
        read_texts([_write(tmp_path, "empty.txt", " \n\n")])
    made = _made(tokenizer, _write(tmp_path, "line.txt", "One line."))
    assert any("only" in note and "tokens" in note for note in made.notes)
    assert any("1 rows of the 128" in note for note in made.notes)


def test_one_script_alone_is_named(tokenizer: Tokenizer, realdata: Path) -> None:
    made = calibrate(read_texts([realdata / "text" / "zh" / "daxue.json"]), tokenizer, CalibrationOptions(samples=4))
    assert max(made.scripts, key=lambda name: made.scripts[name]) == "cjk"
    assert any("cjk script alone" in note for note in made.notes)
    assert scripts(["Привет, мир"]) == {"cyrillic": 1.0}


def test_the_manifest_names_every_document(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "<|endoftext|>".join(f"Story {i}. {STORY}" for i in range(30))
    made = _made(tokenizer, _write(tmp_path, "a.txt", text), samples=3, length=30, mode="documents")
    assert len(made.texts) == 3
    assert {"source", "sha256", "characters"} <= set(made.texts[0])
    assert made.manifest()["sha256"] == made.hash
    assert rows_of([[1, 2, 3]], "made").count == 3


def test_statistics_are_those_of_all_rows_at_once() -> None:
    rows = torch.randn(300, 12, generator=torch.Generator().manual_seed(0)).double()
    rows[:, 5] = 0
    stats = collect([rows[i : i + 37].float() for i in range(0, 300, 37)], 12)
    exact = rows.float().double()
    assert stats.count == 300
    assert stats.gram is not None
    torch.testing.assert_close(stats.gram, exact.T @ exact / 300, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.mean_square.double(), exact.square().mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.mean_abs.double(), exact.abs().mean(0), rtol=1e-6, atol=0)
    assert stats.dead.tolist() == [5]
    picked = stats.columns(torch.tensor([3, 1]))
    assert picked.gram is not None
    assert picked.gram[0, 1] == stats.gram[3, 1]
    with pytest.raises(UsageError, match="not finite"):
        Accumulator(2, False).add(torch.tensor([[1.0, torch.nan]]))
