"""import, pull, list, show, alias, rm: what they print, what they refuse, and that they leave the store whole."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from inhouse.store.store import Store
from tests.cli.program import here, terminal
from tests.load.hub_server import COMMIT, serve

pytestmark = pytest.mark.realdata


def done(*arguments: str) -> str:
    """What a command that must succeed prints on stdout."""
    ended = here(*arguments)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def shown(*arguments: str) -> Any:
    """The JSON document that a command prints."""
    return json.loads(done(*arguments, "--json"))


def test_import_then_list_then_show_tell_the_same(stories: Path) -> None:
    assert done("list").startswith("The store is empty.")
    assert done("import", str(stories / "hf"), "--name", "tiny").startswith("imported tiny:1 (llama, 260.0K parameters")
    listed = shown("list")["models"][0]
    told = shown("show", "tiny")
    assert (listed["ref"], listed["digest"]) == ("tiny:1", told["digest"])
    assert (told["family"], told["format"], told["context"], told["version"]) == ("llama", "safetensors", 512, 1)
    assert told["parameters"] == listed["summary"]["parameters"] == 260_032
    assert told["chat_template"] is False
    assert told["bytes"] == listed["bytes"] == sum(file["bytes"] for file in told["files"])
    assert told["stored"] == {"F32": {"tensors": 47, "bytes": 4 * 260_032}}
    assert told["origin"] == str(stories / "hf")


def test_import_of_what_is_there_says_so(stories: Path) -> None:
    path = str(stories / "stories260K-Q4_0.gguf")
    assert done("import", path, "--name", "a").startswith("imported a:1 ")
    assert done("import", path, "--name", "a").startswith("already there: a:1 ")
    again = shown("import", path, "--name", "a")
    assert (again["new"], again["ref"]) == (False, "a:1")
    assert len(shown("list")["models"]) == 1


def test_import_takes_its_name_from_the_file_and_names_what_it_leaves_out(stories: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    for file in (stories / "hf").iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "notes.docx").write_text("x")
    ended = here("import", str(folder))
    assert ended.stdout.startswith("imported my-model:1 ")
    assert "left out: notes.docx" in ended.stderr
    assert "no chat template" in ended.stderr


def test_a_damaged_model_is_named_and_leaves_the_store_empty(stories: Path, tmp_path: Path) -> None:
    whole = (stories / "stories260K-F16.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: len(whole) // 2])
    ended = here("import", str(cut), "--json")
    assert ended.returncode == 5
    assert json.loads(ended.stderr)["error"]["code"] == "bad_format"
    with Store() as store:
        assert (store.catalog.versions(), store.check(deep=True)) == ([], [])
        assert list(store.home.blobs.iterdir()) == []


def test_import_shows_a_bar_on_a_terminal(stories: Path) -> None:
    with terminal("import", str(stories / "stories260K-F32.gguf"), "--name", "t") as screen:
        screen.wait(r"verify weights \[#{28}\] 100% 1\.1 MiB of 1\.1 MiB")
        screen.wait(r"imported t:1")
        assert screen.exit_status() == 0


def test_show_reads_no_weights(stories: Path, tmp_path: Path) -> None:
    """Of a file whose weights are a hole, headers tell everything that show prints."""
    whole = (stories / "stories260K-Q4_0.gguf").read_bytes()
    hollow = tmp_path / "hollow.gguf"
    head = len(whole) - 262_144 if len(whole) > 262_144 else len(whole) // 8
    hollow.write_bytes(whole[:head])
    os.truncate(hollow, len(whole))
    expected, found = shown("show", str(stories / "stories260K-Q4_0.gguf")), shown("show", str(hollow))
    assert expected["packed"] == found["packed"]
    assert set(expected["packed"]) == {"q4_0", "f16", "vector"}


def test_show_program_prints_what_the_executor_runs(stories: Path) -> None:
    plain = done("show", str(stories / "hf"), "--program")
    assert plain.startswith("program step (version ")
    assert shown("show", str(stories / "hf"), "--program")["programs"]["step"] == _lines(plain, "step")
    assert sum("attention(" in line for line in _lines(plain, "step")) == 5
    assert "quantize_rows" not in plain
    packed = done("show", str(stories / "stories260K-Q8_0.gguf"), "--program")
    assert packed.count("quantize_rows") > 5
    wished = shown("show", str(stories / "hf"), "--program", "--quantize", "q8")
    assert sum("quantize_rows" in line for line in wished["programs"]["step"]) == 4 * 5 + 1
    assert wished["state"][0]["kv_heads"] == 4


def _lines(text: str, program: str) -> list[str]:
    """The lines of one Program out of everything that `show --program` prints."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"program {program} "))
    rest = lines[start + 1 :]
    return [lines[start], *rest[: next(i for i, line in enumerate(rest) if not line.startswith(" "))]]


