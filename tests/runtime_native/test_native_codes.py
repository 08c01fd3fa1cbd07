"""K and V as codes: what an element may lose, what that may do to an attention's output, a needle far back, refusals,
and which form a query reads."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from inhouse.core.errors import UnsupportedError
from inhouse.plan import memory
from inhouse.runtime.kv_codes import CODED_KV, KV_TYPES, RECENT, code_state
from inhouse.runtime.packed import pack_float
from inhouse.runtime.program import StateKind
from inhouse.runtime.torch_coded import decode_block, encode_block
from tests.runtime_native.making import F32, LEVELS, Model, OneOp, decoder, group, noise, steps, tokens

pytestmark = [pytest.mark.native, pytest.mark.torch]

DIM, NEEDLE, QUESTION = 64, 7, 9


def attention() -> Model:
    """One head of 64 over K and V looked up by token."""
    attrs = {"group": "kv", "heads": 1, "kv_heads": 1, "head_dim": DIM, "v_dim": DIM, "scale": DIM**-0.5}
    return OneOp().build("attention", [DIM] * 3, [], attrs, groups=[group(1, 1, DIM, DIM)])


def table(model: Model, name: str) -> F32:
    weight = model.weights[name]
    return weight if isinstance(weight, np.ndarray) else weight.dequantize()


def outputs(model: Model, line: list[int], kv_dtype: str) -> F32:
    executor = model.native(kv_dtype=kv_dtype)
    return executor.run("step", steps(executor.programs, [(line, 0)], blocks_each=60))["out0"].copy()


@pytest.mark.parametrize("bits", [(4, 4), (8, 4), (4, 8)])
def test_no_element_loses_more_than_half_a_step(bits: tuple[int, int]) -> None:
    kept = replace(group(1, 2, 48, 40), k_bits=bits[0], v_bits=bits[1])
    scales = np.exp(noise(3, 1, 1, 2, 48))  # channels of very different size, and far from zero
    k = torch.from_numpy((noise(1, 5, 16, 2, 48) + 3 * noise(4, 1, 1, 2, 48)) * scales).half()
    v = torch.from_numpy(noise(2, 5, 16, 2, 40)).half()
    near_k, near_v = decode_block(kept, encode_block(kept, k, v))
    wide = (k.float().amax(1) - k.float().amin(1)) / (2 ** bits[0] - 1)
    coarse = wide.amax(-1, keepdim=True) / 255  # the unit that scales are rounded up to
    lows = k.float().amin(1)
    slack = (lows.amax(-1, keepdim=True) - lows.amin(-1, keepdim=True)) / 255 / (2 ** bits[0] - 1)
    assert ((near_k - k.float()).abs().amax(1) <= 0.5001 * (wide + slack + 1.001 * coarse + slack)).all()
    for first in (0, 32):
        part = v[..., first : first + 32].float()
        step = (part.amax(-1) - part.amin(-1)) / (2 ** bits[1] - 1)
        assert ((near_v[..., first : first + 32] - part).abs().amax(-1) <= 0.502 * step + 1e-3).all()


def test_what_is_not_finite_stays_so() -> None:
    kept = replace(group(1, 1, 16, 16), k_bits=4, v_bits=4)
    k, v = torch.zeros(1, 16, 1, 16).half(), torch.zeros(1, 16, 1, 16).half()
    k[0, 3, 0, 2] = torch.inf
    v[0, 5, 0, 0] = torch.nan
    near_k, near_v = decode_block(kept, encode_block(kept, k, v))
    assert near_k.isnan().all()
    assert near_v[0, 5].isnan().all()
    assert (near_v[0, :5] == 0).all()


@pytest.mark.parametrize("kv_dtype", CODED_KV)
def test_the_output_is_within_the_bound(kv_dtype: str) -> None:
    """With scores off by at most d and values by at most e, an output is off by at most e + (exp(2 d) - 1) * spread."""
    model, line = attention(), tokens(1, 700)
    wanted, found = outputs(model, line, "f32"), outputs(model, line, kv_dtype)
    k_bits, v_bits = CODED_KV[kv_dtype]
    keys, values, queries = (table(model, name) for name in ("in1", "in2", "in0"))
    spread = float(values.max() - values.min())
    step_k, step_v = float(keys.max() - keys.min()) / (2**k_bits - 1), spread / (2**v_bits - 1)
    far = np.arange(700) >= RECENT + 16
    for p in np.flatnonzero(far)[::37]:
        off = float(np.abs(queries[line[p]]).sum()) * DIM**-0.5 * 0.52 * step_k
        assert np.abs(found[p] - wanted[p]).max() <= 0.52 * step_v + np.expm1(2 * off) * spread
    assert np.array_equal(found[: RECENT + 16], outputs(model, line, "f16")[: RECENT + 16]), "recent positions are f16"
    typical = float(np.abs(found[far] - wanted[far]).mean() / np.abs(wanted[far]).mean())
    assert 1e-4 < typical < 0.15


@pytest.mark.parametrize("kv_dtype", KV_TYPES)
@pytest.mark.parametrize("depth", [0, 15, 333, 700])
def test_a_needle_is_found(kv_dtype: str, depth: int) -> None:
    """One key among 900 answers the question at the end: its value comes back."""
    model = attention()
    queries, keys = table(model, "in0").copy(), table(model, "in1")
    queries[QUESTION] = keys[NEEDLE] * 3
    weights = dict(model.weights) | {"in0": pack_float(queries, "f32")}
    line = [t if t != NEEDLE else t + 1 for t in tokens(5, 899)] + [QUESTION]
    line[depth] = NEEDLE
    found = outputs(Model(model.programs, weights), line, kv_dtype)[-1]
    value = table(model, "in2")[NEEDLE]
    assert float(found @ value / np.linalg.norm(found) / np.linalg.norm(value)) > 0.99


def test_positions_alone_say_what_is_read_as_codes() -> None:
    """A row changes when the block that ends 128 positions before it becomes codes for it, and not one row earlier."""
    model, line = attention(), tokens(2, 400)
    coded, wide = outputs(model, line, "int4"), outputs(model, line, "f16")
    same = (coded == wide).all(axis=1)
    assert same[: RECENT + 16].all()
    assert not same[RECENT + 16 :].any()


def test_groups_and_bytes() -> None:
    model = decoder()
    programs = code_state(model.programs, "int4")
    full, recent, sliding = programs.groups
    assert (full.k_bits, full.v_bits, full.window) == (4, 4, 0)
    assert (recent.name, recent.kind, recent.window) == ("full.recent", StateKind.WINDOW, RECENT + 1)
    assert sliding == model.programs.groups[1], "a window is bounded and stays as it is"
    assert code_state(model.programs, "f16") is model.programs
    wide = replace(full, k_bits=0, v_bits=0, head_dim=64, v_dim=64)
    coded = replace(wide, k_bits=4, v_bits=4)
    assert memory.block_bytes(coded, "int4") == 2 * 81 * 16
    assert memory.block_bytes(wide, "int4") == memory.block_bytes(wide, "f16") == 2 * 256 * 16
    executor = model.native(kv_dtype="int4")
    for kept in executor.programs.groups:
        assert executor.read_blocks(kept.name, np.zeros(1, np.int32)).nbytes == memory.block_bytes(kept, "int4")
    shares = memory.share_groups(programs)
    assert [kept.name for kept in shares.own] == ["full", "full.recent", "window40"]


@pytest.mark.parametrize("level", LEVELS[:1])
def test_a_model_without_full_causal_attention_is_refused(level: str) -> None:
    with pytest.raises(UnsupportedError, match="int4 is for causal attention over all positions"):
        decoder(windows=(40, 40)).native(isa=level, kv_dtype="int4")
    with pytest.raises(UnsupportedError, match="no KV type"):
        decoder().native(isa=level, kv_dtype="int3")
