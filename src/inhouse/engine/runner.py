"""A plan runs: arrays to the executor, logits to the sampler, results back to each chunk.

Knows executor, batch and sampler; decides nothing about who runs.
"""

import numpy as np

from inhouse.core.errors import InhouseError
from inhouse.engine import sampler as sampling
from inhouse.engine.batch import Batch, build, build_encode, tokens_of
from inhouse.engine.beams import Candidates
from inhouse.engine.plan import Chunk, ChunkResult, Draw, Plan
from inhouse.engine.request import TokenLogprob
from inhouse.runtime.executor import F32, Executor
from inhouse.runtime.sampling import Sampler

PROGRAM, ENCODE = "step", "encode"


class Runner:
    """One executor and one sampler."""

    def __init__(self, executor: Executor, sampler: Sampler) -> None:
        self._executor = executor
        self._sampler = sampler

    def run(self, plan: Plan) -> list[ChunkResult]:
        """Runs a step and draws. Raises what the executor raises; a fault of one row is that draw's error."""
        if plan.encodes:
            self._executor.run(ENCODE, build_encode(plan.encodes))
            return []
        batch = build(plan)
        self._copy_blocks(batch)
        logits = self._executor.run(PROGRAM, batch.step)["logits"]
        self._tap(plan, batch, logits)
        draws, beams = iter(self._draw(plan, batch, logits)), iter(self._search(plan, batch, logits))
        return [
            ChunkResult((), (), *next(beams))
            if chunk.searches
            else ChunkResult(tuple(next(draws) for _ in range(chunk.draws)), self._score(chunk, begin, logits))
            for chunk, begin in zip(plan.chunks, batch.logit_begin, strict=True)
        ]

    def _search(self, plan: Plan, batch: Batch, logits: F32) -> list[tuple[Candidates, InhouseError | None]]:
        """Candidates for the chunks of beams, in order."""
        pairs = zip(plan.chunks, batch.logit_begin, strict=True)
        wanted = [(chunk.sequence, begin) for chunk, begin in pairs if chunk.searches]
        return sampling.candidates(self._sampler, logits, wanted)

    def _copy_blocks(self, batch: Batch) -> None:
        for group, (source, target) in batch.copies.items():
            self._executor.copy_blocks(group, source, target)

    def _draw(self, plan: Plan, batch: Batch, logits: F32) -> list[Draw]:
        """Draws for all chunks, in order, each from the chunk's last row."""
        wanted = [
            (chunk.sequence, chunk.sequence.recipe, first + choice, begin + chunk.logit_rows - 1)
            for chunk, begin in zip(plan.chunks, batch.logit_begin, strict=True)
            for first in (chunk.sequence.choice,)
            for choice in range(0 if chunk.searches else chunk.draws)
        ]
        return sampling.draw(self._sampler, logits, wanted)

    def _score(self, chunk: Chunk, begin: int, logits: F32) -> tuple[TokenLogprob, ...]:
        """Logprobs of the prompt tokens that follow the chunk's rows."""
        request = chunk.sequence.request
        count = min(chunk.start + chunk.count, len(request.prompt) - 1) - chunk.start
        if request.prompt_logprobs is None or not chunk.all_rows or count <= 0:
            return ()
        rows = np.arange(begin, begin + count, dtype=np.int32)
        targets = tokens_of(request.prompt, chunk.start + 1, count)
        return tuple(sampling.logprobs(self._sampler, logits, rows, targets, request.prompt_logprobs))

    @staticmethod
    def _tap(plan: Plan, batch: Batch, logits: F32) -> None:
        for chunk, begin in zip(plan.chunks, batch.logit_begin, strict=True):
            tap = chunk.sequence.request.tap
            if tap is not None and chunk.all_rows:
                tap(chunk.start, logits[begin : begin + chunk.count])