def test_show_tensors_lists_every_weight_once(stories: Path) -> None:
    rows = {row["name"]: row for row in shown("show", str(stories / "stories260K-Q5_1.gguf"), "--tensors")}
    assert len(rows) == 48
    query = rows["layers.4.attn.q.weight"]
    assert (query["shape"], query["layout"], query["stored"]) == ([64, 64], "q5_1", "Q5_1")
    assert query["source"] == "blk.4.attn_q.weight"
    assert query["stored_bytes"] == 64 * 64 // 32 * 24
    assert rows["final_norm"] == {
        "name": "final_norm", "shape": [64], "kind": "vector", "layout": "vector", "bytes": 256,
        "zeros": 0, "packed_bytes": 256, "source": "output_norm.weight", "stored": "F32", "stored_bytes": 256,
    }  # fmt: skip
    table = done("show", str(stories / "stories260K-Q5_1.gguf"), "--tensors")
    assert len(table.splitlines()) == 49


def test_lineage_alias_and_rm_explain_themselves(stories: Path) -> None:
    done("import", str(stories / "hf"), "--name", "m")
    done("import", str(stories / "stories260K-Q4_0.gguf"), "--name", "small", "--parent", "m:1", "--how", "q4_0")
    child, parent = shown("show", "small"), shown("show", "m")
    assert (child["parent"], child["how"], parent["children"]) == ("m:1", "q4_0", ["small:1"])
    refused = here("rm", "m:1")
    assert refused.returncode == 4
    assert "small:1 was made of m:1" in refused.stderr
    assert "--force" in refused.stderr

    assert done("alias", "small@prod", "small:1") == "small@prod -> small:1\n"
    assert shown("show", "small@prod")["aliases"] == ["small@prod"]
    refused = here("rm", "small")
    assert refused.returncode == 4
    assert "small@prod" in refused.stderr
    assert done("alias", "small@prod") == "small@prod is gone\n"
    assert here("alias", "small@prod").returncode == 3
    assert done("rm", "small").startswith("removed small:1; ")
    freed = shown("rm", "m")
    assert freed["removed"] == ["m:1"]
    assert freed["freed_bytes"] > 1_000_000
    assert shown("list") == {"models": [], "aliases": {}}


def test_names_that_are_nearly_right_are_hinted_at(stories: Path) -> None:
    done("import", str(stories / "stories260K-Q4_0.gguf"), "--name", "stories")
    for command in (("show", "storys"), ("rm", "storeis"), ("run", "story", "hi"), ("serve", "sories", "--port", "0")):
        ended = here(*command)
        assert ended.returncode == 3, ended.stderr
        assert "Did you mean stories?" in ended.stderr
    ended = here("show", "stories:7")
    assert (ended.returncode, "has version" in ended.stderr) == (3, True)
    assert here("show", "./stories").returncode == 3


@pytest.mark.server
def test_pull_fetches_from_a_hub_with_a_bar_and_says_when_it_was_there(
    stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path.name: path.read_bytes() for path in (stories / "hf").iterdir()}
    with serve({"owner/stories": files}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        with terminal("pull", "owner/stories") as screen:
            screen.wait(r"pull model\.safetensors \[#{28}\] 100%")
            screen.wait(r"imported stories:1")
            assert screen.exit_status() == 0
        again = shown("pull", "owner/stories")
        assert (again["ref"], again["new"], again["origin"]) == ("stories:1", False, f"hf:owner/stories@{COMMIT}")
        assert here("pull", "owner/other").returncode == 3
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        offline = here("pull", "owner/stories")
    assert offline.returncode == 8
    assert "HF_HUB_OFFLINE" in offline.stderr
