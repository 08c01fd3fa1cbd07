"""Writes the tables inside docs/compression.md: short recipes, methods, figures. `--check` fails if one is stale."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from inhouse.compress.shorts import SHORTS
from inhouse.compress.table import METHODS

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, RESULTS = DOCS / "compression.md", DOCS / "compression-results.json"


def render(text: str, name: str, table: str) -> str:
    """`text` with the block called `name` replaced; raises ValueError if there is no such block."""
    start = text.index(f"<!-- {name}:")
    head = text.index("-->", start) + 3
    end = text.index("<!-- end -->", head)
    return f"{text[:head]}\n{table}\n{text[end:]}"


def shorts_table() -> str:
    """One row a short name."""
    rows = ["| name | method | format | what it is |", "|---|---|---|---|"]
    for name, (stage, text) in SHORTS.items():
        rows.append(f"| `{name}` | `{stage['method']}` | `{stage['format']}` | {text} |")
    return "\n".join(rows)


def methods_table(entries: list[dict[str, Any]]) -> str:
    """One row a method: where it stands, what it needs, its options, and what was measured under `method/NAME`."""
    measured = {str(one["id"]).removeprefix("method/"): one for one in entries if str(one["id"]).startswith("method/")}
    rows = [
        "| method | stage | works on | needs of calibration | options | bytes before, after; runs natively; tokens/s "
        "before, after | what it does | source |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in METHODS.values():
        made = row.options(**row.defaults)
        needs = row.need(made)
        options = ", ".join(f"`{f.name}: {_plain(getattr(made, f.name))}`" for f in dataclasses.fields(row.options))
        found = measured.get(row.name)
        rows.append(
            f"| `{row.name}` | `{row.family}` | {row.scope} | {needs} | {options or '-'} | {_figures(found)} "
            f"| {row.summary} | {row.paper} |"
        )
    return "\n".join(rows)


def _figures(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "not measured"
    value = entry["value"]
    native = "yes" if value["native"] else "no"
    speed = f"{value['speed_before']:,.0f}, {value['speed']:,.0f}" if "speed" in value else "not timed"
    token = f"; a token of context {value['token_before']:,}, {value['token']:,}" if "token" in value else ""
    return f"{value['bytes_before']:,}, {entry['bytes']:,}; {native}; {speed}{token}"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value).replace("|", "/") or "''"


def results_table(entries: list[dict[str, Any]]) -> str:
    """One row a measurement, by id; those of single methods stand in their own table."""
    rows = ["| what | figure | goal | bytes | seconds | command | date, note |", "|---|---|---|---|---|---|---|"]
    for one in entries:
        if str(one["id"]).startswith("method/"):
            continue
        size = "" if one["bytes"] is None else f"{one['bytes']:,}"
        note = "; ".join(filter(None, (one["date"], one["note"])))
        cells = (one["what"], _number(one["value"]), _number(one["goal"]), size, _number(one["seconds"]),
                 f"`{one['command']}`", note)  # fmt: skip
        rows.append(f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |")
    return "\n".join(rows)


def _number(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_number(one)}" for key, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(_number, value))
    return str(value)


def page(text: str) -> str:
    """The page with its tables as they should be."""
    entries = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else []
    for name, table in (
        ("shorts", shorts_table()), ("methods", methods_table(entries)), ("results", results_table(entries))
    ):  # fmt: skip
        text = render(text, name, table)
    return text


def main() -> int:
    """0 if all tables are (now) current."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    old = PAGE.read_text("utf-8")
    new = page(old)
    if new == old:
        return 0
    if parser.parse_args().check:
        return 1
    PAGE.write_text(new, "utf-8")
    print("wrote docs/compression.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
