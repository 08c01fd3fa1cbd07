"""Runs every static check and reports all that fail, not only the first: lint, format, types, layers, C++ format."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Returns the number of checks that failed."""
    sources = sorted(str(p.relative_to(ROOT)) for e in ("*.cc", "*.h") for p in (ROOT / "native").rglob(e))
    checks = {
        "ruff check": ["ruff", "check", "."],
        "ruff format": ["ruff", "format", "--check", "--quiet", "."],
        "mypy": ["mypy"],
        "mypy of bench": ["mypy", "--explicit-package-bases", "bench"],  # folders without __init__.py
        "import-linter": ["lint-imports", "--no-cache"],
        "clang-format": ["clang-format", "--dry-run", "--Werror", *sources],
    }
    failed = 0
    for name, command in checks.items():
        if shutil.which(command[0]) is None:
            print(f"{name}: not installed, left out", file=sys.stderr)
            continue
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        print(f"{name}: {'ok' if done.returncode == 0 else 'FAILED'}", flush=True)
        if done.returncode:
            failed += 1
            print(done.stdout[-8000:], done.stderr[-4000:], sep="\n", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
