"""What a request's sampling parameters come to, made once when it is submitted."""

from dataclasses import dataclass
from itertools import repeat

import numpy as np

from inhouse.engine.request import SamplingParams
from inhouse.runtime.sampling import F32, I32, U32, mask_of

BAN = -np.inf


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a request's params come to, made once: arrays that every step reuses."""

    bias_ids: I32  # [B]
    bias_values: F32  # [B]
    mask: U32 | None  # [ceil(vocab / 32)]
    penalties: bool  # the history is needed
    plain: bool  # every draw is made from the logits alone, whatever stands before
    numbers: tuple[float, ...]  # the last fields of ROW, from temperature on


def make_recipe(params: SamplingParams, vocab: int) -> Recipe:
    """The recipe of params whose ids are all below vocab."""
    singles = [word[0] for word in params.bad_words if len(word) == 1]
    values = [*params.logit_bias.values(), *repeat(BAN, len(singles))]
    penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1, 0, 0)
    special = (params.allowed_token_ids, params.first_token, params.last_token)
    changing = bool(values or params.bad_words or params.min_tokens or params.no_repeat_ngram)
    return Recipe(
        bias_ids=np.array([*params.logit_bias, *singles], np.int32),
        bias_values=np.array(values, np.float32),
        mask=None if params.allowed_token_ids is None else mask_of(params.allowed_token_ids, vocab),
        penalties=penalties,
        plain=not (penalties or changing) and special == (None, None, None),
        numbers=(
            params.temperature, params.top_p, params.min_p, params.typical_p,
            params.repetition_penalty, params.presence_penalty, params.frequency_penalty, 0,
        ),
    )  # fmt: skip
