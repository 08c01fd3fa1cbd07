"""The data that stories260K is healed and trained on: text that the float model draws itself (temperature 1, any
amount, the very distribution to keep), and the stories of the TinyStories sample from number 100 on. Stories 0-99 are
for scoring and are never among them.

    python -m bench.compress.teacher_text --out build/teacher_text.npz [--count 12000] [--seed 1]
"""

import argparse
import gzip
import os
import sys
import time
from pathlib import Path

import torch

from inhouse.compress.calibrate import Calibration
from inhouse.compress.evaluate import SEPARATOR
from inhouse.compress.generated import sample_documents
from inhouse.core.settings import load_settings
from inhouse.engine.session import Session
from inhouse.model.tokens.tokenizer import Tokenizer
from inhouse.train.data import Dataset, load_dataset, make_dataset

LENGTH = 256  # tokens of a sequence, as the protocol `stories` scores
SCORED = 100  # stories 0-99 are for scoring alone


def realdata() -> Path:
    """The folder of reference data: $INHOUSE_REALDATA."""
    return Path(os.environ.get("INHOUSE_REALDATA", "../shared/realdata"))


def model_folder() -> Path:
    """stories260K as a Hugging Face folder."""
    return realdata() / "models" / "stories260k" / "hf"


def sample_stories() -> list[str]:
    """Every story of the sample, stripped, in order; the first 100 are for scoring."""
    text = gzip.decompress((realdata() / "text" / "tinystories_sample_2MiB.txt.gz").read_bytes()).decode()
    return [story.strip() for story in text.split(SEPARATOR) if story.strip()]


def training_stories(tokenizer: Tokenizer) -> list[list[int]]:
    """The first LENGTH ids, BOS among them, of each story from number 100 on."""
    return [tokenizer.encode(story)[:LENGTH] for story in sample_stories()[SCORED:]]


def as_dataset(documents: list[list[int]]) -> Dataset:
    """Documents whose every token but the first is learned."""
    return make_dataset((ids, [False] + [True] * (len(ids) - 1)) for ids in documents if len(ids) > 1)


def teacher_text(path: Path) -> Dataset:
    """What `main` wrote. Raises FormatError if it is none."""
    return load_dataset(path)


def write(path: Path, count: int, seed: int, threads: int = 1) -> Dataset:
    """Draws `count` sequences from the float model and writes them."""
    settings = load_settings({"threads": threads})
    with Session.open(str(model_folder()), settings) as session:
        bos = session.tokenizer.bos_id
        assert bos is not None
        documents = sample_documents(session, count, length=LENGTH, seed=seed * 1_000_003, stop_ids=(bos,))
        data = as_dataset(list(documents))
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save(path)
    return data


def rows(documents: list[list[int]]) -> Calibration:
    """Documents as they are, one a row."""
    lengths = torch.tensor([len(ids) for ids in documents])
    tokens = torch.zeros(len(documents), int(lengths.max()), dtype=torch.int64)
    for i, ids in enumerate(documents):
        tokens[i, : len(ids)] = torch.tensor(ids)
    return Calibration(tokens, lengths, "", ())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/teacher_text.npz"))
    parser.add_argument("--count", type=int, default=12000)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    begun = time.monotonic()
    data = write(given.out, given.count, given.seed)
    words = f"{len(data)} sequences, {data.ids.size} tokens, {time.monotonic() - begun:.0f} s -> {given.out}"
    print(words, file=sys.stderr)


if __name__ == "__main__":
    main()
