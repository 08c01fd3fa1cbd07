"""Writes the tables inside docs/ that come from code: settings, commands, metrics. `--check` fails if one is stale."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from inhouse.cli.main import COMMANDS
from inhouse.core.settings import OTHER_ENVIRONMENT, Settings
from inhouse.load.export_coded import carried
from inhouse.runtime.packed import FORMATS
from inhouse.runtime.packed_blocks import writable
from inhouse.serve.metrics import TABLE

DOCS = Path(__file__).resolve().parents[1] / "docs"


def settings_table() -> str:
    """One row a setting: key of the file, default, meaning."""
    rows = ["| setting | default | what it means |", "|---|---|---|"]
    for entry in Settings.table():
        choices = entry.metadata["choices"]
        allowed = f" ({', '.join(repr(c) for c in choices)})" if choices else ""
        rows.append(f"| `{entry.name}` | `{entry.default!r}` | {entry.metadata['help']}{allowed} |")
    return "\n".join(rows)


def environment_table() -> str:
    """Variables that are no settings."""
    rows = ["| variable | what it is |", "|---|---|"]
    return "\n".join(rows + [f"| `{name}` | {text} |" for name, text in OTHER_ENVIRONMENT.items()])


def commands_table() -> str:
    """One row a command, with an example."""
    rows = ["| command | what it does | example |", "|---|---|---|"]
    return "\n".join(rows + [f"| `{c.name}` | {c.help} | `{c.example}` |" for c in COMMANDS])


def export_table() -> str:
    """One row a packed format: what each export makes of it."""
    rows = [
        "| packed format | safetensors | GGUF | GPTQ | AWQ | compressed-tensors | ONNX |",
        "|---|---|---|---|---|---|---|",
    ]
    for coded, row in FORMATS.items():
        name = row.base or coded  # sparse and vector-coded matrices go out in the plain form of their values
        fmt = FORMATS[name]
        types = [kind for kind, packed in writable().items() if packed == name]
        floats = fmt.low == 0
        gguf = name.upper() if floats else " or ".join(f"{kind}, same codes" for kind in types) or "re-encoded"
        if name == "nvfp4":
            gguf += ", where the tensor has no factor of its own"
        cells = ["the same floats" if floats else "its values as floats", gguf]
        for form in ("gptq", "awq", "compressed-tensors"):
            kept = carried(form, name)
            cells.append(f"int{kept.bits} in groups of {kept.group}, same codes" if kept else "rounded")
        rows.append(f"| `{coded}` | {' | '.join(cells)} | its values as floats |")
    return "\n".join(rows)


def metrics_table() -> str:
    """One row a metric."""
    rows = ["| name | kind | what it counts | labels |", "|---|---|---|---|"]
    return "\n".join(rows + [f"| `{r.name}` | {r.kind} | {r.help} | {', '.join(r.labels) or '-'} |" for r in TABLE])


TABLES: tuple[tuple[str, str, Callable[[], str]], ...] = (
    ("commands.md", "commands", commands_table),
    ("commands.md", "settings", settings_table),
    ("commands.md", "environment", environment_table),
    ("server.md", "metrics", metrics_table),
    ("formats-export.md", "exports", export_table),
)


def render(text: str, name: str, table: str) -> str:
    """`text` with the block called `name` replaced; raises ValueError if there is no such block."""
    start = text.index(f"<!-- {name}:")
    head = text.index("-->", start) + 3
    end = text.index("<!-- end -->", head)
    return f"{text[:head]}\n{table}\n{text[end:]}"


def main() -> int:
    """0 if all tables are (now) current."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check, stale = parser.parse_args().check, 0
    for file, name, make in TABLES:
        path = DOCS / file
        old = path.read_text()
        new = render(old, name, make())
        if new != old:
            stale += 1
            if not check:
                path.write_text(new)
                print(f"wrote {name} in docs/{file}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
