"""`inhouse delta` as a user runs it."""

import json
import re
from pathlib import Path

import pytest

from inhouse.load.locate import DEMO_FOLDER
from tests.cli.program import done, inhouse

pytestmark = pytest.mark.null


def test_make_and_apply(stories: Path, tmp_path: Path) -> None:
    done("import", str(stories / "hf"), "--name", "m")
    done("import", str(stories / "stories260K-Q8_0.gguf"), "--name", "m")
    file = tmp_path / "m.delta"
    made = json.loads(done("delta", "make", "m:1", "m:2", str(file), "--json"))
    assert (made["bytes"], made["lossy"]) == (file.stat().st_size, False)
    applied = json.loads(done("delta", "apply", "m:1", str(file), "n", "--json"))
    assert (applied["ref"], applied["parent"]) == ("n:1", "m:1")
    wrong = inhouse("delta", "apply", "m:2", str(file), "n")
    assert wrong.returncode != 0
    assert "changes the version" in wrong.stderr


def test_a_base_that_has_nothing_to_do_with_it(stories: Path, tmp_path: Path) -> None:
    done("import", str(stories / "hf"), "--name", "m")
    done("import", str(DEMO_FOLDER), "--name", "other")
    file = tmp_path / "m.delta"
    made = json.loads(done("delta", "make", "other", "m", str(file), "--json"))
    assert re.fullmatch(
        r"the old version has none of the 47 tensors by name, type and shape: .* 8\d% of .*", made["note"]
    )
    file.unlink()
    assert json.loads(done("delta", "make", "m", "m", str(file), "--json"))["note"] == ""
