"""Sampling over a whole batch: the native library's door, and the slow, obvious reference that it is tested against.

Knows logits and numbers; knows nothing of sequences, requests or tokens' text. The order of work on a row:

    logits -> bias (-inf bans) -> mask -> repetition penalty -> frequency and presence penalty
           -> temperature -> top_k -> min_p -> top_p -> typical_p -> draw

A penalty on repetition (prompt and output: Keskar et al. 2019, as Hugging Face and vLLM) divides a positive logit and
multiplies a negative one; frequency and presence (output only: OpenAI) subtract. Each filter acts on the softmax of
what the one before left: top_k keeps the k largest (ties: the lower id); min_p keeps p >= min_p * max p; top_p keeps
the shortest run of the likeliest whose mass reaches top_p; typical_p the shortest run of those nearest to the
entropy (Meister et al. 2023). The draw inverts the cumulative sum over the survivors in order of id at u in [0, 1).

u comes from Philox4x32-10 (Salmon et al. 2011), key = seed, counter = (position, choice): nothing else, so that batch,
chunks and threads never change a draw.
"""

from typing import Protocol

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I32 = npt.NDArray[np.int32]
U32 = npt.NDArray[np.uint32]

GREEDY_BELOW = 1e-5  # temperatures below are greedy

OK, NOT_A_NUMBER, NO_TOKEN = 0, 1, 2  # status of a row: fine; logits hold NaN or +inf; every token is ruled out

# One row to draw; the same struct as ih_sample_row of native/include/inhouse.h. Ranges index the flat arrays.
ROW = np.dtype(
    [
        ("seed", "<u8"),
        ("position", "<i8"),  # absolute position of the token to draw
        ("bias_begin", "<i8"),
        ("bias_end", "<i8"),
        ("history_begin", "<i8"),  # history[begin:prompt_end] is the prompt, [prompt_end:end] the output
        ("history_prompt_end", "<i8"),
        ("history_end", "<i8"),
        ("logit_row", "<i4"),
        ("choice", "<i4"),
        ("top_k", "<i4"),  # 0: off
        ("mask_row", "<i4"),  # -1: none
        ("temperature", "<f4"),  # 0: greedy
        ("top_p", "<f4"),
        ("min_p", "<f4"),
        ("typical_p", "<f4"),
        ("repetition_penalty", "<f4"),
        ("presence_penalty", "<f4"),
        ("frequency_penalty", "<f4"),
        ("reserved", "<i4"),
    ]
)


class Sampler(Protocol):
    """What the engine asks of a sampler; `ReferenceSampler` says it slowly."""

    def sample(
        self, logits: F32, rows: npt.NDArray[np.void], bias_ids: I32, bias_values: F32, history: I32, masks: U32
    ) -> tuple[I32, I32]:
        """Draws one token a row.

        Args:
            logits: [S, vocab], read only.
            rows: ROW [R].
            bias_ids, bias_values: [B] pairs, sliced by each row.
            history: [H] token ids, sliced by each row; needed only where a penalty is set.
            masks: [M, ceil(vocab / 32)]; bit i % 32 of word i // 32 set: token i is allowed.

        Returns: tokens [R] (-1 where the status is not OK), status [R].
        """

    def logprobs(self, logits: F32, logit_rows: I32, targets: I32, top: int) -> tuple[F32, I32, I32, F32, I32]:
        """Natural-log probabilities under softmax(logits[logit_rows[r]]), untouched by any sampling parameter.

        Returns: logprob of targets[r] [R], its rank (1 + number of likelier tokens) [R], the `top` likeliest ids
        [R, top] (descending, ties by id; -1 where logits of -inf leave fewer), their logprobs [R, top], status [R].
        """


def philox(seed: int, position: int, choice: int) -> tuple[int, int, int, int]:
    """Philox4x32-10: four 32-bit words of key `seed` (64 bits) and counter (position low, high, choice, 0)."""
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    c = [position & 0xFFFFFFFF, (position >> 32) & 0xFFFFFFFF, choice & 0xFFFFFFFF, 0]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ key[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ key[1], a & 0xFFFFFFFF]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[0], c[1], c[2], c[3]


def uniform(seed: int, position: int, choice: int) -> float:
    """The draw's u in [0, 1): the top 53 bits of the first two words."""
    words = philox(seed, position, choice)
    return float(((words[0] << 32 | words[1]) >> 11) * 2.0**-53)


