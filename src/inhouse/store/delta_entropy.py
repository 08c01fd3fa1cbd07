"""Entropy coding of small integers under contexts that both sides know: adaptive counts and interleaved rANS in numpy.

An asymmetric numeral system (Duda 2013, arXiv 1311.2540; interleaved and vectorised after Giesen 2014, arXiv
1402.3392): the elements are cut into lanes that are coded side by side, one element of each at a step, so that a step
is a few numpy operations. Counts are kept for each context; all lanes learn from all. Everything is integer
arithmetic, so that a payload means the same on every machine. Knows integers and contexts; not what they stand for.

    payload   u32 words, u32 bytes of low bits, a u32 state for each lane, u16 words in the order in which they are
              read, then the low bits of large values: all those of class 4, then of class 5, ...
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import FormatError

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]
Ints = npt.NDArray[np.int64]

FIRST = (
    4  # values below 2^FIRST are symbols of their own; above, the values from 2^k on are one, their k low bits apart
)
SYMBOLS = (1 << FIRST) + 16 - FIRST
BITS = 13  # of a probability
WHOLE = 1 << BITS
LOWEST = 1 << 16  # of a state
LANES = 4096
LEAST = 2048  # elements a lane, so that its state weighs little
BLOCK = 32  # steps at most between two looks at the counts
SEEN = 64  # what a symbol adds to its count
_N, _16 = np.uint32(BITS), np.uint32(16)


class _Model:
    """Counts of symbols in each context, as shares of WHOLE. `shares` and `starts`, uint32 [contexts * SYMBOLS], are
    what the counts were at the last `learn`."""

    def __init__(self, contexts: int) -> None:
        expected = 64 >> np.minimum(np.arange(SYMBOLS) // 2, 6)  # before anything was seen: the smaller the likelier
        self._counts: Ints = np.tile(expected.astype(np.int64), (contexts, 1))
        self.learn(np.empty(0, np.int64))

    def learn(self, at: Ints) -> None:
        """Takes symbols in, as context * SYMBOLS + symbol."""
        self._counts += SEEN * np.bincount(at.reshape(-1), minlength=self._counts.size).reshape(self._counts.shape)
        shares = 1 + self._counts * (WHOLE - SYMBOLS) // self._counts.sum(1, keepdims=True)
        rows = np.arange(len(shares))
        shares[rows, shares.argmax(1)] += WHOLE - shares.sum(1)
        self.shares: U32 = shares.astype(np.uint32).reshape(-1)
        self.starts: U32 = (np.cumsum(shares, 1) - shares).astype(np.uint32).reshape(-1)

    def table(self) -> U8:
        """The symbol of every context * WHOLE + place."""
        return np.repeat(np.tile(np.arange(SYMBOLS, dtype=np.uint8), len(self._counts)), self.shares)


def encode(values: U16, contexts: U8) -> bytes:
    """The payload of values [n], n >= 1, each under its context (uint8 [n]; numbers without large gaps)."""
    classes = np.frexp(np.maximum(values, 1).astype(np.float32))[1] - 1  # floor of log2
    symbols = np.where(values < 1 << FIRST, values, (1 << FIRST) - FIRST + classes).astype(np.uint8)
    at = _beside(contexts).astype(np.int64) * SYMBOLS + _beside(symbols)
    lanes, last = at.shape[1], _last(values.size)
    model, shares, starts = (
        _Model(int(contexts.max()) + 1),
        np.empty(at.shape, np.uint32),
        np.empty(at.shape, np.uint32),
    )
    for begin, end in _blocks(len(at)):
        shares[begin:end], starts[begin:end] = model.shares[at[begin:end]], model.starts[at[begin:end]]
        model.learn(at[begin:end])
    state, words = np.full(lanes, LOWEST, np.uint32), []
    for step in reversed(range(len(at))):
        width = last if step == len(at) - 1 else lanes
        share, now = shares[step, :width], state[:width]
        over = now >= share << (32 - _N)
        words.append((now[over] & np.uint32(0xFFFF)).astype("<u2"))
        now[over] >>= _16
        state[:width] = now + now // share * (np.uint32(WHOLE) - share) + starts[step, :width]
    stream, low = b"".join(part.tobytes() for part in reversed(words)), _pack_low(values, symbols)
    sizes = np.array([len(stream) // 2, len(low)], "<u4")
    return b"".join((sizes.tobytes(), state.astype("<u4").tobytes(), stream, low))


def decode(payload: bytes, contexts: U8) -> U16:
    """The values again. Raises FormatError for a payload that is none of as many values."""
    lanes, last = _lanes(contexts.size)[0], _last(contexts.size)
    head = 8 + 4 * lanes
    if len(payload) < head:
        raise FormatError("a part of the delta is cut short")
    count, low = (int(n) for n in np.frombuffer(payload, "<u4", 2))
    if len(payload) != head + 2 * count + low:
        raise FormatError("a part of the delta does not hold what it announces")
    state = np.frombuffer(payload, "<u4", lanes, 8).astype(np.uint32)
    words = np.frombuffer(payload, "<u2", count, head).astype(np.uint32)
    side = _beside(contexts)
    found, model, read = np.zeros(side.shape, np.uint8), _Model(int(contexts.max()) + 1), 0
    for begin, end in _blocks(len(side)):
        table, contexts_here = model.table(), side[begin:end].astype(np.int64)
        tables, at = contexts_here * WHOLE, contexts_here * SYMBOLS
        for step in range(begin, end):
            width = last if step == len(side) - 1 else lanes
            now = state[:width]
            place = now & np.uint32(WHOLE - 1)
            symbol = table.take(tables[step - begin, :width] + place)
            which = at[step - begin, :width]
            which += symbol
            now = model.shares.take(which) * (now >> _N) + place - model.starts.take(which)
            short = np.flatnonzero(now < LOWEST)
            if read + short.size > count:
                raise FormatError("a part of the delta is cut short")
            now[short] = now[short] << _16 | words[read : read + short.size]
            read += short.size
            state[:width], found[step, :width] = now, symbol
        model.learn(at)
    if read != count or (state != LOWEST).any():
        raise FormatError("a part of the delta does not end where it should")
    return _unpack_low(payload[head + 2 * count :], _in_turn(found, contexts.size))


def _lanes(size: int) -> tuple[int, int]:
    """How many lanes, and steps."""
    lanes = max(1, min(LANES, size // LEAST))
    return lanes, -(-size // lanes)


def _last(size: int) -> int:
    """How many lanes have an element at the last step: the first ones."""
    lanes, steps = _lanes(size)
    return size - lanes * (steps - 1)


def _beside(flat: U8) -> U8:
    """[n] as [steps, lanes]: each lane a run of neighbours; what is beyond the last element is 0."""
    (lanes, steps), last = _lanes(flat.size), _last(flat.size)
    out = np.zeros((steps, lanes), np.uint8)
    out[:, :last] = flat[: last * steps].reshape(last, steps).T
    if last < lanes:
        out[:-1, last:] = flat[last * steps :].reshape(lanes - last, steps - 1).T
    return out


def _in_turn(side: U8, size: int) -> U8:
    """The inverse of `_beside`."""
    last = _last(size)
    return np.concatenate((side[:, :last].T.reshape(-1), side[:-1, last:].T.reshape(-1)))


def _blocks(steps: int) -> Iterator[tuple[int, int]]:
    """Steps between two looks at the counts: few while little is known."""
    begin = 0
    while begin < steps:
        end = min(steps, begin + max(1, min(BLOCK, begin // 4)))
        yield begin, end
        begin = end


def _pack_low(values: U16, symbols: U8) -> bytes:
    parts = []
    for k in range(FIRST, 16):
        these = values[symbols == (1 << FIRST) - FIRST + k]
        parts.append(np.packbits(these[:, None] >> np.arange(k, dtype=np.uint16) & 1).tobytes())
    return b"".join(parts)


def _unpack_low(low: bytes, symbols: U8) -> U16:
    values, raw, read = symbols.astype(np.uint16), np.frombuffer(low, np.uint8), 0
    for k in range(FIRST, 16):
        where = np.flatnonzero(symbols == (1 << FIRST) - FIRST + k)
        size = -(-where.size * k // 8)
        if read + size > raw.size:
            raise FormatError("a part of the delta is cut short")
        bits = np.unpackbits(raw[read : read + size], count=where.size * k).reshape(-1, k).astype(np.uint16)
        values[where] = np.uint16(1 << k) + (bits << np.arange(k, dtype=np.uint16)).sum(1, dtype=np.uint16)
        read += size
    if read != raw.size:
        raise FormatError("a part of the delta does not end where it should")
    return values
