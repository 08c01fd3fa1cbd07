"""From sequences to the sampler's flat arrays and back: which row of logits is drawn for whom, with what.

Knows SamplingParams and the arrays of `runtime.sampling`; the drawing itself is the sampler's.
"""

from array import array
from dataclasses import dataclass, field

import numpy as np

from inhouse.core.errors import ExecutorError, InhouseError, UsageError
from inhouse.engine.batch import tokens_of
from inhouse.engine.beams import Candidates
from inhouse.engine.plan import Draw
from inhouse.engine.recipe import BAN, Recipe
from inhouse.engine.request import Request, TokenLogprob
from inhouse.engine.sequence import Sequence
from inhouse.runtime.sampling import F32, I32, NO_TOKEN, NOT_A_NUMBER, ROW, U32, Sampler, mask_of

MOST = 2**31 - 1  # top_k of a row is an int32; what is beyond the vocabulary filters nothing


@dataclass(slots=True)
class _Arrays:
    """The flat arrays of one call, as they fill."""

    vocab: int
    rows: list[tuple[float, ...]] = field(default_factory=list)
    bias_ids: list[I32] = field(default_factory=list)
    bias_values: list[F32] = field(default_factory=list)
    history: list[I32] = field(default_factory=list)
    masks: list[U32] = field(default_factory=list)
    biased: int = 0
    recorded: int = 0

    def add(self, sequence: Sequence, recipe: Recipe, choice: int, logit_row: int) -> None:
        begin, start = self.biased, self.recorded
        top_k = min(max(sequence.request.params.top_k, 0), MOST)
        if recipe.plain:
            position = len(sequence.tokens)
            none = (begin, begin, start, start, start)
            self.rows.append((sequence.seed, position, *none, logit_row, choice, top_k, -1, *recipe.numbers))
            return
        forced = forced_now(sequence)
        if forced is None:
            self._bias(recipe.bias_ids, recipe.bias_values)
        banned = banned_now(sequence) if forced is None else []
        if banned:
            self._bias(np.array(banned, np.int32), np.full(len(banned), BAN, np.float32))
        if recipe.penalties:
            self.history.append(tokens_of(sequence.tokens, 0, len(sequence.tokens)))
            self.recorded += len(sequence.tokens)
        mask = recipe.mask if forced is None else mask_of((forced,), self.vocab)
        if mask is not None:
            self.masks.append(mask)
        self.rows.append(
            (
                sequence.seed, len(sequence.tokens), begin, self.biased,
                start, min(start + sequence.prompt_length, self.recorded), self.recorded,
                logit_row, choice, top_k,
                len(self.masks) - 1 if mask is not None else -1, *recipe.numbers,
            )
        )  # fmt: skip

    def _bias(self, ids: I32, values: F32) -> None:
        self.bias_ids.append(ids)
        self.bias_values.append(values)
        self.biased += ids.size


def forced_now(sequence: Sequence) -> int | None:
    """The one token that may come next, where the parameters name the output's first or last."""
    params = sequence.request.params
    if params.first_token is not None and not sequence.output_length:
        return params.first_token
    return params.last_token if len(sequence.tokens) == sequence.limit - 1 else None


def banned_now(sequence: Sequence) -> list[int]:
    """Tokens that may not come next: stops before min_tokens, ends of bad words whose beginnings stand there, and those
    that would repeat a run of `no_repeat_ngram`."""
    params = sequence.request.params
    banned = sorted(sequence.stops) if sequence.output_length < params.min_tokens else []
    for word in params.bad_words:
        head = len(word) - 1
        if 0 < head <= sequence.output_length and tuple(sequence.tokens[-head:]) == word[:-1]:
            banned.append(word[-1])
    if params.no_repeat_ngram:
        banned += _repeats(sequence.tokens, params.no_repeat_ngram - 1)
    return banned


def _repeats(tokens: "array[int]", head: int) -> set[int]:
    """What followed earlier runs that equal the last `head` tokens."""
    last = tokens[len(tokens) - head :]
    return {tokens[i + head] for i in range(len(tokens) - head) if tokens[i : i + head] == last}


