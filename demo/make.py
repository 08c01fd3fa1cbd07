"""Makes the demo model from the data beside this file: `python -m demo.make` (in the Makefile: `make demo-model`).

Stages, each kept in the work folder and not repeated: data (tokenizer and data set), train (resumable), export
(the model folder), grade (the held-out questions), card. Needs the folder of real texts (TinyStories sample, Chinese
texts whose character counts choose the vocabulary): --realdata, else $INHOUSE_REALDATA, else ../shared/realdata.
"""

import argparse
import gzip
import itertools
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer

from demo.answer import Greedy
from demo.card import Run, write_card
from demo.corpus import Corpus, read_stories
from demo.encode import SPECIALS, VOCABULARY, Encoder, build_dataset, build_tokenizer
from demo.export import F32, export, load_weights
from demo.grade import Score, grade_all, overlap
from demo.questions import held_out_file, read_tsv
from inhouse.core.errors import InhouseError, NotFoundError
from inhouse.model.build import build, parameters
from inhouse.model.spec import ModelSpec, RopeSpec
from inhouse.runtime.program import ProgramSet
from inhouse.runtime.torch_executor import TorchExecutor
from inhouse.store.writing import atomic_file
from inhouse.train.data import load_dataset
from inhouse.train.loop import StepReport, TrainConfig, Trainer, initial_weights

ROOT = Path(__file__).parent.parent
CONTEXT = 1024
TOKENIZER_SEED, DATA_SEED, TRAIN_SEED = 1, 2, 3
SAMPLES = 170_000
STEPS = 2400
HELD_OUT = ("same_style", "independent", "out_of_scope")
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


def as_arrays(trainer: Trainer) -> dict[str, F32]:
    """The trained weights as float32 arrays."""
    return {name: weight.detach().float().cpu().numpy() for name, weight in trainer.weights.items()}


def open_answerer(folder: Path) -> Greedy:
    """Greedy answers of the model folder that was written, on the torch executor."""
    ready = programs()
    weights = load_weights(folder, {name: spec.shape for name, spec in ready.weights.items()})
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return Greedy(TorchExecutor(ready, weights), tokenizer)


def training_questions(corpus: Corpus, samples: int) -> Iterator[str]:
    """Every question of the training set."""
    for conversation in itertools.islice(corpus.stream(DATA_SEED), samples):
        for exchange in conversation.exchanges:
            yield exchange.question


def file_questions(name: str) -> list[str]:
    """The questions of a held-out set."""
    return [question for _, question in read_tsv(held_out_file(name))]


def grade(folder: Path, corpus: Corpus, trainer: Trainer, samples: int) -> dict[str, Score]:
    """Grades the folder and writes its MODEL_CARD.md."""
    scores = grade_all(corpus, open_answerer(folder).answer)
    overlaps = {name: overlap(file_questions(name), training_questions(corpus, samples)) for name in HELD_OUT}
    progress = trainer.progress
    last = progress.losses[-50:]
    size = sum(path.stat().st_size for path in folder.iterdir() if path.name != "MODEL_CARD.md") / 1e6
    run = Run(parameters(SPEC), size, samples, progress.tokens, progress.step, sum(last) / len(last))
    write_card(folder / "MODEL_CARD.md", run, scores, overlaps, corpus.poems)
    return scores


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo.make", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--realdata", help="folder of real texts")
    parser.add_argument("--work", type=Path, default=ROOT / ".demo-build", help="work folder (checkpoint, data set)")
    parser.add_argument("--out", type=Path, help="model folder to write (default: WORK/model)")
    parser.add_argument("--device", default="cpu", help="torch device, cpu or cuda")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's own choice)")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="stop training after this time; run again to go on"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    return parser.parse_args()


def make(args: argparse.Namespace) -> int:
    """All stages; 0 once the model is written, 1 if the time was up before."""
    if args.threads:
        torch.set_num_threads(args.threads)
    realdata, folder = find_realdata(args.realdata), args.out or args.work / "model"
    args.work.mkdir(parents=True, exist_ok=True)
    make_data(realdata, args.work, args.samples)
    trainer = train(args.work, args.steps, args.device, args.minutes, args.json)
    if trainer is None:
        print("time is up; run the same command again to go on", file=sys.stderr)
        return 1
    export(as_arrays(trainer), SPEC, Tokenizer.from_file(str(args.work / "tokenizer.json")), folder)
    scores = grade(folder, load_corpus(realdata), trainer, args.samples)
    shares = {name: score.share for name, score in scores.items()}
    print(json.dumps(shares) if args.json else "\n".join(f"{name}: {share:.1%}" for name, share in shares.items()))
    return 0


def main() -> None:
    try:
        sys.exit(make(arguments()))
    except InhouseError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
