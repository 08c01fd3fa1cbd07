"""What a model is, read from headers and the tokenizer; weights are read to count their zeros alone.

Knows how the rooms below describe a model; knows nothing of flags.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from inhouse.cli.output import human_bytes
from inhouse.load.bind import Plan, plan_binding
from inhouse.load.describe import Described, describe, licence, read_tokenizer
from inhouse.load.locate import Located, locate
from inhouse.load.packing import RUN_ELEMENTS, Part, make_weight
from inhouse.model.build import parameters
from inhouse.model.rewrite import order_columns, quantize_activations
from inhouse.model.tokens.tokenizer import Tokenizer
from inhouse.plan.memory import share_groups
from inhouse.runtime.executor import Weight
from inhouse.runtime.packed import Packed, packed_nbytes
from inhouse.runtime.program import ProgramSet
from inhouse.store.home import Home
from inhouse.store.store import Store
from inhouse.store.stored_source import StoredSource


@dataclass(frozen=True, slots=True)
class Opened:
    """A model whose headers were read, and everything that loading it would do."""

    located: Located
    described: Described
    programs: ProgramSet  # what the executor would run
    plan: Plan
    tokenizer: Tokenizer


@contextmanager
def open_headers(reference: str, quantize: str | None = None, context: int | None = None) -> Iterator[Opened]:
    """A model of the store, a folder or a file; loads no weights. Raises as `open_model` does."""
    located = locate(reference, Home.find())
    described = describe(located.path, context)
    try:
        plain = described.programs()
        plan = plan_binding(described.source, described.spec, described.family, plain, quantize)
        programs = quantize_activations(order_columns(plain, plan.columns), plan.formats)
        yield Opened(located, described, programs, plan, read_tokenizer(described))
    finally:
        described.source.close()


def facts(opened: Opened) -> dict[str, Any]:
    """Everything that `inhouse show --json` prints. Sizes in bytes; KV a token in bytes of 16-bit elements."""
    located, described, spec = opened.located, opened.described, opened.described.spec
    infos = [described.source.info(name) for name in described.source]
    files = [{"path": file.name, "bytes": file.stat().st_size} for file in located.files]
    return {
        "name": located.name,
        "version": located.version or None,
        "path": str(located.path),
        "digest": located.digest,
        "format": described.source.format,
        "family": described.family.name,
        "architecture": described.architecture,
        "parameters": parameters(spec),
        "context": spec.context_length,
        "licence": licence(described) or None,
        "chat_template": bool(opened.tokenizer.chat_templates),
        "chat_templates": sorted(opened.tokenizer.chat_templates),
        "tokens": opened.tokenizer.vocab_size,
        "sampling": dict(described.generation),
        "bytes": sum(file.stat().st_size for file in located.files),
        "files": files,
        "stored": _by_kind((info.dtype, info.nbytes) for info in infos),
        "packed": _by_kind((part.format, packed_bytes(part)) for part in opened.plan.parts),
        "kv_bytes_per_token": _kv_bytes(opened.programs),
        "kv_cache": getattr(spec, "kv_cache", "") or None,
        "notes": list(opened.plan.notes),
        "spec": asdict(spec),
        **_lineage(located),
    }


def _kv_bytes(programs: ProgramSet) -> int:
    """Bytes at 16 bits that a token takes, and with an encoder-decoder one of its input; scratch is not counted."""
    shares = share_groups(programs)
    return sum(group.bytes_per_token(2) for group in (*shares.own, *shares.cross))


def _by_kind(entries: Iterable[tuple[str, int]]) -> dict[str, dict[str, int]]:
    """Kind -> how many tensors are of it and their bytes together."""
    kinds: defaultdict[str, dict[str, int]] = defaultdict(lambda: {"tensors": 0, "bytes": 0})
    for kind, size in entries:
        kinds[kind]["tensors"] += 1
        kinds[kind]["bytes"] += size
    return dict(kinds)


def _lineage(located: Located) -> dict[str, Any]:
    """What the catalog says of a stored version; nothing of one that is not stored."""
    if not located.version:
        return {}
    with Store() as store:
        version = store.catalog.resolve(f"{located.name}:{located.version}")
        children = store.catalog.children(version.ref)
    return {
        "aliases": list(version.aliases),
        "origin": version.origin,
        "created": version.created,
        "parent": version.parent,
        "how": version.how,
        "children": children,
    }


def _shape(spec: Mapping[str, Any]) -> str:
    """Layers, widths and heads; of an encoder-decoder those of both sides."""
    if isinstance(spec.get("decoder"), Mapping):
        sides = (spec["encoder"], spec["decoder"])
        each = (
            f"{s['name']} of {s['layers']} layers, {s['heads']} heads of {s['head_dim']}, FFN {s['ffn']}" for s in sides
        )
        return f"hidden {spec['hidden']}, {', '.join(each)}"
    heads, head_dim = spec["heads"], spec.get("head_dim") or spec["hidden"] // spec["heads"]
    shared = f", {spec['kv_heads']} for keys and values" if "kv_heads" in spec else ""
    return f"{spec['layers']} layers, hidden {spec['hidden']}, FFN {spec['ffn']}, {heads} heads of {head_dim}{shared}"


def _no_template(spec: Mapping[str, Any]) -> str:
    if "classifier" in spec or spec.get("headless"):
        return ""  # it writes no text
    if "decoder" in spec:
        return "none of its own; the last message of a chat is read as it is"
    return "none of its own; chats are written as ChatML"


def fact_lines(facts: Mapping[str, Any]) -> dict[str, str]:
    """The same for people: title -> text, what is empty left out."""
    spec, stored = facts["spec"], facts["version"] is not None
    lines = {
        "model": f"{facts['name']}:{facts['version']}" if stored else f"{facts['name']} (not in the store)",
        "aliases": ", ".join(facts.get("aliases", [])),
        "family": f"{facts['family']} ({facts['architecture']})",
        "parameters": f"{facts['parameters']:,}",
        "shape": _shape(spec),
        "labels": ", ".join((spec.get("classifier") or {}).get("labels", ())),
        "vocabulary": f"{facts['tokens']} tokens, {spec['vocab_size']} rows{', tied head' if spec.get('tied') else ''}",
        "context": f"{facts['context']} tokens, {human_bytes(facts['kv_bytes_per_token'])} of KV cache each at 16 bits",
        "KV cache": f"{facts['kv_cache']}, unless --kv says otherwise" if facts["kv_cache"] else "",
        "chat template": ", ".join(facts["chat_templates"]) or _no_template(spec),
        "sampling": ", ".join(f"{name} {value}" for name, value in facts["sampling"].items()),
        "licence": facts["licence"] or "not stated",
        "stored as": _kinds(facts["stored"]),
        "packed as": _kinds(facts["packed"]),
        "files": f"{len(facts['files'])}, {human_bytes(facts['bytes'])}, {facts['format']}",
        "origin": facts.get("origin", ""),
        "made of": " by ".join(filter(None, [facts.get("parent"), facts.get("how")])),
        "children": ", ".join(facts.get("children", [])),
        "created": facts.get("created", ""),
        "digest": facts["digest"] or "",
        "path": facts["path"],
    }
    return {name: text for name, text in lines.items() if text}


def _kinds(kinds: Mapping[str, Mapping[str, int]]) -> str:
    return ", ".join(f"{kind} ({of['tensors']} tensors, {human_bytes(of['bytes'])})" for kind, of in kinds.items())


def tensor_rows(opened: Opened) -> list[dict[str, Any]]:
    """One row a canonical weight, in the order of the forward pass.

    `bytes` are those of the file (of a tensor with several weights in it, the weight's share), `zeros` the values that
    are exactly 0, `packed_bytes` what it takes once packed. Reads every weight.
    """
    source, rows = opened.described.source, []
    seen: set[str] = set()
    with opened.described.guard():
        for part in opened.plan.parts:
            if isinstance(source, StoredSource) and part.info.name in seen:
                continue  # the other way round of a side branch that has its row
            seen.add(part.info.name)
            rows.append(
                {
                    "name": part.spec.name,
                    "shape": list(part.spec.shape),
                    "kind": part.spec.kind,
                    "layout": part.format,
                    "bytes": stored_bytes(part),
                    "zeros": _zeros(make_weight(part, source)),
                    "packed_bytes": packed_bytes(part),
                    "source": part.info.name,
                    "stored": part.info.dtype,
                    "stored_bytes": part.info.nbytes,
                }
            )
    return rows


def stored_bytes(part: Part) -> int:
    """Bytes of a weight in the file: its share of the tensor that it lies in."""
    whole = math.prod(part.info.shape)
    return round(part.info.nbytes * math.prod(part.spec.shape) / whole) if whole else 0


def _zeros(weight: Weight) -> int:
    if not isinstance(weight, Packed):
        return int(weight.size - np.count_nonzero(weight))
    rows, width = weight.shape
    step = max(1, RUN_ELEMENTS // max(1, width))
    runs = (np.arange(start, min(start + step, rows)) for start in range(0, rows, step))
    return rows * width - sum(int(np.count_nonzero(weight.rows(run))) for run in runs)


def packed_bytes(part: Part) -> int:
    """Bytes of a weight once it is packed; a vector is float32."""
    shape = part.spec.shape
    return 4 * math.prod(shape) if part.format == "vector" else packed_nbytes(part.format, (shape[0], shape[1]))


def program_facts(programs: ProgramSet) -> dict[str, Any]:
    """The Programs line by line, and the state that they keep."""
    return {
        "version": programs.version,
        "programs": {name: program.format().splitlines() for name, program in programs.programs.items()},
        "state": [asdict(group) for group in programs.groups],
    }


def program_text(programs: ProgramSet) -> str:
    """The same for people."""
    lines = [program.format() for program in programs.programs.values()]
    for group in programs.groups:
        kept = f"{group.kv_heads} heads of {group.head_dim} + {group.v_dim}"
        window = f", the last {group.window} positions" if group.window else ""
        lines.append(f"state {group.name}: {group.kind}, {len(group.layers)} layers, {kept}{window}")
    return "\n".join(lines)
