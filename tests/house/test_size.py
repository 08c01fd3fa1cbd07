"""The house stays readable in one sitting: no file over 450 lines, no function over 80."""

import ast
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.null

ROOT = Path(__file__).resolve().parents[2]
MAX_FILE, MAX_FUNCTION = 450, 80


def _tracked(*endings: str) -> list[Path]:
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    return [ROOT / name for name in names if name.endswith(endings) and (ROOT / name).is_file()]


def test_no_file_is_too_long() -> None:
    files = _tracked(".py", ".cc", ".h")
    assert len(files) > 20
    long = {str(f.relative_to(ROOT)): n for f in files if (n := len(f.read_text().splitlines())) > MAX_FILE}
    assert not long


def test_no_function_is_too_long() -> None:
    long = {}
    for file in _tracked(".py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > MAX_FUNCTION:
                    long[f"{file.relative_to(ROOT)}:{node.name}"] = length
    assert not long


def test_package_init_files_are_empty() -> None:
    """An empty `__init__` keeps imports cheap: importing model.spec must not import anything beside it.

    The top package alone may carry a lazy attribute for library users.
    """
    full = [
        str(f.relative_to(ROOT)) for f in _tracked("__init__.py")
        if f.read_text().strip() and f != ROOT / "src/inhouse/__init__.py"
    ]  # fmt: skip
    assert not full
