"""Attention over the paged cache against the torch executor: masks, windows, biases, head shapes, KV types."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from inhouse.core.errors import UsageError
from inhouse.runtime.executor import KV_DTYPES, Executor
from inhouse.runtime.kv_codes import CODED_KV
from inhouse.runtime.ops import OPS, Builder
from inhouse.runtime.packed import pack_float
from inhouse.runtime.program import Attr, ProgramSet, StateGroup, StateKind, WeightSpec
from inhouse.runtime.step import Step
from tests.runtime_native.making import CONTEXT, F32, LEVELS, VOCAB, Model, OneOp, group, noise, steps, tokens, worst

pytestmark = [pytest.mark.native, pytest.mark.torch]


@dataclass(frozen=True)
class Case:
    """An attention op. Chunks are lists of (tokens in this step, position of the first) for each sequence."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    v_dim: int = 16
    slopes: bool = False
    sinks: bool = False
    relative: str = ""  # format of a table of relative bias
    kind: StateKind = StateKind.PAGED
    attrs: dict[str, Attr] = field(default_factory=dict)
    prefixes: tuple[int, ...] = ()
    chunks: tuple[tuple[int, ...], ...] = ((300, 5, 20), (1, 250, 1), (40, 1, 400))  # tokens of each sequence by step

    def model(self) -> Model:
        one = OneOp()
        names = [one.vector("slopes", abs(noise(1, self.heads)) * 0.1) if self.slopes else ""]
        if self.relative:
            names = [one.matrix("bias", noise(3, int(self.attrs["buckets"]), self.heads), self.relative)]
        names += [one.vector("sinks", noise(2, self.heads))] if self.sinks else []
        attrs: dict[str, Attr] = {"group": "kv", "scale": self.head_dim**-0.5, **self.attrs}
        attrs |= {name: getattr(self, name) for name in ("heads", "kv_heads", "head_dim", "v_dim")}
        attrs["bias"] = "alibi" if self.slopes else "relative" if self.relative else "none"
        widths = [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.v_dim]
        if attrs.get("v_from_k"):
            widths.pop()
        window = int(attrs.get("window", 0))
        kept = group(1, self.kv_heads, self.head_dim, self.v_dim, window)
        kept = replace(kept, kind=self.kind) if self.kind is not StateKind.PAGED else kept
        kept = replace(kept, sink=int(attrs.get("sink", 0)), stride=int(attrs.get("stride", 0)))
        return one.build("attention", widths, names, attrs, groups=[kept])


CASES = {
    "gqa": Case(),
    "odd-dim": Case(head_dim=21, v_dim=7),
    "mha-tiny-heads": Case(heads=8, kv_heads=8, head_dim=8, v_dim=8),
    "mqa": Case(heads=7, kv_heads=1, head_dim=32, v_dim=32),
    "odd-heads": Case(head_dim=20, v_dim=20),
    "v-differs": Case(head_dim=48, v_dim=33),
    "long-heads": Case(heads=3, kv_heads=1, head_dim=128, v_dim=128),
    "window": Case(attrs={"window": 37}),
    "wide-window": Case(attrs={"window": 300}),
    "sink": Case(attrs={"window": 37, "sink": 16}),
    "stride": Case(attrs={"window": 50, "stride": 3}),
    "sink-and-stride": Case(
        attrs={"window": 33, "sink": 48, "stride": 2, "softcap": 4.0},
        sinks=True,
        chunks=((300, 5, 20), (1, 250, 1), (300, 1, 550)),
    ),
    "sink-of-the-whole": Case(attrs={"window": 20, "sink": 1024}),
    "softcap": Case(attrs={"softcap": 2.0}),
    "alibi": Case(slopes=True),
    "sinks": Case(sinks=True),
    "all-at-once": Case(slopes=True, sinks=True, attrs={"softcap": 5.0, "window": 100}),
    "head-dim-80": Case(heads=2, kv_heads=2, head_dim=80, v_dim=80, chunks=((40, 5), (1, 250))),
    "head-dim-96-112": Case(heads=4, kv_heads=1, head_dim=96, v_dim=112, chunks=((40, 5), (1, 250))),
    "head-dim-256": Case(heads=2, kv_heads=1, head_dim=256, v_dim=256, chunks=((40, 5), (1, 250))),
    "latent": Case(
        heads=5,
        kv_heads=1,
        head_dim=72,
        v_dim=64,
        kind=StateKind.LATENT,
        attrs={"v_from_k": True},
        chunks=((300, 5), (1, 280)),
    ),
    "latent-deepseek": Case(
        heads=16,
        kv_heads=1,
        head_dim=576,
        v_dim=512,
        kind=StateKind.LATENT,
        attrs={"v_from_k": True},
        chunks=((20, 1), (1, 30)),
    ),
    "relative-encoder": Case(
        relative="f32", attrs={"mask": "bidirectional", "buckets": 32, "max_distance": 128}, chunks=((400, 17, 1),)
    ),
    "relative-decoder": Case(relative="f16", attrs={"buckets": 32, "max_distance": 128}),
    "relative-small": Case(relative="bf16", sinks=True, attrs={"buckets": 8, "max_distance": 20, "softcap": 3.0}),
    "prefix": Case(attrs={"mask": "prefix"}, prefixes=(290, 5, 0), chunks=((300, 5, 20), (1, 250, 1))),
    "bidirectional": Case(attrs={"mask": "bidirectional"}, chunks=((300, 17, 1),)),
    "bidirectional-window": Case(attrs={"mask": "bidirectional", "window": 40}, chunks=((600, 17, 1),)),
}


