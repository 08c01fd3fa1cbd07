"""Which requests can ever run: the context rule and the vocabulary. Knows numbers, no queue and no state."""

from collections.abc import Iterable

from inhouse.core.errors import ContextLengthError, UsageError
from inhouse.engine.request import Request


def limit_of(request: Request, context_length: int, capacity: int) -> int:
    """Tokens at which the request ends: the context rule of `Request`. `capacity`: tokens that one sequence can hold.
    Raises ContextLengthError, and UsageError for min_tokens beyond the room."""
    prompt, room = len(request.prompt), context_length - len(request.prompt)
    wanted = request.max_tokens
    if room < (0 if wanted == 0 else 1):
        raise ContextLengthError(
            f"the prompt has {prompt} tokens, the context holds {context_length}",
            remedy="Shorten the prompt", prompt_tokens=prompt, context_length=context_length,
        )  # fmt: skip
    if wanted is not None and wanted > room:
        raise ContextLengthError(
            f"the prompt has {prompt} tokens and max_tokens is {wanted}: {prompt + wanted} in all, "
            f"the context holds {context_length}",
            remedy=f"Shorten the prompt, or ask for at most {room}", param="max_tokens",
            prompt_tokens=prompt, max_tokens=wanted, context_length=context_length,
        )  # fmt: skip
    if max(prompt, prompt + (wanted or 0) - 1) > capacity:
        raise ContextLengthError(
            f"the request needs state for {prompt + (wanted or 0)} tokens, there are blocks for {capacity}",
            remedy="Shorten the prompt, lower max_tokens, or start with more --kv-memory",
            param="max_tokens" if prompt <= capacity else None, prompt_tokens=prompt, capacity=capacity,
        )  # fmt: skip
    limit = min(context_length, capacity + 1) if wanted is None else prompt + wanted
    least = request.params.min_tokens
    if least > limit - prompt:
        raise UsageError(
            f"min_tokens is {least}, beside the prompt of {prompt} tokens there is room for {limit - prompt}",
            remedy=f"Choose min_tokens of at most {limit - prompt}", param="min_tokens",
        )  # fmt: skip
    return limit


def check_ids(request: Request, vocab_size: int) -> None:
    """Raises UsageError for an id outside the vocabulary."""
    fields: list[tuple[str, Iterable[int]]] = [("prompt", request.prompt), *request.params.ids()]
    if request.encoder is not None:
        fields.append(("prompt", request.encoder))
    for name, ids in fields:
        for token in ids:
            if not 0 <= token < vocab_size:
                raise UsageError(
                    f"{name} holds token {token}, the vocabulary is 0..{vocab_size - 1}",
                    remedy="Use this model's own tokenizer", param=name,
                )  # fmt: skip


def check_encoder(request: Request, encoders: bool, context_length: int, capacity: int) -> None:
    """Raises UsageError if an encoder's input is given to a model without one, or lacks for a model with one, and
    ContextLengthError for one that is too long. `capacity`: tokens for which there are blocks."""
    if request.encoder is None:
        if encoders:
            raise UsageError("an encoder-decoder needs the encoder's input", remedy="Give Request.encoder")
        return
    if not encoders:
        raise UsageError("the model has no encoder", remedy="Give all ids as the prompt")
    length, most = len(request.encoder), min(context_length, capacity)
    if length > most:
        raise ContextLengthError(
            f"the input has {length} tokens, the encoder takes {most} at once", remedy="Shorten the input",
            prompt_tokens=length, context_length=most,
        )  # fmt: skip


def prefix_of(request: Request, token: int) -> int:
    """How many positions of the prompt see one another: those before the first of the model's prefix token."""
    return request.prompt.index(token) if token in request.prompt else 0


def without_slot(choices: Iterable[int], free: int) -> int:
    """Of requests that wait, each with so many `choices`, those for which none of the `free` slots is left."""
    pending = list(choices)
    for begun, wanted in enumerate(pending):
        if wanted > free:
            return len(pending) - begun
        free -= wanted
    return 0
