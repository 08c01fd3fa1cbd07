"""`inhouse show`: what a model is. Reads headers and the tokenizer; never weights."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from inhouse.cli.commands import common
from inhouse.cli.output import human_bytes, print_json, print_note, print_pairs, print_table
from inhouse.load.bind import Plan, plan_binding
from inhouse.load.describe import Described, describe, licence, read_tokenizer
from inhouse.load.locate import Located, locate
from inhouse.load.packing import Part
from inhouse.model.build import build
from inhouse.model.rewrite import quantize_activations
from inhouse.model.tokens.tokenizer import Tokenizer
from inhouse.runtime.packed import packed_nbytes
from inhouse.runtime.program import ProgramSet
from inhouse.store.home import Home
from inhouse.store.store import Store

app = common.app()


@dataclass(frozen=True, slots=True)
class _Shown:
    """A model with its header read and everything planned that loading would do."""

    located: Located
    described: Described
    programs: ProgramSet  # what the executor would run
    plan: Plan
    tokenizer: Tokenizer


@app.command(epilog="Example: inhouse show demo --program")
def command(
    model: common.Reference,
    program: Annotated[bool, typer.Option("--program", help="the Programs that the executor would run")] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="every weight: as stored, and as packed")] = False,
    quantize: common.Quantize = None,
    context: common.Context = None,
    json: common.Json = False,
) -> None:
    """Shows a model: shapes, files, formats, lineage, aliases, context, licence; its Programs; its tensors."""
    settings = common.settings(quantize=quantize, context=context)
    home = Home.find()
    located = locate(model, home)
    described = describe(located.path, settings.context or None)
    try:
        plain = build(described.spec)
        plan = plan_binding(described.source, described.spec, described.family, plain, settings.quantize or None)
        programs = quantize_activations(plain, plan.formats)
        shown = _Shown(located, described, programs, plan, read_tokenizer(described))
        for note in plan.notes:
            print_note(note)
        if program:
            _show_program(programs, json)
        if tensors:
            _show_tensors(plan, json)
        if not program and not tensors:
            _show_facts(_facts(shown, _lineage(located, home)), json)
    finally:
        described.source.close()


def _facts(shown: _Shown, lineage: Mapping[str, Any]) -> dict[str, Any]:
    """What the plain form says; sizes in bytes, KV a token in bytes of 16-bit elements."""
    located, described, spec = shown.located, shown.described, shown.described.spec
    stored: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    for name in described.source:
        info = described.source.info(name)
        stored[info.dtype][0] += 1
        stored[info.dtype][1] += info.nbytes
    packed: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    for part in shown.plan.parts:
        packed[part.format][0] += 1
        packed[part.format][1] += _packed_bytes(part)
    files = [{"path": file.name, "bytes": file.stat().st_size} for file in located.files]
    return {
        "name": located.name,
        "version": located.version or None,
        "path": str(located.path),
        "digest": located.digest,
        "format": described.source.format,
        "family": described.family.name,
        "architecture": described.architecture,
        "parameters": spec.parameters,
        "context": spec.context_length,
        "licence": licence(described) or None,
        "chat_template": sorted(shown.tokenizer.chat_templates),
        "tokens": shown.tokenizer.vocab_size,
        "sampling": dict(described.generation),
        "bytes": sum(file.stat().st_size for file in located.files),
        "files": files,
        "stored": {kind: {"tensors": count, "bytes": size} for kind, (count, size) in stored.items()},
        "packed": {kind: {"weights": count, "bytes": size} for kind, (count, size) in packed.items()},
        "kv_bytes_per_token": spec.kv_bytes_per_token(2),
        "spec": asdict(spec),
        **lineage,
    }


def _lineage(located: Located, home: Home) -> dict[str, Any]:
    """What the catalog says of a stored version; nothing of one that is not stored."""
    if not located.version:
        return {}
    with Store(home) as store:
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


def _show_facts(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(facts)
        return
    spec = facts["spec"]
    attention = f"{spec['heads']} heads of {spec['head_dim']}, {spec['kv_heads']} for keys and values"
    ref = f"{facts['name']}:{facts['version']}" if facts["version"] else f"{facts['name']} (not in the store)"
    templates = facts["chat_template"]
    pairs = {
        "model": ref,
        "aliases": ", ".join(facts.get("aliases", [])),
        "family": f"{facts['family']} ({facts['architecture']})",
        "parameters": f"{facts['parameters']:,}",
        "shape": f"{spec['layers']} layers, hidden {spec['hidden']}, FFN {spec['ffn']}, {attention}",
        "vocabulary": f"{facts['tokens']} tokens, {spec['vocab_size']} rows{', tied head' if spec['tied'] else ''}",
        "context": f"{facts['context']} tokens, {human_bytes(facts['kv_bytes_per_token'])} of KV cache each at 16 bits",
        "chat template": "none of its own; chats are written as ChatML" if not templates else ", ".join(templates),
        "sampling": ", ".join(f"{k} {v}" for k, v in facts["sampling"].items()),
        "licence": facts["licence"] or "not stated",
        "stored as": _kinds(facts["stored"], "tensors"),
        "packed as": _kinds(facts["packed"], "weights"),
        "files": f"{len(facts['files'])}, {human_bytes(facts['bytes'])}, {facts['format']}",
        "origin": facts.get("origin"),
        "made of": " by ".join(filter(None, [facts.get("parent"), facts.get("how")])),
        "children": ", ".join(facts.get("children", [])),
        "created": facts.get("created"),
        "digest": facts["digest"],
        "path": facts["path"],
    }
    print_pairs({name: text for name, text in pairs.items() if text})
    print()
    print_table([file | {"bytes": human_bytes(file["bytes"])} for file in facts["files"]], ["path", "bytes"])


def _kinds(kinds: Mapping[str, Mapping[str, int]], word: str) -> str:
    return ", ".join(f"{kind} ({of[word]} {word}, {human_bytes(of['bytes'])})" for kind, of in kinds.items())


def _show_program(programs: ProgramSet, as_json: bool) -> None:
    """The Programs as text; with the state that they keep."""
    groups = [asdict(group) for group in programs.groups]
    if as_json:
        texts = {name: program.format().splitlines() for name, program in programs.programs.items()}
        print_json({"version": programs.version, "programs": texts, "state": groups})
        return
    for program in programs.programs.values():
        print(program.format())
    for group in programs.groups:
        kept = f"{group.kv_heads} heads of {group.head_dim} + {group.v_dim}" + (
            f", the last {group.window} positions" if group.window else ""
        )
        print(f"state {group.name}: {group.kind}, {len(group.layers)} layers, {kept}")


def _show_tensors(plan: Plan, as_json: bool) -> None:
    """One row a canonical weight, in the order of the forward pass."""
    rows = [
        {
            "name": part.spec.name,
            "shape": list(part.spec.shape),
            "kind": part.spec.kind,
            "layout": part.format,
            "bytes": _packed_bytes(part),
            "source": part.info.name,
            "stored": part.info.dtype,
            "stored_bytes": part.info.nbytes,
        }
        for part in plan.parts
    ]
    if as_json:
        print_json(rows)
        return
    texts = [row | {"shape": "x".join(map(str, part.spec.shape))} for row, part in zip(rows, plan.parts, strict=True)]
    print_table(texts, ["name", "shape", "layout", "bytes", "source", "stored", "stored_bytes"])


def _packed_bytes(part: Part) -> int:
    shape = part.spec.shape
    if part.format == "vector":
        count = 1
        for size in shape:
            count *= size
        return 4 * count
    return packed_nbytes(part.format, (shape[0], shape[1]))