def draw(sampler: Sampler, logits: F32, wanted: list[tuple[Sequence, Recipe, int, int]]) -> list[Draw]:
    """One draw for each (sequence, recipe, choice, row of logits)."""
    if not wanted:
        return []
    arrays = _Arrays(logits.shape[1])
    for sequence, recipe, choice, row in wanted:
        arrays.add(sequence, recipe, choice, row)
    none = np.zeros(0, np.int32)
    tokens, status = sampler.sample(
        logits,
        np.array(arrays.rows, ROW),
        np.concatenate(arrays.bias_ids) if arrays.bias_ids else none,
        np.concatenate(arrays.bias_values) if arrays.bias_values else np.zeros(0, np.float32),
        np.concatenate(arrays.history) if arrays.history else none,
        np.stack(arrays.masks) if arrays.masks else np.zeros((0, -(-logits.shape[1] // 32)), np.uint32),
    )
    found = _chosen_logprobs(sampler, logits, wanted, tokens)
    return [
        Draw(token, found.get(i), None if not state else _error(state, wanted[i][0].request))
        for i, (token, state) in enumerate(zip(tokens.tolist(), status.tolist(), strict=True))
    ]


def candidates(
    sampler: Sampler, logits: F32, wanted: list[tuple[Sequence, int]]
) -> list[tuple[Candidates, InhouseError | None]]:
    """What each (beam, row of logits) may go on with: the likeliest tokens that are not banned, with their logprobs; a
    forced token alone, with 0, as the original has it."""
    if not wanted:
        return []
    forced = [forced_now(sequence) for sequence, _ in wanted]
    banned = [
        _banned(sequence) if token is None else set() for (sequence, _), token in zip(wanted, forced, strict=True)
    ]
    keep = max(group.keep for sequence, _ in wanted if (group := sequence.group) is not None)
    top = min(keep + max(map(len, banned)), logits.shape[1])
    rows = np.array([row for _, row in wanted], np.int32)
    _, _, ids, values, status = sampler.logprobs(logits, rows, np.zeros(len(rows), np.int32), top)
    out: list[tuple[Candidates, InhouseError | None]] = []
    for i, (sequence, _) in enumerate(wanted):
        token = forced[i]
        pairs = zip(ids[i].tolist(), values[i].tolist(), strict=True)
        found = tuple((t, value) for t, value in pairs if t >= 0 and t not in banned[i])
        if token is not None:
            found = ((token, 0.0),)
        state = int(status[i]) or (0 if found else NO_TOKEN)
        out.append((found, _error(state, sequence.request) if state else None))
    return out


def _banned(sequence: Sequence) -> set[int]:
    return {*banned_now(sequence), *(word[0] for word in sequence.request.params.bad_words if len(word) == 1)}


def _chosen_logprobs(
    sampler: Sampler, logits: F32, wanted: list[tuple[Sequence, Recipe, int, int]], tokens: I32
) -> dict[int, TokenLogprob]:
    """Logprobs of the draws whose requests ask for them, by place in `wanted`."""
    asked = [(i, w[0].request.params.logprobs, w[3]) for i, w in enumerate(wanted) if tokens[i] >= 0]
    chosen = [(i, top, row) for i, top, row in asked if top is not None]
    if not chosen:
        return {}
    rows = np.array([row for _, _, row in chosen], np.int32)
    deepest = max(top for _, top, _ in chosen)
    found = logprobs(sampler, logits, rows, tokens[[i for i, _, _ in chosen]], deepest)
    return {
        i: TokenLogprob(one.token, one.logprob, one.rank, one.top[:top])
        for (i, top, _), one in zip(chosen, found, strict=True)
    }


def logprobs(sampler: Sampler, logits: F32, rows: I32, targets: I32, top: int) -> list[TokenLogprob]:
    """Logprob, rank and the likeliest for target[i] under row rows[i]; raises ExecutorError if logits hold NaN."""
    top = min(top, logits.shape[1])
    values, ranks, ids, likeliest, status = sampler.logprobs(logits, rows, targets, top)
    if status.any():
        raise ExecutorError("the logits hold NaN or infinity", remedy="The model file or the executor is damaged")
    alternatives = [tuple(zip(*pair, strict=True)) for pair in zip(ids.tolist(), likeliest.tolist(), strict=True)]
    return [
        TokenLogprob(*one) for one in zip(targets.tolist(), values.tolist(), ranks.tolist(), alternatives, strict=True)
    ]


def _error(status: int, request: Request) -> InhouseError:
    if status == NOT_A_NUMBER:
        return ExecutorError("the logits hold NaN or infinity", remedy="The model file or the executor is damaged")
    return UsageError(
        f"request {request.id}: bias, bans and masks leave no token to draw", remedy="Allow at least one more token"
    )
