"""Makes the demo model from the data beside this file: `python -m demo.make` (in the Makefile: `make demo-model`).

Stages, each kept in the work folder and not repeated: data (tokenizer and data set), train (resumable), export
(the model folder), grade (the held-out questions), card. Needs the folder of real texts (TinyStories sample, Chinese
texts whose character counts choose the vocabulary): --realdata, else $INHOUSE_REALDATA, else ../shared/realdata.
"""

import gzip
import json
import os
import sys
from pathlib import Path

from demo.corpus import Corpus, read_stories
from demo.encode import SPECIALS, VOCABULARY, Encoder, build_dataset, build_tokenizer
from inhouse.core.errors import NotFoundError
from inhouse.model.build import build
from inhouse.model.spec import ModelSpec, RopeSpec
from inhouse.runtime.program import ProgramSet
from inhouse.store.writing import atomic_file
from inhouse.train.data import load_dataset
from inhouse.train.loop import StepReport, TrainConfig, Trainer, initial_weights

ROOT = Path(__file__).parent.parent
CONTEXT = 1024
TOKENIZER_SEED, DATA_SEED, TRAIN_SEED = 1, 2, 3
SAMPLES = 170_000
MODERN_CHINESE = ("rag/xquad.zh.json.gz", "instruct/glaive_toolcall_zh_demo.json.gz")
STORIES = "text/tinystories_sample_2MiB.txt.gz"
SPEC = ModelSpec(
    family="llama", hidden=256, layers=4, heads=4, kv_heads=2, head_dim=64, ffn=768, vocab_size=VOCABULARY,
    context_length=CONTEXT, rope=RopeSpec(dim=64), norm_eps=1e-5, tied=True,
)  # fmt: skip


def config(steps: int) -> TrainConfig:
    """The shipped model's training, apart from its length."""
    return TrainConfig(
        steps=steps, batch_tokens=4096, learning_rate=2.5e-3, warmup=100, weight_decay=0.1, noise=0.03,
        noise_vocab=VOCABULARY - len(SPECIALS), autocast=True, seed=TRAIN_SEED,
    )  # fmt: skip


def find_realdata(given: str | None) -> Path:
    """The folder of real texts. Raises NotFoundError if there is none."""
    folder = Path(given or os.environ.get("INHOUSE_REALDATA") or ROOT.parent / "shared" / "realdata")
    if not (folder / STORIES).exists():
        raise NotFoundError(
            f"{folder} holds no {STORIES}", remedy="Name the folder with --realdata or $INHOUSE_REALDATA"
        )
    return folder


def load_corpus(realdata: Path) -> Corpus:
    return Corpus(read_stories(realdata / STORIES))


def make_data(realdata: Path, work: Path, samples: int) -> None:
    """Writes tokenizer.json and data.npz unless both are there."""
    if (work / "tokenizer.json").exists() and (work / "data.npz").exists():
        return
    corpus = load_corpus(realdata)
    modern = "".join(gzip.decompress((realdata / name).read_bytes()).decode() for name in MODERN_CHINESE)
    tokenizer = build_tokenizer(corpus, modern, seed=TOKENIZER_SEED)
    data = build_dataset(Encoder(tokenizer), corpus, samples, seed=DATA_SEED, context=CONTEXT)
    with atomic_file(work / "tokenizer.json") as file:
        file.write(tokenizer.to_str(pretty=False).encode())
    data.save(work / "data.npz")


def programs() -> ProgramSet:
    return build(SPEC)


class Screen:
    """Shows progress: a bar on a terminal, else a line every hundred steps; with `as_json`, one JSON object a line."""

    def __init__(self, as_json: bool, every: int = 100) -> None:
        self._json, self._every = as_json, every
        self._loss = 0.0

    def __call__(self, report: StepReport) -> None:
        self._loss = report.loss if report.step <= 1 else 0.95 * self._loss + 0.05 * report.loss
        if self._json:
            print(json.dumps(report.to_dict()), flush=True)
        elif sys.stderr.isatty() or report.step % self._every == 0 or report.step == report.steps:
            filled = 30 * report.step // report.steps
            bar = "#" * filled + "." * (30 - filled)
            eta = f"{int(report.eta_s) // 60}:{int(report.eta_s) % 60:02d}"
            line = f"[{bar}] {report.step}/{report.steps} loss {self._loss:.3f} rate {report.rate:.2e} left {eta}"
            print(line, end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)


def train(work: Path, steps: int, device: str, minutes: float, as_json: bool) -> Trainer | None:
    """Trains or goes on training; None if the time was up before the last step."""
    data = load_dataset(work / "data.npz")
    first = initial_weights(programs(), seed=TRAIN_SEED, layers=SPEC.layers)
    trainer = Trainer(programs(), first, data, config(steps), work, device)
    done = trainer.run(Screen(as_json), minutes=minutes)
    return trainer if done else None
