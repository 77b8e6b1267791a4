"""asyncio's event loop, with few events in each of its turns, so that no crowd holds up the others.

The loop handles all that has happened on its sockets since it last looked, and then what is due.
Hundreds of connections that come or end at once would make that one long turn:

    loop    all that has happened ...................... | timers | ...
    here    some | timers | some | timers | some | timers | ...
"""

import asyncio
import selectors
from collections import deque

# A request takes a millisecond or two of the loop's thread, and so does a connection that ends.
_EVENTS_IN_A_TURN = 8

Event = tuple[selectors.SelectorKey, int]


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Make an event loop for a server: by selectors on every system."""
    return asyncio.SelectorEventLoop(FewAtATime())


class FewAtATime(selectors.DefaultSelector):
    """Tells of a few events at a time, and of all of those before it asks the system for others."""

    def __init__(self) -> None:
        """Begin without files."""
        super().__init__()
        self._untold: deque[Event] = deque()

    def select(self, timeout: float | None = None) -> list[Event]:
        """Return what has happened, or did not long ago: it may have been dealt with meanwhile.

        So reading or writing may have to wait all the same, for which users of sockets that do not
        block are prepared.
        """
        told: list[Event] = []
        while self._untold and len(told) < _EVENTS_IN_A_TURN:
            key, events = self._untold.popleft()
            # The file may be closed by now and its number another's, or somebody else wait for it.
            if self.get_map().get(key.fd) is key:
                told.append((key, events))
        if told:
            return told
        events_now = super().select(timeout)
        self._untold.extend(events_now[_EVENTS_IN_A_TURN:])
        return events_now[:_EVENTS_IN_A_TURN]
