"""Draws the same-style held-out questions: cores that the split keeps out of training. Run once; the file is kept."""

import random

from demo import noise
from demo.corpus import Corpus
from demo.questions import DATA, LANGUAGES

SEED = 20260101
EACH = 2  # questions a fact and language


def draw() -> list[tuple[str, str]]:
    """(fact, question) of every fact, small talk included, in both languages where the patterns give held-out cores."""
    corpus, rng = Corpus([]), random.Random(SEED)
    rows: list[tuple[str, str]] = []
    for topic in corpus.facts + corpus.smalltalk:
        for language in LANGUAGES:
            cores = [topic.draw(language, rng, held_out=True, tries=400) for _ in range(EACH)]
            for core in dict.fromkeys(c for c in cores if c is not None):
                rows.append((topic.fact.name, noise.decorate(core, language, rng)))
    return rows


def main() -> None:
    """Writes data/heldout_same_style.tsv."""
    lines = ["# Same-style held-out questions: cores kept out of training (demo/heldout.py). fact<TAB>question"]
    lines += [f"{fact}\t{question}" for fact, question in draw()]
    (DATA / "heldout_same_style.tsv").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
