"""Attention over the paged cache against the torch executor: masks, windows, biases, head shapes, KV types."""

from dataclasses import dataclass, field

import pytest

from inhouse.runtime.ops import OPS
from inhouse.runtime.program import Attr
from tests.runtime_native.making import LEVELS, Model, OneOp, group, noise, steps, tokens, worst

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
    attrs: dict[str, Attr] = field(default_factory=dict)
    chunks: tuple[tuple[int, ...], ...] = ((300, 5, 20), (1, 250, 1), (40, 1, 400))  # tokens of each sequence by step

    def model(self) -> Model:
        one = OneOp()
        names = [one.vector("slopes", abs(noise(1, self.heads)) * 0.1) if self.slopes else ""]
        names += [one.vector("sinks", noise(2, self.heads))] if self.sinks else []
        attrs: dict[str, Attr] = {"group": "kv", "scale": self.head_dim**-0.5, **self.attrs}
        attrs |= {name: getattr(self, name) for name in ("heads", "kv_heads", "head_dim", "v_dim")}
        attrs["bias"] = "alibi" if self.slopes else "none"
        widths = [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.v_dim]
        window = int(attrs.get("window", 0))
        kept = group(1, self.kv_heads, self.head_dim, self.v_dim, window)
        return one.build("attention", widths, names, attrs, groups=[kept])


CASES = {
    "gqa": Case(),
    "mha-tiny-heads": Case(heads=8, kv_heads=8, head_dim=8, v_dim=8),
    "mqa": Case(heads=7, kv_heads=1, head_dim=32, v_dim=32),
    "odd-heads": Case(head_dim=20, v_dim=20),
    "v-differs": Case(head_dim=48, v_dim=33),
    "long-heads": Case(heads=3, kv_heads=1, head_dim=128, v_dim=128),
    "window": Case(attrs={"window": 37}),
    "wide-window": Case(attrs={"window": 300}),
    "softcap": Case(attrs={"softcap": 2.0}),
    "alibi": Case(slopes=True),
    "sinks": Case(sinks=True),
    "all-at-once": Case(slopes=True, sinks=True, attrs={"softcap": 5.0, "window": 100}),
    "bidirectional": Case(attrs={"mask": "bidirectional"}, chunks=((300, 17, 1),)),
    "bidirectional-window": Case(attrs={"mask": "bidirectional", "window": 40}, chunks=((600, 17, 1),)),
}


@pytest.mark.parametrize("kv_dtype", ["f32", "f16", "bf16"])
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
        expected = torch.run("step", step)["out0"]
        for native in natives:
            found = native.run("step", step)["out0"]
            assert worst(found, expected) <= OPS["attention"].tolerance, (native.name, number)
        firsts = [first + size for first, size in zip(firsts, sizes, strict=True)]
