"""Random matrices of the sparse and vector-coded formats, for tests."""

import numpy as np

from inhouse.runtime.packed import FORMATS, Packed, pack_codes
from inhouse.runtime.packed_layout import layout
from inhouse.runtime.packed_sparse import pack_columns, pack_vectors, to_sparse


def plain_matrix(name: str, shape: tuple[int, int], share: float, seed: int = 7) -> Packed:
    """A matrix in the base of a sparse format with so many codes that are not zero; 2:4 where the format asks it."""
    fmt = FORMATS[name]
    base, rng = FORMATS[fmt.base], np.random.default_rng(seed)
    codes = rng.integers(0, 1 << base.bits, shape, dtype=np.uint8)
    if fmt.coding == "pairs":
        fours = -(-shape[1] // 4)
        order = rng.random((shape[0], fours, 4)).argsort(axis=2)
        kept = ((order < 2) & (rng.random((shape[0], fours, 1)) < 2 * share)).reshape(shape[0], -1)[:, : shape[1]]
    else:
        kept = rng.random(shape) < share
    codes[codes == base.zero] += 1
    codes[~kept] = base.zero
    groups = layout(base, shape[1]).groups
    scales = rng.normal(size=(shape[0], groups)).astype(np.float16).astype(np.float32)
    return pack_codes(base.name, codes, scales)


def coded_matrix(name: str, shape: tuple[int, int], share: float = 0.5, seed: int = 7) -> Packed:
    """A random matrix of any coded format."""
    fmt, rng = FORMATS[name], np.random.default_rng(seed)
    if fmt.coding == "vectors":
        index = rng.integers(0, 256, (fmt.books, shape[0], shape[1] // 8), dtype=np.uint8)
        most = 127 // fmt.books
        books = rng.integers(-most, most + 1, (fmt.books, 256, 8)).astype(np.int8)
        scales = rng.normal(size=(shape[0], layout(fmt, shape[1]).groups)).astype(np.float16).astype(np.float32)
        return pack_vectors(name, index, books, scales)
    if name == "csr_bf16":
        kept = rng.random(shape) < share
        return pack_columns((rng.normal(size=shape) * kept).astype(np.float32))
    return to_sparse(plain_matrix(name, shape, share, seed), name)
