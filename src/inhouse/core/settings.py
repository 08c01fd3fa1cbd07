"""Settings: one table feeds the defaults, the TOML file, the environment, `--help`, the docs and the tests.

Order: defaults < TOML file < `INHOUSE_*` environment < flags. A key that is not in the table is an error with the
nearest right one; values are frozen once loaded.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from inhouse.core.errors import UsageError

_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?(?:e\d+)?)\s*(?:([kmgt])(i?))?b?\s*", re.IGNORECASE)

# Variables that other rooms read themselves, before or without settings.
OTHER_ENVIRONMENT: Mapping[str, str] = {
    "INHOUSE_HOME": "the model home; default: inhouse in the XDG data directory",
    "INHOUSE_CONFIG": "the settings file; default: inhouse/config.toml in the XDG config directory",
    "INHOUSE_ISA": "forces a lower instruction set: scalar, avx2, avx512 or neon",
    "INHOUSE_NATIVE_LIB": "path of the native library, for developers",
    "INHOUSE_REALDATA": "folder of real models and texts, for tests",
}


def _setting(default: Any, text: str, choices: tuple[str, ...] = (), least: int = 0, most: int = 2**62) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices, "least": least, "most": most})


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting, its default and what it means. Sizes are bytes and take suffixes (`512MB`, `2GiB`)."""

    host: str = _setting("127.0.0.1", "address the server listens on; anything but loopback needs an API key")
    port: int = _setting(8080, "port the server listens on; 0: a free one", most=65535)
    api_key: str = _setting("", "key that clients must send as `Authorization: Bearer`; empty: none")
    cors_origins: str = _setting("", "origins browsers may call from, separated by commas; empty: none")
    threads: int = _setting(0, "compute threads; 0: what the machine or container grants")
    executor: str = _setting("native", "what runs the Programs", ("native", "torch"))
    device: str = _setting("cpu", "device of the torch executor: cpu, cuda, cuda:1, ...")
    quantize: str = _setting("", "pack float weights at load; empty: keep as they are", ("", "q8", "q6", "q4"))
    kv_dtype: str = _setting(
        "auto",
        "KV cache elements; auto: what the model says, else f32 or f16 by its weights; int4: codes, but for the last "
        "128 positions",
        ("auto", "f32", "f16", "bf16", "int8", "int4", "k=int8,v=int4", "k=int4,v=int8"),
    )
    activations: str = _setting(
        "int8", "what quantised weights are multiplied with; float: slower, no rounding", ("int8", "float")
    )
    context: int = _setting(0, "context limit in tokens; 0: the model's own")
    kv_memory: int = _setting(0, "bytes for the KV cache; 0: by context, sequences and free memory")
    max_sequences: int = _setting(64, "sequences that decode together", least=1)
    max_queue: int = _setting(1024, "requests that may wait; one more is refused with 429", least=1)
    step_tokens: int = _setting(512, "tokens computed in one step, prompts and answers together", least=1)
    prefix_cache: bool = _setting(True, "share computed prefixes between requests")
    adapters: str = _setting("", "LoRA adapters to load at start: name=path, separated by commas")
    adapter_folder: str = _setting("", "folder from which clients may load adapters; empty: they may not")
    metrics_prefix: str = _setting("inhouse:", "prefix of metric names", ("inhouse:", "vllm:"))
    drain_seconds: int = _setting(30, "how long running requests may finish after SIGTERM")
    log_level: str = _setting("info", "what is logged to stderr", ("debug", "info", "warning", "error"))

    @classmethod
    def table(cls) -> tuple[Field[Any], ...]:
        """The fields in order, each with `name`, `default`, and metadata `help` and `choices`."""
        return fields(cls)