class ReferenceSampler:
    """The sampler in numpy and float64, one row at a time: the oracle, and the meaning of every parameter."""

    def sample(
        self, logits: F32, rows: npt.NDArray[np.void], bias_ids: I32, bias_values: F32, history: I32, masks: U32
    ) -> tuple[I32, I32]:
        tokens, status = np.full(len(rows), -1, np.int32), np.zeros(len(rows), np.int32)
        for r, row in enumerate(rows):
            x = logits[row["logit_row"]].copy()
            biased = slice(row["bias_begin"], row["bias_end"])
            np.add.at(x, bias_ids[biased], bias_values[biased])
            if row["mask_row"] >= 0:
                x[~allowed(masks[row["mask_row"]], x.size)] = -np.inf
            penalise(x, row, history)
            if np.isnan(x).any() or np.isposinf(x).any():
                status[r] = NOT_A_NUMBER
            elif np.isneginf(x).all():
                status[r] = NO_TOKEN
            elif row["temperature"] < GREEDY_BELOW:
                tokens[r] = np.argmax(x)
            else:
                tokens[r] = _draw(filtered(x, row), uniform(int(row["seed"]), int(row["position"]), int(row["choice"])))
        return tokens, status

    def logprobs(self, logits: F32, logit_rows: I32, targets: I32, top: int) -> tuple[F32, I32, I32, F32, I32]:
        count = len(logit_rows)
        logprob, rank, status = np.zeros(count, np.float32), np.zeros(count, np.int32), np.zeros(count, np.int32)
        ids, values = np.zeros((count, top), np.int32), np.zeros((count, top), np.float32)
        for r, (index, target) in enumerate(zip(logit_rows, targets, strict=True)):
            x = logits[index].astype(np.float64)
            if np.isnan(x).any() or np.isposinf(x).any() or np.isneginf(x).all():
                status[r] = NOT_A_NUMBER
                continue
            x -= x.max()
            x -= np.log(np.exp(x).sum())
            order = np.argsort(-x, kind="stable")[:top]
            logprob[r], rank[r] = x[target], 1 + np.count_nonzero(x > x[target])
            there = np.isfinite(x[order])
            ids[r], values[r] = np.where(there, order, -1), x[order]
        return logprob, rank, ids, values, status


def allowed(words: U32, vocab: int) -> npt.NDArray[np.bool_]:
    """The bits of a mask as bool [vocab]."""
    return np.unpackbits(words.view(np.uint8), bitorder="little")[:vocab].astype(np.bool_)


def mask_of(ids: npt.ArrayLike, vocab: int) -> U32:
    """A mask [ceil(vocab / 32)] that allows those ids alone."""
    bits = np.zeros(-(-vocab // 32) * 32, np.uint8)
    bits[np.asarray(ids, np.int64)] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


def penalise(x: F32, row: np.void, history: I32) -> None:
    """Applies the three penalties to a row in place; arithmetic is float32, as the logits are."""
    begin, middle, end = row["history_begin"], row["history_prompt_end"], row["history_end"]
    if row["repetition_penalty"] != 1:
        seen = np.unique(history[begin:end])
        x[seen] = np.where(x[seen] > 0, x[seen] / row["repetition_penalty"], x[seen] * row["repetition_penalty"])
    said, counts = np.unique(history[middle:end], return_counts=True)
    x[said] -= row["frequency_penalty"] * counts.astype(np.float32)
    x[said] -= row["presence_penalty"]


def filtered(x: F32, row: np.void) -> F64:
    """Probabilities [vocab] after temperature and filters; zero where a token is ruled out; they sum to 1."""
    order = np.argsort(-x, kind="stable")  # likeliest first, ties by id; no temperature changes it
    weights = np.exp((x[order].astype(np.float64) - float(x.max())) / float(row["temperature"]))
    if row["top_k"] > 0:
        weights[row["top_k"] :] = 0
    weights[weights < row["min_p"]] = 0  # the likeliest has weight 1
    if row["top_p"] < 1:
        before = np.cumsum(weights) - weights
        weights[before >= float(row["top_p"]) * weights.sum()] = 0
    if row["typical_p"] < 1:
        weights[~_typical(weights, order, float(row["typical_p"]))] = 0
    out = np.zeros(x.size)
    out[order] = weights / weights.sum()
    return out


def _typical(weights: F64, order: npt.NDArray[np.intp], mass: float) -> npt.NDArray[np.bool_]:
    """Which of the weights are typical: nearest to the entropy first, ties by id, until they hold the mass."""
    p = weights / weights.sum()
    information = -np.log(np.where(p > 0, p, 1))
    distance = np.where(p > 0, np.abs(information - (p * information).sum()), np.inf)
    nearest = np.lexsort((order, distance))
    before = np.cumsum(p[nearest]) - p[nearest]
    keep = np.zeros(p.size, np.bool_)
    keep[nearest[before < mass]] = True
    return keep


def _draw(p: F64, u: float) -> int:
    """The first survivor, by id, at which the cumulative sum exceeds u times the total."""
    survivors = np.flatnonzero(p)
    cumulative = np.cumsum(p[survivors])
    index = np.searchsorted(cumulative, u * cumulative[-1], side="right")
    return int(survivors[min(int(index), survivors.size - 1)])
