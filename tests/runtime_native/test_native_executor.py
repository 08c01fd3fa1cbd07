"""The executor's door: what it refuses, what it reports, and a mapping that is cut short under it."""

import mmap
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from inhouse.core.errors import CapacityError, ExecutorError, UnavailableError, UnsupportedError, UsageError
from inhouse.runtime import library as library_module
from inhouse.runtime.native import NativeExecutor
from inhouse.runtime.native_library import available_levels, default_threads, library
from inhouse.runtime.ops import Builder
from inhouse.runtime.packed import Packed
from inhouse.runtime.program import Attr, ProgramSet, StateGroup, StateKind, WeightSpec
from tests.runtime_native.making import CONTEXT, VOCAB, Model, OneOp, decoder, group, noise, steps, tokens

pytestmark = pytest.mark.native


def test_its_name_says_the_level() -> None:
    assert decoder().native(isa="scalar").name == "native/scalar"
    assert decoder().native().name == f"native/{os.environ.get('INHOUSE_ISA') or available_levels()[-1]}"


def test_the_environment_forces_a_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INHOUSE_ISA", "scalar")
    assert decoder().native().name == "native/scalar"
    monkeypatch.setenv("INHOUSE_ISA", "avx1024")
    with pytest.raises(UnsupportedError, match="avx1024.*scalar, avx2, avx512, neon"):
        decoder().native()


def test_threads_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INHOUSE_THREADS", "3")
    assert default_threads() == 3
    monkeypatch.delenv("INHOUSE_THREADS")
    assert 1 <= default_threads() <= len(os.sched_getaffinity(0))


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INHOUSE_NATIVE_LIB", str(tmp_path / "none.so"))
    with pytest.raises(UnavailableError, match=r"none\.so"):
        library()
    (tmp_path / "none.so").write_bytes(b"not a library")
    with pytest.raises(UnavailableError, match="cannot open"):
        library_module.load_library(tmp_path / "none.so")


def _routed() -> ProgramSet:
    specs = {"table": WeightSpec("table", (VOCAB, 5000), "embedding")}
    builder = Builder("step", specs)
    x = builder.one("embed", weights=["table"])
    builder.layer = 5
    return ProgramSet({"step": builder.finish(out=builder.one("route", x, top_k=2))}, specs, (), VOCAB, CONTEXT)


def test_ops_that_it_lacks_are_refused_by_name_and_layer() -> None:
    model = OneOp().build("add", [5000, 5000])
    with pytest.raises(UnsupportedError, match=r"cannot run route \(layer 5\): 2 of 5000 experts"):
        NativeExecutor(_routed(), {"table": model.weights["in0"]})


def test_attention_that_contradicts_itself_is_refused() -> None:
    shape: dict[str, Attr] = {"group": "kv", "heads": 2, "kv_heads": 2, "head_dim": 16, "v_dim": 16, "scale": 0.25}
    model = OneOp().build("attention", [32, 32, 32], attrs=shape | {"bias": "relative"}, groups=[group()])
    with pytest.raises(UnsupportedError, match=r"attention \(layer 0\): .*bias=relative"):
        model.native()


def test_state_that_it_lacks_is_refused() -> None:
    model = decoder()
    recurrent = StateGroup("memory", StateKind.RECURRENT, (4,), 1, 8, 8)
    programs = replace(model.programs, groups=(*model.programs.groups, recurrent))
    with pytest.raises(UnsupportedError, match=r"recurrent state group 'memory' \(layer 4\)"):
        NativeExecutor(programs, model.weights)


def test_wrong_weights_are_refused() -> None:
    model = decoder()
    missing = {name: weight for name, weight in model.weights.items() if name != "final_norm"}
    with pytest.raises(UsageError, match="'final_norm' is missing"):
        NativeExecutor(model.programs, missing)
    with pytest.raises(UsageError, match="shape"):
        NativeExecutor(model.programs, {**model.weights, "final_norm": noise(1, 5)})


def test_bad_options_are_refused() -> None:
    model = decoder()
    with pytest.raises(UnsupportedError, match="KV type"):
        model.native(kv_dtype="f8")
    with pytest.raises(UsageError, match="0 threads"):
        model.native(threads=0)
    with pytest.raises(UnsupportedError, match="no program 'encode'"):
        model.native().run("encode", steps(model.programs, []))


