"""Decode over a long context: full attention, a window, a window with sinks and strided blocks, and codes of K and V,
in turns on one random model. Figures go to docs/compression-results.json.

    python -m bench.compress.sparse_attention [--context 32768] [--threads N] [--rounds 5]
"""

import argparse
import statistics
import time
from collections.abc import Mapping

import numpy as np
from bench.compress.results import record

from inhouse.model.build import build
from inhouse.model.spec import ModelSpec, RopeSpec
from inhouse.plan.memory import sequence_bytes
from inhouse.runtime.executor import Weight
from inhouse.runtime.native import NativeExecutor
from inhouse.runtime.packed import quantize
from inhouse.runtime.step import BLOCK_SIZE, Step

COMMAND = "python -m bench.compress.sparse_attention"
VOCAB, FIRST = 512, 256  # tokens that are really computed; their blocks fill the rest of the cache
VARIANTS: Mapping[str, tuple[str, dict[str, object]]] = {
    "full": ("f16", {}),
    "window-4k": ("f16", {"windows": (4096,) * 4}),
    "window-4k-sink-64": ("f16", {"windows": (4096,) * 4, "window_sink": 64}),
    "window-2k-stride-16": ("f16", {"windows": (2048,) * 4, "window_sink": 64, "window_stride": 16}),
    "full-int8": ("int8", {}),
    "full-int4": ("int4", {}),
}


def open_variant(name: str, context: int, threads: int) -> NativeExecutor:
    """An executor of a four-layer Llama (hidden 512, 8 query and 4 key-value heads of 64) with `context` cached."""
    kv_dtype, changes = VARIANTS[name]
    fields: dict[str, object] = {
        "family": "llama", "hidden": 512, "layers": 4, "heads": 8, "kv_heads": 4, "head_dim": 64, "ffn": 1024,
        "vocab_size": VOCAB, "context_length": context + 64, "rope": RopeSpec(dim=64, theta=5e5), "norm_eps": 1e-5,
        "tied": True,
    }  # fmt: skip
    programs = build(ModelSpec(**(fields | changes)))  # type: ignore[arg-type]
    rng, weights = np.random.default_rng(0), dict[str, Weight]()
    for key, spec in programs.weights.items():
        scale = 1.0 if len(spec.shape) == 1 else spec.shape[-1] ** -0.5
        values = (rng.standard_normal(spec.shape, np.float32) * scale).astype(np.float32)
        weights[key] = quantize(values, "q8") if values.ndim == 2 else np.ones_like(values)
    executor = NativeExecutor(programs, weights, threads=threads, kv_dtype=kv_dtype)
    fill(executor, context)
    return executor


def fill(executor: NativeExecutor, context: int) -> None:
    """The blocks of FIRST computed tokens, over and over, as the state of `context` tokens."""
    count = context // BLOCK_SIZE + 4
    executor.allocate({group.name: count for group in executor.programs.groups})
    executor.run("step", step(executor, 0, FIRST, count))
    made = np.arange(FIRST // BLOCK_SIZE, dtype=np.int32)
    for group in executor.programs.groups:
        bytes_ = executor.read_blocks(group.name, made)
        for at in range(0, count - made.size, made.size):
            executor.write_blocks(group.name, made + at, bytes_)


def step(executor: NativeExecutor, first: int, size: int, blocks: int) -> Step:
    """`size` tokens of one sequence from position `first` on, the last one sampled."""
    table = np.arange(blocks, dtype=np.int32)[None]
    return Step(
        tokens=(np.arange(first, first + size) * 37 % VOCAB).astype(np.int32),
        positions=np.arange(first, first + size, dtype=np.int32), sequences=np.zeros(size, np.int32),
        lengths=np.array([first + size], np.int32),
        tables={group.name: table for group in executor.programs.groups},
        sampled=np.array([size - 1], np.int32), adapters=np.zeros(1, np.int32),
    )  # fmt: skip


def decode_seconds(executor: NativeExecutor, context: int, steps: int) -> float:
    """Median seconds of a step of one token at the end of the context."""
    taken = []
    for i in range(steps):
        one = step(executor, context + i, 1, context // BLOCK_SIZE + 4)
        begin = time.perf_counter()
        executor.run("step", one)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def main() -> None:
    """Measures and records."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--note", default="")
    args = parser.parse_args()
    opened = {name: open_variant(name, args.context, args.threads) for name in VARIANTS}
    for executor in opened.values():
        decode_seconds(executor, args.context, 2)
    rounds: dict[str, list[float]] = {name: [] for name in opened}
    for _ in range(args.rounds):
        for name, executor in opened.items():
            rounds[name].append(decode_seconds(executor, args.context, 8))
    full = statistics.median(rounds["full"])
    for name, seconds in rounds.items():
        took = statistics.median(seconds)
        size = sequence_bytes(opened[name].programs, VARIANTS[name][0], args.context, 512)
        print(f"{name}: {took * 1e3:.2f} ms a token, {full / took:.2f}x full, {size / 1e6:.1f} MB of state")
        record({
            "id": f"attention/{args.context}/{name}",
            "what": f"decode at {args.context} tokens, 4 layers of 8/4 heads of 64, {name}: speed over full f16",
            "value": round(full / took, 3), "goal": 3.0 if name == "window-4k" else None, "bytes": size,
            "seconds": round(took, 6), "command": COMMAND, "note": args.note,
        })  # fmt: skip


if __name__ == "__main__":
    main()
