"""Codes packed into 32-bit words: least significant bits first, dense across words, along the first axis.

32 codes of b bits take b words whatever b is: GPTQ's 3-bit layout and compressed-tensors' are both this stream.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
Array = npt.NDArray[Any]

RUN = 32  # codes that fill whole words


def word_count(count: int, bits: int) -> int:
    """Words that `count` codes take."""
    return -(-count * bits // 32)


def unpack_words(words: U32, bits: int, count: int) -> U8:
    """words [n, ...] -> codes uint8 [count, ...]; n is at least word_count(count, bits)."""
    runs = -(-count // RUN)
    if len(words) < runs * bits:  # the last run may be cut short
        words = np.concatenate([words, np.zeros((runs * bits - len(words), *words.shape[1:]), np.uint32)])
    grouped = words[: runs * bits].reshape(runs, bits, *words.shape[1:])
    codes = np.empty((runs, RUN, *words.shape[1:]), np.uint8)
    mask = np.uint32((1 << bits) - 1)
    for j in range(RUN):
        word, shift = divmod(j * bits, 32)
        value = grouped[:, word] >> np.uint32(shift)
        if shift + bits > 32:
            value = value | grouped[:, word + 1] << np.uint32(32 - shift)
        codes[:, j] = value & mask
    return codes.reshape(runs * RUN, *words.shape[1:])[:count]


def unpack_sparse_words(words: U32, bits: int, count: int) -> U8:
    """The same where each word holds floor(32 / bits) codes and its top bits are unused."""
    per = 32 // bits
    codes = np.empty((len(words), per, *words.shape[1:]), np.uint8)
    for j in range(per):
        codes[:, j] = (words >> np.uint32(j * bits)) & np.uint32((1 << bits) - 1)
    return codes.reshape(len(words) * per, *words.shape[1:])[:count]