def tolerance(kv_dtype: str) -> float:
    """The op's; over int8 K and V the native executor also turns queries and weights into 16-bit integers; over bf16 a
    weight in the middle of two numbers may be rounded to either."""
    return {"int8": 2e-4, "bf16": 1.5e-3}.get(kv_dtype, OPS["attention"].tolerance)


def disagree(found: F32, expected: F32, kv_dtype: str) -> str:
    """Empty if the two are as near as the KV type allows; of bf16 nearly all elements as near as of f32."""
    off = worst(found, expected)
    apart = float(np.mean(np.abs(found - expected) > OPS["attention"].tolerance * np.abs(expected).max()))
    return "" if off <= tolerance(kv_dtype) and (apart <= 0.04 or kv_dtype == "int8") else f"off {off}, {apart} apart"


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_attention_agrees_with_torch(name: str, kv_dtype: str) -> None:
    case = CASES[name]
    model = case.model()
    torch = model.torch(kv_dtype=kv_dtype)
    natives = [model.native(isa=level, kv_dtype=kv_dtype, threads=t) for level in LEVELS for t in (1, 3)]
    firsts = [0] * len(case.chunks[0])
    for number, sizes in enumerate(case.chunks):
        chunks = [(tokens(100 * number + n, size), firsts[n]) for n, size in enumerate(sizes)]
        step = steps(model.programs, chunks, blocks_each=40)
        if case.prefixes:
            step = replace(step, prefixes=np.array(case.prefixes, np.int32))
        expected = torch.run("step", step)["out0"]
        for native in natives:
            found = native.run("step", step)["out0"]
            assert not disagree(found, expected, kv_dtype), (native.name, number)
        firsts = [first + size for first, size in zip(firsts, sizes, strict=True)]


CODED = ("gqa", "mha-tiny-heads", "mqa", "odd-heads", "v-differs", "long-heads", "softcap", "alibi", "sinks",
         "head-dim-80", "relative-decoder")  # fmt: skip


@pytest.mark.parametrize("kv_dtype", CODED_KV)
@pytest.mark.parametrize("name", CODED)
def test_codes_agree_with_torch(name: str, kv_dtype: str) -> None:
    case = CASES[name]
    model = case.model()
    torch = model.torch(kv_dtype=kv_dtype)
    natives = [model.native(isa=level, kv_dtype=kv_dtype, threads=t) for level in LEVELS for t in (1, 3)]
    firsts = [0] * len(case.chunks[0])
    for number, sizes in enumerate(case.chunks):
        chunks = [(tokens(100 * number + n, size), firsts[n]) for n, size in enumerate(sizes)]
        step = steps(torch.programs, chunks, blocks_each=40)
        expected = torch.run("step", step)["out0"]
        for native in natives:
            assert worst(native.run("step", step)["out0"], expected) <= 2e-5, (native.name, number)
        firsts = [first + size for first, size in zip(firsts, sizes, strict=True)]


