"""Text that a model writes itself, as token ids: calibration and training data where the user has none of the model's
own kind (facts: sampling at temperature 1 draws from exactly the distribution that a student is to learn).

Knows the engine's door; knows no training.
"""

from collections.abc import Iterator, Sequence

from inhouse.core.errors import UsageError
from inhouse.core.progress import Progress, silent
from inhouse.engine.request import Failed, FinishReason, SamplingParams, TokenEvent, make_request
from inhouse.engine.session import Session

TOGETHER = 64  # sequences that run at once: the engine's default limit


def sample_documents(
    session: Session,
    count: int,
    *,
    length: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
    prompts: Sequence[Sequence[int]] = (),
    stop_ids: Sequence[int] = (),
    progress: Progress = silent,
) -> Iterator[list[int]]:
    """`count` sequences of at most `length` ids, prompt included, end token left out; equal arguments on the same
    machine give equal ids.

    Args:
        prompts: what the sequences begin with, taken in turn; none: the tokenizer's BOS, or, where it has none, what
            ends a text.
        stop_ids: further ids that end a sequence (models trained on documents joined by BOS write BOS there).

    Raises UsageError if there is nothing to begin with, or the error that ended a request.
    """
    begins = [list(prompt) for prompt in prompts]
    if not begins:
        first = session.tokenizer.bos_id
        if first is None:  # many have none (Qwen, GPT-2): what ends a text is what the next one follows
            first = min(session.tokenizer.eos_ids, default=None)
        if first is None:
            raise UsageError("the tokenizer has no BOS to begin a text with", remedy="Give prompts", param="prompts")
        begins = [[first]]
    done = 0
    while done < count:
        together = min(TOGETHER, count - done)
        begin = begins[done // TOGETHER % len(begins)]
        params = SamplingParams(temperature=temperature, seed=seed + done, n=together, stop_token_ids=tuple(stop_ids))
        yield from _round(session, begin, params, length - len(begin), f"sample-{seed}-{done}")
        done += together
        progress("sampling", done, count)


def _round(session: Session, begin: list[int], params: SamplingParams, room: int, name: str) -> Iterator[list[int]]:
    written: dict[int, list[int]] = {choice: list(begin) for choice in range(params.n)}
    for event in session.engine.stream(make_request(name, begin, params, room)):
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, TokenEvent):
            written[event.choice].extend(event.tokens)
        elif getattr(event, "reason", None) is FinishReason.CANCELLED:
            raise UsageError("the sampling was cancelled", param="count")
    yield from written.values()
