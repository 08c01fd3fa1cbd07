"""What a beam search tells its caller: events for the outputs that it found, or for its early end."""

from dataclasses import replace

from inhouse.core.errors import InhouseError, UsageError
from inhouse.engine.request import Event, Failed, Finished, FinishReason, TokenEvent
from inhouse.engine.sequence import Sequence


def found(sequence: Sequence, now: float) -> list[Event]:
    """The n best of the group that `sequence` was the last beam of, whole; an error for each that was not found."""
    request, group = sequence.request, sequence.group
    assert group is not None
    count, outputs = request.params.n, group.finished
    events: list[Event] = []
    for choice in range(count):
        last = choice == count - 1
        if choice >= len(outputs):
            error = UsageError(f"beam search found {len(outputs)} outputs, not {count}", param="n")
            events.append(Failed(request.id, choice, error, last))
            continue
        best = outputs[choice]
        stop = best.tokens[-1] if best.reason is FinishReason.STOP else None
        shown = tuple(best.tokens if stop is None else best.tokens[:-1])
        if shown:
            events.append(TokenEvent(request.id, choice, shown, (), now))
        usage = replace(sequence.usage(), completion_tokens=len(best.tokens))
        timings = sequence.clock.timings(now, sequence.preemptions)
        events.append(Finished(request.id, choice, best.reason, usage, timings, sequence.seed, last, stop, best.score))
    return events


def broken_off(sequence: Sequence, now: float, error: InhouseError | None) -> list[Event]:
    """An end for each choice of a search that failed, or (None) was cancelled."""
    request, count = sequence.request, sequence.request.params.n
    if error is not None:
        return [Failed(request.id, choice, error, choice == count - 1) for choice in range(count)]
    usage = replace(sequence.usage(), completion_tokens=0)
    timings = sequence.clock.timings(now, sequence.preemptions)
    reason, seed = FinishReason.CANCELLED, sequence.seed
    return [Finished(request.id, i, reason, usage, timings, seed, i == count - 1) for i in range(count)]
