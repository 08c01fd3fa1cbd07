"""One HTTP call in the engine: several requests submitted together, their events brought back to the event loop.

The engine's thread hands over one list of events a step; the event loop turns them into text. Nothing here knows a
protocol.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial
from types import TracebackType
from typing import Self

from inhouse.engine.request import Event, Request
from inhouse.engine.session import Session
from inhouse.engine.text import TextAssembler, TextEnd, TextEvent, TextFailed


class Call:
    """The requests of one call and the queue by which their events come back.

    Use as an async context manager: leaving it, for whatever reason (done, error, the client went away), cancels
    what still runs, so that its blocks are free at the next step.

    Args:
        session: the model that answers.
        requests: one for each prompt; submitted in `__aenter__`, where a refusal (too long, queue full) is raised.
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
                request.prompt,
                stops,
                skip_special=skip_special,
                include_stop=include_stop,
                stop_choice=partial(session.engine.stop_choice, request.id),
            )
            for request in requests
        ]

    async def __aenter__(self) -> Self:
        try:
            for index, request in enumerate(self._requests):
                self._session.engine.submit(request, partial(self._deliver, index))
        except BaseException:
            self._cancel()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cancel()

    def _deliver(self, index: int, events: list[Event]) -> None:
        """Called in the engine's thread; a loop that has closed meanwhile wants nothing any more."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, events))
        except RuntimeError:
            self._session.engine.cancel(self._requests[index].id)

    def _cancel(self) -> None:
        for index in self._running:
            self._session.engine.cancel(self._requests[index].id)
        self._running.clear()

    async def events(self) -> AsyncIterator[tuple[int, int, TextEvent]]:
        """(request index, choice, event) until every choice of every request has ended."""
        while self._running:
            index, events = await self._queue.get()
            for event in self._assemblers[index].feed(events):
                if isinstance(event, TextEnd | TextFailed) and event.last:
                    self._running.discard(index)
                yield index, getattr(event, "choice", 0), event
