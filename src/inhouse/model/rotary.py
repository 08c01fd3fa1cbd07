"""Inverse frequencies of rotary embeddings under every scaling that a RopeSpec can name. Pure numpy."""

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import UnsupportedError
from inhouse.model.spec import RopeSpec

F64 = npt.NDArray[np.float64]


def inverse_frequencies(rope: RopeSpec, context_length: int) -> npt.NDArray[np.float32]:
    """float32 [dim / 2]: radians a position, for positions below `context_length`.

    Computed in float64 and rounded once. The dynamic scaling depends on the length: it is fixed here for the
    whole context, so that a token's values never depend on how long its sequence has grown. Families give it the
    trained length, up to which it is the original's.
    """
    if rope.source == "two_part":  # the same frequencies for either part
        half = inverse_frequencies(replace(rope, dim=rope.dim // 2, source="positions"), context_length)
        return np.concatenate([half, half])
    steps = np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim
    theta = _dynamic_theta(rope, context_length) if rope.scaling == "dynamic" else rope.theta
    plain: F64 = theta**-steps
    match rope.scaling:
        case "none" | "dynamic":
            scaled = plain
        case "linear":
            scaled = plain / rope.factor
        case "llama3":
            scaled = _llama3(rope, plain)
        case "yarn":
            scaled = _yarn(rope, plain)
        case "factors":
            scaled = plain / np.asarray(rope.factors, np.float64)
        case "longrope":
            factors = rope.long_factors if context_length > rope.original_context else rope.factors
            scaled = plain / np.asarray(factors, np.float64)
        case other:
            raise UnsupportedError(f"rope scaling {other!r} is not known")
    return scaled.astype(np.float32)


def _dynamic_theta(rope: RopeSpec, context_length: int) -> float:
    """NTK-aware base for sequences of `context_length` (no change up to the original context)."""
    length = max(context_length, rope.original_context)
    stretch = rope.factor * length / rope.original_context - (rope.factor - 1.0)
    return float(rope.theta * stretch ** (rope.dim / (rope.dim - 2)))


def _llama3(rope: RopeSpec, plain: F64) -> F64:
    """Long waves are stretched by `factor`, short ones kept, those between interpolated (Llama 3.1)."""
    turns = rope.original_context * plain / (2 * math.pi)  # rotations within the original context
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return keep * plain + (1 - keep) * plain / rope.factor


def _yarn(rope: RopeSpec, plain: F64) -> F64:
    """Dimensions that turn fewer than `beta_slow` times are stretched, those above `beta_fast` kept
    (arXiv 2309.00071, section 3.2)."""

    def dimension(turns: float) -> float:
        return rope.dim * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width
    stretch = np.clip((np.arange(rope.dim // 2) - low) / (high - low), 0.0, 1.0)
    yarn: F64 = plain / rope.factor * stretch + plain * (1 - stretch)
    return yarn


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """What YaRN multiplies cos and sin by (arXiv 2309.00071, equation 22)."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def alibi_slopes(heads: int) -> npt.NDArray[np.float32]:
    """float32 [heads]: what each head takes off its scores for a position of distance (arXiv 2108.12409).

    Powers of 2^(-8 / n) for n the largest power of two that fits; further heads take every other power of the next."""
    whole = 1 << (heads.bit_length() - 1)
    slopes = 2.0 ** (-8.0 / whole * np.arange(1, whole + 1, dtype=np.float64))
    between = 2.0 ** (-4.0 / whole * np.arange(1, 2 * (heads - whole), 2, dtype=np.float64))
    return np.concatenate([slopes, between]).astype(np.float32)
