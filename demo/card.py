"""The model card: fixed text with a results section that grading writes. Knows scores, not how they came about."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from demo.grade import TARGETS, Overlap, Score, without
from demo.questions import Poem, held_out_file, read_tsv
from inhouse.store.writing import atomic_file

TEMPLATE = Path(__file__).parent / "data" / "card.md"
TITLES = {
    "same_style": "Questions about Inhouse, same style as training, held out",
    "independent": "Questions about Inhouse, written by hand before the training phrasings",
    "out_of_scope": "Out-of-scope questions declined",
    "poems": "Poems recited exactly (each asked for in two ways)",
    "stories": "Story prompts answered by an English story that ends",
}


@dataclass(frozen=True, slots=True)
class Run:
    """How the graded weights came about."""

    parameters: int
    megabytes: float  # the model folder, 10^6 bytes
    samples: int
    tokens: int  # run in training, padding left out
    steps: int
    final_loss: float  # mean of the last 50 steps, nats a learned token


def results(scores: Mapping[str, Score], overlaps: Mapping[str, Overlap]) -> str:
    """The tables of results and overlap, Markdown."""
    lines = ["| set | right | share | target |", "|---|---|---|---|"]
    for name, score in scores.items():
        target = f"{TARGETS[name]:.0%}" if name in TARGETS else "-"
        lines.append(f"| {TITLES[name]} | {score.right} / {score.total} | {score.share:.1%} | {target} |")
    lines += [
        "",
        "Answers are greedy, in float32 from the bf16 weights, without a system prompt.",
        "",
        "What the held-out questions share with all training questions, in words or Chinese characters:",
        "",
        "| set | longest shared run | mean of longest run / length | occur whole in training | right without those |",
        "|---|---|---|---|---|",
    ]
    for name, overlap in overlaps.items():
        rest = without(scores[name], overlap.whole, [question for _, question in read_tsv(held_out_file(name))])
        lines.append(
            f"| {name} | {overlap.longest} (“{overlap.example}”) | {overlap.mean_share:.0%} "
            f"| {len(overlap.whole)} of {overlap.questions} | {rest.right} / {rest.total} ({rest.share:.1%}) |"
        )
    return "\n".join(lines)


def run_lines(run: Run) -> str:
    """Size and training figures, Markdown."""
    return "\n".join(
        [
            f"- {run.parameters:,} parameters in bf16, {run.megabytes:.1f} MB with tokenizer",
            f"- {run.samples:,} training samples, {run.tokens:,} tokens run in {run.steps:,} steps",
            f"- final training loss {run.final_loss:.3f} nats a learned token",
        ]
    )


def failures(scores: Mapping[str, Score], most: int = 12) -> str:
    """A few wrong answers of each set, so that readers see how it fails, Markdown."""
    lines: list[str] = []
    for name, score in scores.items():
        for label, question, answer in score.wrong[:most]:
            shown = " ".join(answer.split())[:90].replace("|", "/")
            lines.append(f"- {name}, {label}: “{question}” → {shown}")
    return "\n".join(lines) or "- none"


def write_card(
    path: Path, run: Run, scores: Mapping[str, Score], overlaps: Mapping[str, Overlap], poems: Sequence[Poem]
) -> None:
    """Fills the template and writes it."""
    text = TEMPLATE.read_text()
    filled = {
        "RUN": run_lines(run),
        "RESULTS": results(scores, overlaps),
        "FAILURES": failures(scores),
        "POEMS": "、".join(f"《{poem.title}》{poem.author}" for poem in poems),
    }
    for name, value in filled.items():
        text = text.replace("{{" + name + "}}", value)
    with atomic_file(path) as file:
        file.write(text.encode())