def parse_size(text: object, where: str = "", least: int = 0) -> int:
    """`4096`, `512MB`, `2GiB`, `1.5g`, `3e9` or a number as bytes: k, M, G, T are powers of 1000, with an `i` of 1024.

    Raises UsageError for what is no size or is below `least` or above 1e15; `where` names what was set.
    """
    found = _SIZE.fullmatch(str(text)) if isinstance(text, str | int | float) and not isinstance(text, bool) else None
    if found is None:
        what = f"{where}: {text!r}" if where else repr(text)
        raise UsageError(f"{what} is no size", remedy="Write 3GB, 800MiB or a number of bytes", param=where or None)
    number, unit, binary = found.groups()
    power = "kmgt".index(unit.lower()) + 1 if unit else 0
    value = float(number) * (1024 if binary else 1000) ** power
    if not least <= value < 1e15:
        what = f"{where}: {text!r}" if where else repr(text)
        raise UsageError(f"{what} is no size from {least} to 1e15 bytes", param=where or None)
    return int(value)


def _convert(entry: Field[Any], value: Any, origin: str) -> Any:
    """`value` as the field's type; raises UsageError naming the setting, the value and where it came from."""
    where = f"setting {entry.name} from {origin}"
    kind = type(entry.default)
    try:
        if kind is bool and not isinstance(value, bool):
            value = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[str(value).lower()]
        elif kind is int and not isinstance(value, bool):
            value = parse_size(value, where) if entry.name.endswith("_memory") else int(value)
        elif kind is str:
            value = str(value)
        if type(value) is not kind:
            raise ValueError
    except (KeyError, ValueError, TypeError):
        raise UsageError(f"{where} is {value!r}, expected {kind.__name__}", param=entry.name) from None
    choices = entry.metadata["choices"]
    if choices and value not in choices:
        allowed = ", ".join(repr(c) for c in choices)
        raise UsageError(f"{where} is {value!r}, expected one of {allowed}", param=entry.name)
    least, most = entry.metadata["least"], entry.metadata["most"]
    if isinstance(value, int) and not least <= value <= most:
        wanted = f"{least} or more" if most == 2**62 else f"{least} to {most}"
        raise UsageError(f"{where} is {value}, expected {wanted}", param=entry.name)
    return value


def _unknown(name: str, origin: str, known: list[str]) -> UsageError:
    near = difflib.get_close_matches(name, known, 1)
    remedy = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known)}"
    return UsageError(f"unknown setting {name} from {origin}", remedy=remedy, param=name)


def config_path(environ: Mapping[str, str] | None = None) -> Path:
    """Where the settings file is looked for."""
    env = os.environ if environ is None else environ
    if env.get("INHOUSE_CONFIG"):
        return Path(env["INHOUSE_CONFIG"])
    base = env.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "inhouse" / "config.toml"


def load_settings(
    flags: Mapping[str, Any] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    path: Path | None = None,
) -> Settings:
    """Settings from all four places. `flags` that are None were not given. Raises UsageError."""
    env = os.environ if environ is None else environ
    table = {entry.name: entry for entry in Settings.table()}
    values: dict[str, Any] = {}
    file = config_path(env) if path is None else path
    if file.is_file():
        try:
            content = tomllib.loads(file.read_text("utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
            raise UsageError(f"cannot read the settings file {file}: {error}") from error
        for name, value in content.items():
            if name not in table:
                raise _unknown(name, str(file), list(table))
            values[name] = _convert(table[name], value, str(file))
    elif path is not None or env.get("INHOUSE_CONFIG"):
        raise UsageError(f"there is no settings file {file}")
    known = [f"INHOUSE_{name.upper()}" for name in table] + list(OTHER_ENVIRONMENT)
    for variable, text in env.items():
        if not variable.startswith("INHOUSE_") or variable in OTHER_ENVIRONMENT:
            continue
        name = variable.removeprefix("INHOUSE_").lower()
        if name not in table:
            raise _unknown(variable, "the environment", known)
        values[name] = _convert(table[name], text, f"${variable}")
    for name, value in (flags or {}).items():
        if name not in table:
            raise _unknown(name, "a flag", list(table))
        if value is not None:
            values[name] = _convert(table[name], value, f"--{name.replace('_', '-')}")
    return Settings(**values)
