"""eval against the float64 reference of golden.json; bench against common sense."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.program import here

pytestmark = [pytest.mark.native, pytest.mark.realdata]


@pytest.fixture
def text(realdata: Path) -> str:
    """Where the TinyStories sample lies."""
    return str(realdata / "text" / "tinystories_sample_2MiB.txt.gz")


def scored(*arguments: str) -> dict[str, Any]:
    ended = here("eval", *arguments, "--json")
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


@pytest.mark.parametrize("file", ["F32", "Q4_0"])
@pytest.mark.parametrize(
    ("executor", "tolerance"), [("native", 0.01), pytest.param("torch", 0.001, marks=pytest.mark.torch)]
)
def test_perplexity_of_a_file_is_the_reference_s(
    stories: Path, text: str, file: str, executor: str, tolerance: float
) -> None:
    golden = json.loads((stories / "golden.json").read_text())["perplexity"]
    name = f"stories260K-{file}.gguf"
    found = scored(str(stories / name), "--text", text, "--protocol", "stories", "--executor", executor)
    assert found["tokens"] == golden["tokens_scored"]
    assert found["perplexity"] == pytest.approx(golden["files"][name], rel=tolerance)
    assert found["executor"].startswith(executor)


@pytest.fixture
def short(tmp_path: Path) -> str:
    """A text of a few hundred tokens."""
    file = tmp_path / "short.txt"
    file.write_text("Once upon a time there was a little girl named Lily. She loved to play with her dog. " * 8)
    return str(file)


def test_a_model_is_its_own_perfect_reference_and_a_packed_one_is_not(stories: Path, short: str) -> None:
    model, packed = str(stories / "hf"), str(stories / "stories260K-Q4_0.gguf")
    same = scored(model, "--text", short, "--reference", model, "--protocol", "window:64")
    assert (same["kld_mean"], same["kld_p99"], same["top1"]) == (0.0, 0.0, 1.0)
    assert same["perplexity"] == same["reference_perplexity"]
    other = scored(packed, "--text", short, "--reference", model, "--protocol", "window:64")
    assert other["reference_perplexity"] == same["perplexity"]
    assert 0.0 < other["kld_mean"] < other["kld_p99"]
    assert 0.5 < other["top1"] < 1.0


def test_eval_for_people_names_its_protocol(stories: Path, short: str) -> None:
    said = here("eval", str(stories / "hf"), "--text", short).stdout
    assert said.startswith("perplexity  ")
    assert "protocol full" in said


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("--text", "no-such-file"), 3, "there is no file"),
        (("--text", "{short}", "--protocol", "window:513"), 2, "2 <= N <= 512"),
        (("--text", "{empty}"), 2, "nothing to score"),
        (("--text", "{binary}"), 2, "UTF-8"),
    ],
)
def test_eval_refuses_what_it_cannot_score(
    stories: Path, tmp_path: Path, short: str, arguments: tuple[str, ...], status: int, said: str
) -> None:
    files = {"short": short, "empty": str(tmp_path / "empty"), "binary": str(tmp_path / "binary")}
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    ended = here("eval", str(stories / "hf"), *(argument.format(**files) for argument in arguments))
    assert (ended.returncode, ended.stdout) == (status, "")
    assert said in ended.stderr


def test_bench_reports_every_cell_with_its_size(stories: Path) -> None:
    ended = here("bench", str(stories / "stories260K-Q4_0.gguf"), "--rounds", "1", "--no-cold", "--json")
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert told["cold_start_s"] is None
    assert told["executor"].startswith("native/")
    assert [cell["cell"] for cell in told["cells"]] == ["prefill512", "decode32", "batch8", "batch32"]
    assert [cell["streams"] for cell in told["cells"]] == [1, 1, 8, 32]
    assert told["left_out"] == ["decode2048"]
    for cell in told["cells"]:
        assert cell["prompt"] + cell["answer"] <= 512
        assert cell["prefill_tokens_s"] > 0
        assert (cell["decode_tokens_s"] > 0) == (cell["answer"] > 1)
        assert cell["tokens_s"] == cell["prefill_tokens_s" if cell["answer"] == 1 else "decode_tokens_s"]
        assert 0 < cell["share"] < 1.5
        assert cell["gb_s"] * 1e9 < 1.5 * cell["peaks"]["read_bytes"]


def test_bench_refuses_a_cell_that_is_not() -> None:
    ended = here("bench", "demo", "--cells", "decode32,prefil")
    assert ended.returncode == 2
    assert "unknown cell 'prefil'" in ended.stderr
