"""Greedy answers from any executor, many questions at once. Knows the chat format; knows no files and no grades."""

from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from demo.encode import END, special_id
from inhouse.runtime.executor import Executor
from inhouse.runtime.step import BLOCK_SIZE, Step

LONGEST = 320  # tokens of prompt and answer together


class Greedy:
    """Answers by the likeliest token each time, until <|end|> or LONGEST."""

    def __init__(self, executor: Executor, tokenizer: Tokenizer, batch: int = 32) -> None:
        self._executor, self._tokenizer, self._batch = executor, tokenizer, batch
        self._end = special_id(tokenizer, END)
        self._per_sequence = -(-LONGEST // BLOCK_SIZE)
        (self._group,) = (group.name for group in executor.programs.groups)
        executor.allocate({self._group: batch * self._per_sequence})

    def answer(self, questions: Sequence[str]) -> list[str]:
        """One answer a question, each asked alone, without a system prompt."""
        out: list[str] = []
        for begin in range(0, len(questions), self._batch):
            prompts = [self._prompt(text) for text in questions[begin : begin + self._batch]]
            out += [self._tokenizer.decode(ids, skip_special_tokens=True) for ids in self._generate(prompts)]
        return out

    def _prompt(self, question: str) -> list[int]:
        return list(self._tokenizer.encode(f"<|user|>{question}<|end|><|assistant|>").ids)

    def _generate(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in prompts]
        pending = dict(enumerate(prompts))  # sequence -> ids that are not in the cache yet
        stored = [0] * len(prompts)
        while pending:
            best = self._step(pending, stored)
            for sequence, token in zip(list(pending), best, strict=True):
                stored[sequence] += len(pending[sequence])
                if token == self._end or stored[sequence] + 1 >= LONGEST:
                    del pending[sequence]
                else:
                    answers[sequence].append(token)
                    pending[sequence] = [token]
        return answers

    def _step(self, pending: dict[int, list[int]], stored: Sequence[int]) -> list[int]:
        """Runs the pending ids; the likeliest next token of each sequence."""
        counts = [len(ids) for ids in pending.values()]
        starts = [stored[sequence] for sequence in pending]
        blocks = [np.arange(self._per_sequence) + sequence * self._per_sequence for sequence in pending]
        step = Step(
            tokens=np.concatenate([np.array(ids, np.int32) for ids in pending.values()]),
            positions=np.concatenate(
                [np.arange(s, s + n, dtype=np.int32) for s, n in zip(starts, counts, strict=True)]
            ),
            sequences=np.repeat(np.arange(len(pending), dtype=np.int32), counts),
            lengths=np.array([s + n for s, n in zip(starts, counts, strict=True)], np.int32),
            tables={self._group: np.ascontiguousarray(blocks, dtype=np.int32)},
            sampled=(np.cumsum(counts) - 1).astype(np.int32),
            adapters=np.zeros(len(pending), np.int32),
        )
        logits = self._executor.run("step", step)["logits"]
        return [int(token) for token in logits.argmax(axis=1)]
