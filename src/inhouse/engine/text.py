"""The text side of the engine's door: events of ids become events of text that never changes once it is given.

Knows tokenizers and stop strings; knows nothing of protocols, sockets or templates. It runs on the caller's side of
the queue (event loop or terminal), never in the engine's thread.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from inhouse.core.errors import InhouseError
from inhouse.engine.request import Event, Failed, Finished, PromptEvent, Timings, TokenEvent, TokenLogprob, Usage
from inhouse.model.tokens.detokenize import Detokenizer, StopStrings
from inhouse.model.tokens.tokenizer import Tokenizer

Reason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text of one choice. `tokens` are the ids that arrived since the last delta, up to the one that completed a
    stop string; `logprobs` those of the tokens whose text is wholly given by now (empty unless asked for), so that
    joined tokens equal joined text; `offsets` say at which character of the answer each of them begins."""

    choice: int
    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    offsets: tuple[int, ...] = ()
    time: float = 0.0


@dataclass(frozen=True, slots=True)
class TextEnd:
    """The end of one choice. `stop` is the stop string or token that ended it; `last`: no choice is left."""

    choice: int
    reason: Reason
    usage: Usage
    timings: Timings
    seed: int
    last: bool
    stop: str | int | None = None
    score: float | None = None  # of beam search


@dataclass(frozen=True, slots=True)
class TextFailed:
    """The end of one choice by an error."""

    choice: int
    error: InhouseError
    last: bool


TextEvent: TypeAlias = TextDelta | TextEnd | TextFailed | PromptEvent


@dataclass(slots=True)
class _Choice:
    """What one choice has given and what it withholds."""

    detokenizer: Detokenizer
    stops: StopStrings
    pieces: int = 0  # characters detokenised so far, withheld ones included
    given: int = 0  # characters handed out
    withheld: deque[tuple[int, int, TokenLogprob]] = field(default_factory=deque)  # (begin, end, logprob)
    stopped: str | None = None
    tokens: int = 0  # up to the one that completed a stop string


class TextAssembler:
    """Turns the engine's events of one request into text events.

    Args:
        tokenizer: of the model that answers.
        prompt: the request's, so that the text continues it exactly.
        stops: stop strings; the answer ends before the first that appears.
        skip_special: leave special tokens out of the text.
        include_stop: give the stop string as part of the answer.
        stop_choice: called with a choice that a stop string has ended, so that the engine stops drawing for it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stops: Sequence[str] = (),
        *,
        skip_special: bool = True,
        include_stop: bool = False,
        stop_choice: Callable[[int], None] | None = None,
    ) -> None:
        self._tokenizer, self._prompt = tokenizer, prompt
        self._stops, self._skip_special = list(stops), skip_special
        self._include_stop, self._stop_choice = include_stop, stop_choice
        self._choices: dict[int, _Choice] = {}

    def feed(self, events: Iterable[Event]) -> list[TextEvent]:
        """The text events that these engine events give, in order."""
        out: list[TextEvent] = []
        for event in events:
            if isinstance(event, TokenEvent):
                out += self._tokens(event)
            elif isinstance(event, Finished):
                out += self._finish(event)
            elif isinstance(event, Failed):
                out.append(TextFailed(event.choice, event.error, event.last))
            else:
                out.append(event)
        return out

    def _choice(self, index: int) -> _Choice:
        if index not in self._choices:
            detokenizer = Detokenizer(self._tokenizer, self._skip_special, self._prompt)
            self._choices[index] = _Choice(detokenizer, StopStrings(self._stops))
        return self._choices[index]

    def _tokens(self, event: TokenEvent) -> list[TextEvent]:
        """One delta for the tokens of an event; nothing once a stop string has ended the choice."""
        choice = self._choice(event.choice)
        if choice.stopped is not None:  # drawn before the engine heard of the stop
            return []
        text, used = "", 0
        for i, token in enumerate(event.tokens):
            piece = choice.detokenizer.push([token])
            begin, choice.pieces = choice.pieces, choice.pieces + len(piece)
            if event.logprobs:
                choice.withheld.append((begin, choice.pieces, event.logprobs[i]))
            text += self._through_stops(choice, piece)
            used = i + 1
            if choice.stopped is not None:
                break
        choice.tokens += used
        if choice.stopped is not None and self._stop_choice is not None:
            self._stop_choice(event.choice)
        return [self._delta(event.choice, choice, text, event.tokens[:used], event.time)]

    def _through_stops(self, choice: _Choice, piece: str) -> str:
        """What of `piece` (and of text withheld before) may be given."""
        emit, stopped, which = choice.stops.push(piece)
        if stopped:
            choice.stopped = which or ""
            if self._include_stop:
                emit += choice.stopped
        return emit

    def _delta(self, index: int, choice: _Choice, text: str, tokens: tuple[int, ...], time: float) -> TextDelta:
        choice.given += len(text)
        ready = []
        while choice.withheld and choice.withheld[0][1] <= choice.given:
            ready.append(choice.withheld.popleft())
        return TextDelta(index, text, tokens, tuple(r[2] for r in ready), tuple(r[0] for r in ready), time)

    def _finish(self, event: Finished) -> list[TextEvent]:
        """Gives what was withheld for a stop string that never came, then the end."""
        choice = self._choice(event.choice)
        out: list[TextEvent] = []
        if choice.stopped is None:
            text = self._through_stops(choice, choice.detokenizer.flush())
            if choice.stopped is None:
                text += choice.stops.flush()
            delta = self._delta(event.choice, choice, text, (), 0.0)
            if delta.text or delta.logprobs:
                out.append(delta)
        stop: str | int | None = choice.stopped if choice.stopped is not None else event.stop_token
        reason: Reason = "stop" if choice.stopped is not None else event.reason.value
        usage = event.usage if choice.stopped is None else replace(event.usage, completion_tokens=choice.tokens)
        out.append(TextEnd(event.choice, reason, usage, event.timings, event.seed, event.last, stop, event.score))
        return out
