"""How large an engine's steps and state are: what limits, Programs and memory come to. Allocates nothing."""

from dataclasses import dataclass

from inhouse.engine.request import EngineConfig
from inhouse.plan import memory
from inhouse.runtime.executor import Executor

LEAST_CONTEXT = 256  # tokens; below that an engine does not start rather than serve so little


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers fixed when an engine starts."""

    context_length: int
    longest_chunk: int  # tokens of one sequence in one step at most: the budget, or all where state forbids chunks
    step_tokens: int  # tokens of a step at most: the budget, unless one chunk alone is longer
    logit_rows: int  # of a step at most; where prompts run whole, those of all its tokens may be wanted
    blocks: dict[str, int]  # of each state group


def sizes_of(executor: Executor, config: EngineConfig) -> Sizes:
    """The sizes; a context that nobody asked for is lowered to what fits (LEAST_CONTEXT at least). Raises
    CapacityError if one context does not fit."""
    programs = executor.programs
    shares = memory.share_groups(programs)
    chunked = all(group.chunkable for group in shares.own)
    context = min(config.context_length or programs.context_length, programs.context_length)
    rows = max(config.logit_rows, config.max_running)

    def sizes(context: int, blocks: dict[str, int]) -> Sizes:
        longest = config.step_tokens if chunked else context
        tokens = max(config.step_tokens, context if shares.scratch else longest)
        return Sizes(context, longest, tokens, min(rows, tokens) if chunked else tokens, blocks)

    if config.blocks:
        return sizes(context, dict(config.blocks))
    guess = sizes(context, {})
    budget = config.kv_budget
    if budget is None:
        budget = memory.default_kv_budget(programs, guess.step_tokens, guess.logit_rows)
    if config.context_length is None:
        fitting = memory.context_for(programs, executor.kv_dtype, budget, guess.longest_chunk)
        context = min(context, max(fitting, LEAST_CONTEXT))
    blocks = memory.kv_blocks_for(
        programs, executor.kv_dtype, budget,
        context=context, sequences=config.max_running, step_tokens=sizes(context, {}).longest_chunk,
    )  # fmt: skip
    return sizes(context, blocks)
