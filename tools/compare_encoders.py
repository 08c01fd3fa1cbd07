"""Compares our block encoders with ggml's own over rows of a float model: the squared error of each, and the ratio.

    tools/compare_encoders.py LIBGGML_BASE.so MODEL.safetensors|MODEL.gguf [--rows N]

LIBGGML_BASE.so is llama.cpp's libggml-base as a shared library. Matrices whose width is a multiple of 256 are read, up
to N rows of each (spread evenly). Prints a table in Markdown; exits with 1 where ours is above ggml's by more than 2 %.
"""

import argparse
import ctypes
import sys
from pathlib import Path

import gguf
import numpy as np

from inhouse.runtime.encode import encodable, encode_rows
from inhouse.runtime.packed_pack import Packer
from inhouse.store.source import materialise, open_source

LIMIT = 1.02


def ggml_values(
    lib: ctypes.CDLL, kind: gguf.GGMLQuantizationType, rows: np.ndarray, weights: np.ndarray | None
) -> np.ndarray:
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    out = np.zeros((len(rows), rows.shape[1] // elements * nbytes), np.uint8)
    quantize = lib.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    pointer = None if weights is None else ctypes.c_void_p(weights.ctypes.data)
    quantize(
        ctypes.c_int(int(kind)), ctypes.c_void_p(rows.ctypes.data), ctypes.c_void_p(out.ctypes.data),
        ctypes.c_int64(0), ctypes.c_int64(len(rows)), ctypes.c_int64(rows.shape[1]), pointer,
    )  # fmt: skip
    values: np.ndarray = gguf.quants.dequantize(out, kind)
    return values


def our_values(name: str, rows: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    packer = Packer(name, (rows.shape[0], rows.shape[1]))
    packer.add(encode_rows(name, rows, weights))
    return packer.finish().dequantize()


def sample(path: Path, count: int) -> list[np.ndarray]:
    source = open_source(path)
    found = []
    for name in source:
        shape = source.info(name).shape
        if len(shape) == 2 and shape[1] % 256 == 0:
            values = materialise(source, name)
            found.append(np.ascontiguousarray(values[:: max(1, len(values) // count)][:count], np.float32))
    return found


def error(rows: np.ndarray, values: np.ndarray, weights: np.ndarray | None) -> float:
    squares = (values.astype(np.float64) - rows) ** 2
    return float((squares if weights is None else squares * weights).sum())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=int, default=64)
    options = parser.parse_args()
    lib = ctypes.CDLL(str(options.library.resolve()))
    matrices = sample(options.model, options.rows)
    rng, worst = np.random.default_rng(0), 0.0
    print(f"{options.model.name}: {len(matrices)} matrices, up to {options.rows} rows of each")
    print("| type | ours, relative | ggml, relative | ours / ggml | with importance: ours / ggml |")
    print("|---|---|---|---|---|")
    for name in encodable():
        kind = gguf.GGMLQuantizationType[name.upper()]
        sums = np.zeros(5)
        for rows in matrices:
            weights = np.asarray(rng.gamma(0.5, 1.0, rows.shape[1]) + 0.01, np.float32)
            sums += (
                error(rows, our_values(name, rows, None), None), error(rows, ggml_values(lib, kind, rows, None), None),
                error(rows, our_values(name, rows, weights), weights),
                error(rows, ggml_values(lib, kind, rows, weights), weights), error(rows, np.zeros_like(rows), None),
            )  # fmt: skip
        ratio, weighted = sums[0] / sums[1], sums[2] / sums[3]
        worst = max(worst, ratio)
        print(f"| {name} | {sums[0] / sums[4]:.3e} | {sums[1] / sums[4]:.3e} | {ratio:.4f} | {weighted:.4f} |")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
