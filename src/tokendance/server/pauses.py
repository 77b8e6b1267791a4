"""How long the engine's thread and the event loop were held up, for metrics.

Each is a histogram, and the longest of the last minute: `tokendance_engine_pause_seconds` and
`tokendance_engine_longest_pause_seconds`, and the same of `event_loop`.
"""

import asyncio
import threading
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Gauge, Histogram

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
# The longest is that of the window that goes on, and of the one before.
_WINDOW_S = 60.0
# A loop that was held up for less than this may not show it.
_EVERY_S = 0.02


class Pauses:
    """Pauses of one kind. Thread-safe."""

    def __init__(
        self,
        who: str,
        text: str,
        registry: CollectorRegistry,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Export pauses.

        Args:
            who: begins the metrics' names, after `tokendance_`.
            text: what a pause is.
            registry: of the metrics.
            clock: seconds; a test may have one of its own.
        """
        self._clock = clock
        self._lock = threading.Lock()
        self._window = 0
        self._longest = self._longest_before = 0.0
        name = f"tokendance_{who}"
        self._histogram = Histogram(
            f"{name}_pause_seconds", text, registry=registry, buckets=_SECONDS
        )
        longest = f"{text} The longest of the last minute or two."
        gauge = Gauge(f"{name}_longest_pause_seconds", longest, registry=registry)
        gauge.set_function(self.longest)

    def note(self, seconds: float) -> None:
        """Note a pause that has just ended."""
        self._histogram.observe(seconds)
        with self._lock:
            self._turn()
            self._longest = max(self._longest, seconds)

    def longest(self) -> float:
        """Seconds of the longest pause in the last minute, or up to a minute before that."""
        with self._lock:
            self._turn()
            return max(self._longest, self._longest_before)

    def _turn(self) -> None:
        window = int(self._clock() // _WINDOW_S)
        if window != self._window:
            self._longest_before = self._longest if window == self._window + 1 else 0.0
            self._longest = 0.0
            self._window = window


class EngineWatch:
    """Tells pauses of the engine's thread: when it neither computes a pass nor waits for work.

    wait | command, tick ... | pass | tick, command, tick ... | pass | tick | wait
           <---- pause ---->          <------- pause ------->          <-->
    """

    def __init__(self, pauses: Pauses, clock: Callable[[], float] = time.perf_counter) -> None:
        """Note what is told in `pauses`; all methods are called on the engine's thread."""
        self._pauses = pauses
        self._clock = clock
        self._since: float | None = None  # when it had something to do; None while it waits

    def wake(self) -> None:
        """The thread has something to do."""
        self._since = self._clock()

    def rest(self) -> None:
        """The thread waits from now on."""
        if self._since is not None:
            self._pauses.note(max(0.0, self._clock() - self._since))
        self._since = None

    def passed(self, end_s: float, seconds: float) -> None:
        """A pass has ended at a time of the clock, and took so long."""
        if self._since is not None:
            self._pauses.note(max(0.0, end_s - seconds - self._since))
        self._since = end_s


async def watch_event_loop(pauses: Pauses) -> None:
    """Note by how much the running loop wakes this later than it asks for, until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due_s = loop.time() + _EVERY_S
        await asyncio.sleep(_EVERY_S)
        pauses.note(max(0.0, loop.time() - due_s))