def test_adapters_are_refused_not_ignored() -> None:
    model = decoder()
    step = replace(steps(model.programs, [([1, 2], 0)]), adapters=np.ones(1, np.int32))
    with pytest.raises(UnsupportedError, match="no adapter in slot 1"):
        model.native().run("step", step)


def test_more_blocks_than_memory_is_a_capacity_error() -> None:
    model = decoder()
    executor = model.native()
    with pytest.raises(CapacityError, match="exceed the machine's memory"):
        executor.allocate({g.name: 1 << 50 for g in model.programs.groups})
    with pytest.raises(UsageError):  # nothing is allocated now, so no block id is valid
        executor.run("step", steps(model.programs, [([1], 0)]))


def test_blocks_out_of_range_are_refused() -> None:
    executor = decoder().native(blocks=4)
    name = executor.programs.groups[0].name
    with pytest.raises(UsageError, match="block 4 is not one of 4"):
        executor.read_blocks(name, np.array([4], np.int32))
    with pytest.raises(UsageError, match="block -1"):
        executor.copy_blocks(name, np.array([0], np.int32), np.array([-1], np.int32))
    with pytest.raises(UsageError, match="need data of shape"):
        executor.write_blocks(name, np.array([0], np.int32), np.zeros((1, 3), np.uint8))


def test_a_closed_executor_says_so() -> None:
    executor = decoder().native()
    executor.close()
    executor.close()
    with pytest.raises(UsageError, match="closed"):
        executor.run("step", steps(executor.programs, []))


def test_outputs_live_until_the_next_run() -> None:
    model = decoder()
    executor = model.native()
    step = steps(model.programs, [(tokens(1, 9), 0)])
    first = executor.run("step", step)["logits"]
    kept = first.copy()
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(executor.run("step", step)["logits"], kept)


def mapped(model: Model, path: Path) -> tuple[Model, mmap.mmap]:
    """The model with its packed weights in one file mapping."""
    packed = {name: weight for name, weight in model.weights.items() if isinstance(weight, Packed)}
    with path.open("wb") as file:
        for weight in packed.values():
            file.write(weight.data.tobytes())
    with path.open("r+b") as file:
        mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    view, at = np.frombuffer(mapping, np.uint8), 0
    weights = dict(model.weights)
    for name, weight in packed.items():
        weights[name] = replace(weight, data=view[at : at + weight.data.size])
        at += weight.data.size
    return Model(model.programs, weights), mapping


def test_a_truncated_file_fails_the_step_and_not_the_process(tmp_path: Path) -> None:
    whole = decoder(hidden=256, ffn=512)
    model, _mapping = mapped(whole, tmp_path / "weights")
    step = steps(model.programs, [(tokens(1, 9), 0)])
    executor = model.native()
    np.testing.assert_array_equal(executor.run("step", step)["logits"], whole.native().run("step", step)["logits"])
    os.truncate(tmp_path / "weights", 4096)
    for _ in range(2):
        with pytest.raises(ExecutorError, match="mapped weight") as caught:
            executor.run("step", step)
        assert "truncated under us" in caught.value.remedy
    assert np.isfinite(whole.native().run("step", step)["logits"]).all()  # other models go on


CRASH = """
import mmap, os, sys
from inhouse.runtime.native_library import library
import numpy as np
guarded = np.zeros(1 << 16, np.uint8)
handle = library().ih_guard_add(guarded.ctypes.data, guarded.nbytes)
with open(sys.argv[1], "wb") as file:
    file.write(bytes(1 << 16))
with open(sys.argv[1], "r+b") as file:
    mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
os.truncate(sys.argv[1], 0)
print("touching", flush=True)
mapping[40000]
print("alive", flush=True)
"""


def test_a_fault_outside_guarded_memory_ends_the_process_as_before(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CRASH, str(tmp_path / "file")], capture_output=True, text=True, check=False
    )
    assert done.stdout == "touching\n"
    assert done.returncode == -7  # SIGBUS