def _crossed() -> Model:
    """`encode` stores K and V of its tokens in a cross group and gives embeddings of their types; `step` attends it."""
    names = {"q": (VOCAB, 64), "k": (VOCAB, 32), "v": (VOCAB, 40), "types": (3, 8)}
    specs = {name: WeightSpec(name, shape, "embedding") for name, shape in names.items()}
    weights = {name: pack_float(noise(i, *shape), "f32") for i, (name, shape) in enumerate(names.items())}
    encode = Builder("encode", specs)
    k, v = (encode.one("embed", weights=[name]) for name in "kv")
    types = encode.one("embed", weights=["types"], source="types")
    encode.layer = 3
    encode.op("write_cross", k, v, group="cross")
    step = Builder("step", specs)
    q = step.one("embed", weights=["q"])
    step.layer = 3
    y = step.one(
        "attention", q, group="cross", cross=True, heads=4, kv_heads=2, head_dim=16, v_dim=20, scale=0.25
    )  # fmt: skip
    cross = StateGroup("cross", StateKind.CROSS, (3,), 2, 16, 20)
    other = StateGroup("kv", StateKind.PAGED, (3,), 2, 16, 16)
    programs = {"encode": encode.finish(types=types), "step": step.finish(out=y)}
    return Model(ProgramSet(programs, specs, (other, cross), VOCAB, CONTEXT), weights)


def _encode(model: Model, lengths: Sequence[int]) -> Step:
    step = steps(model.programs, [(tokens(70 + n, length), 0) for n, length in enumerate(lengths)], blocks_each=40)
    return replace(step, tables={"cross": step.tables["cross"]}, types=step.tokens % 3, sampled=step.sampled[:0])


def _cross_step(model: Model, chunks: Sequence[tuple[int, int]], lengths: Sequence[int]) -> Step:
    """Decoder rows: (tokens, position of the first) of each sequence; encoder lengths."""
    parts = [(tokens(9 + n, size), first) for n, (size, first) in enumerate(chunks)]
    step = steps(model.programs, parts, blocks_each=40)
    return replace(step, tables={"cross": step.tables["cross"]}, encoder_lengths=np.array(lengths, np.int32))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_cross_attention_agrees_with_torch(kv_dtype: str) -> None:
    model, lengths = _crossed(), (300, 1, 17)
    torch = model.torch(kv_dtype=kv_dtype)
    encode = _encode(model, lengths)
    wanted = torch.run("encode", encode)["types"]
    for level in LEVELS:
        native = model.native(isa=level, kv_dtype=kv_dtype, threads=2)
        assert np.array_equal(native.run("encode", encode)["types"], wanted)
        for chunks in ([(3, 0), (1, 500), (40, 7)], [(1, 3), (1, 501), (0, 0)]):
            step = _cross_step(model, chunks, lengths)
            expected = torch.run("step", step)["out"]
            assert not disagree(native.run("step", step)["out"], expected, kv_dtype), level


@pytest.mark.parametrize("level", LEVELS)
def test_cross_attention_has_the_bits_of_a_row_alone(level: str) -> None:
    model, lengths = _crossed(), (300, 33)
    native = model.native(isa=level, threads=2)
    native.run("encode", _encode(model, lengths))

    def rows(executor: Executor, size: int, first: int) -> F32:
        return executor.run("step", _cross_step(model, [(size, first), (2, 0)], lengths))["out"][:size].copy()

    whole = rows(native, 40, 0)
    line = tokens(9, 40)
    for i in (0, 1, 39):
        step = _cross_step(model, [(1, i), (0, 0)], lengths)
        step.tokens[0] = line[i]
        alone = model.native(isa=level, threads=1)
        alone.run("encode", _encode(model, lengths))
        assert np.array_equal(alone.run("step", step)["out"][0].view(np.uint32), whole[i].view(np.uint32))


def test_a_cross_step_without_encoded_positions_is_refused() -> None:
    model = _crossed()
    with pytest.raises(UsageError, match="encoder_lengths"):
        model.native().run("step", _cross_step(model, [(1, 0)], [0]))
