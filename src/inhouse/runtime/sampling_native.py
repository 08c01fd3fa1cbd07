"""The native sampler: `runtime.sampling.Sampler` over libinhouse. The GIL is released while it draws."""

import ctypes

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import UsageError
from inhouse.runtime.native_library import check, library
from inhouse.runtime.sampling import F32, I32, ROW, U32

_POINTER, _I64 = ctypes.c_void_p, ctypes.c_int64


class NativeSampler:
    """See `Sampler` for the meaning of every argument. Raises UnavailableError if the library is not there."""

    def __init__(self) -> None:
        self._library = library()
        self._sample = self._library.ih_sample
        self._sample.argtypes = [_POINTER] * 9
        self._logprobs = self._library.ih_logprobs
        self._logprobs.argtypes = [_POINTER, _I64, _I64, _POINTER, _POINTER, _I64, _I64, *[_POINTER] * 5]
        self._uniform = self._library.ih_sample_uniform
        self._uniform.argtypes = [ctypes.c_uint64, _I64, ctypes.c_int32]
        self._uniform.restype = ctypes.c_double

    def sample(
        self, logits: F32, rows: npt.NDArray[np.void], bias_ids: I32, bias_values: F32, history: I32, masks: U32
    ) -> tuple[I32, I32]:
        count, vocab = len(rows), logits.shape[1]
        if masks.size and masks.shape[1] != -(-vocab // 32):
            raise UsageError(f"masks have {masks.shape[1]} words for a vocabulary of {vocab}")
        sizes = np.array([count, vocab, len(logits), bias_ids.size, history.size, len(masks)], np.int64)
        made = np.empty((2, count), np.int32)  # tokens, status
        arrays = (
            sizes, _as(logits, np.float32), _as(rows, ROW), _as(bias_ids, np.int32), _as(bias_values, np.float32),
            _as(history, np.int32), _as(masks, np.uint32),
        )  # fmt: skip
        # an empty array needs no address, and to ask numpy for one takes microseconds
        inputs = [array.ctypes.data if array.size else None for array in arrays]
        address = made.ctypes.data
        check(self._library, self._sample(*inputs, address, address + 4 * count))
        return made[0], made[1]

    def logprobs(self, logits: F32, logit_rows: I32, targets: I32, top: int) -> tuple[F32, I32, I32, F32, I32]:
        count, vocab = len(logit_rows), logits.shape[1]
        values, ranks = np.zeros(count, np.float32), np.zeros(count, np.int32)
        ids, likeliest = np.zeros((count, top), np.int32), np.zeros((count, top), np.float32)
        status = np.empty(count, np.int32)
        inputs = (_as(logits, np.float32), _as(logit_rows, np.int32), _as(targets, np.int32))
        outputs = [array.ctypes.data for array in (values, ranks, ids, likeliest, status)]
        logits_at, rows_at, targets_at = (array.ctypes.data for array in inputs)
        done = self._logprobs(logits_at, len(logits), vocab, rows_at, targets_at, count, top, *outputs)
        check(self._library, done)
        return values, ranks, ids, likeliest, status

    def uniform(self, seed: int, position: int, choice: int) -> float:
        """The u in [0, 1) of a draw."""
        return float(self._uniform(seed, position, choice))


def _as(array: npt.NDArray[np.generic], dtype: npt.DTypeLike) -> npt.NDArray[np.generic]:
    """The array itself, contiguous and of that dtype; a copy only where it is not."""
    return np.ascontiguousarray(array, dtype)
