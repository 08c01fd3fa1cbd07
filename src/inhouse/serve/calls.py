"""One HTTP call in the engine: several requests submitted together, their events brought back to the event loop.

The engine's thread hands over one list of events a step; the event loop turns them into text. Nothing here knows a
protocol.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial

from inhouse.engine.request import Event, PromptEvent, Request
from inhouse.engine.session import Session
from inhouse.engine.text import TextAssembler, TextEnd, TextEvent, TextFailed


class Call:
    """The requests of one call and the queue by which their events come back.

    `open` submits, `events` gives what comes, `close` cancels what still runs (for whatever reason: an error, the
    client went away), so that its blocks are free at the next step. `close` is safe at any time.

    Args:
        session: the model that answers.
        requests: one for each prompt.
        stops, skip_special, include_stop: see TextAssembler.
    """

    def __init__(
        self,
        session: Session,
        requests: Sequence[Request],
        stops: Sequence[str] = (),
        *,
        skip_special: bool = True,
        include_stop: bool = False,
    ) -> None:
        self._session, self._requests = session, requests
        self._queue: asyncio.Queue[tuple[int, list[Event]]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._running = set(range(len(requests)))
        self._assemblers = [
            TextAssembler(
                session.tokenizer,
                request.continued,
                stops,
                skip_special=skip_special,
                include_stop=include_stop,
                stop_choice=partial(session.engine.cancel, request.id),
            )
            for request in requests
        ]

    def open(self) -> None:
        """Submits the requests; raises the refusal of the first that is refused (too long, queue full)."""
        try:
            for index, request in enumerate(self._requests):
                self._session.engine.submit(request, partial(self._deliver, index))
        except BaseException:
            self.close()
            raise

    def close(self) -> int:
        """Cancels what still runs; returns how many requests that were."""
        running = list(self._running)
        self._running.clear()
        for index in running:
            self._session.engine.cancel(self._requests[index].id)
        return len(running)

    def _deliver(self, index: int, events: list[Event]) -> None:
        """Called in the engine's thread; a loop that has closed meanwhile wants nothing any more."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, events))
        except RuntimeError:
            self._session.engine.cancel(self._requests[index].id)

    async def events(self) -> AsyncIterator[tuple[int, int, TextEvent]]:
        """(request index, choice, event) until every choice of every request has ended."""
        while self._running:
            index, events = await self._queue.get()
            for event in self._assemblers[index].feed(events):
                if isinstance(event, PromptEvent):  # one prompt, all its choices
                    for choice in range(self._requests[index].params.n):
                        yield index, choice, event
                    continue
                if isinstance(event, TextEnd | TextFailed) and event.last:
                    self._running.discard(index)
                yield index, event.choice, event
