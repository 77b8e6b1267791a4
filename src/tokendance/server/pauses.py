"""How long the engine's thread and the event loop were held up, for metrics.

Each is a histogram, and the longest of the last minute: `tokendance_engine_pause_seconds` and
`tokendance_engine_longest_pause_seconds`, and the same of `event_loop`. A thread also waits where
others of the process or of the machine have the processor, so there is the most that it computed
itself in one pause, too: `tokendance_engine_longest_pause_cpu_seconds`.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Gauge, Histogram

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
# The longest is that of the window that goes on, and of the one before.
_WINDOW_S = 60.0
# A loop that was held up for less than this may not show it.
_EVERY_S = 0.01


@dataclass(frozen=True, slots=True)
class _Longest:
    """The longest pause of a window, and the most that the thread computed in one."""

    seconds: float = 0.0
    computing_s: float = 0.0

    def with_pause(self, seconds: float, computing_s: float) -> "_Longest":
        return _Longest(max(self.seconds, seconds), max(self.computing_s, computing_s))


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
        self._longest = self._longest_before = _Longest()
        name = f"tokendance_{who}"
        self._histogram = Histogram(
            f"{name}_pause_seconds", text, registry=registry, buckets=_SECONDS
        )
        longest = f"{text} The longest of the last minute or two."
        gauge = Gauge(f"{name}_longest_pause_seconds", longest, registry=registry)
        gauge.set_function(self.longest)
        computing = f"{text} Most that the thread computed in one of the last minute or two."
        gauge = Gauge(f"{name}_longest_pause_cpu_seconds", computing, registry=registry)
        gauge.set_function(self.longest_computing)

    def note(self, seconds: float, computing_s: float = 0.0) -> None:
        """Note a pause that has just ended, of which the thread itself computed for some time."""
        self._histogram.observe(seconds)
        with self._lock:
            self._turn()
            self._longest = self._longest.with_pause(seconds, computing_s)

    def longest(self) -> float:
        """Seconds of the longest pause in the last minute, or up to a minute before that."""
        with self._lock:
            self._turn()
            return max(self._longest.seconds, self._longest_before.seconds)

    def longest_computing(self) -> float:
        """Seconds that the thread computed in one of those pauses, at most."""
        with self._lock:
            self._turn()
            return max(self._longest.computing_s, self._longest_before.computing_s)

    def _turn(self) -> None:
        window = int(self._clock() // _WINDOW_S)
        if window != self._window:
            self._longest_before = self._longest if window == self._window + 1 else _Longest()
            self._longest = _Longest()
            self._window = window


class EngineWatch:
    """Tells pauses of the engine's thread: when it neither computes a pass nor waits for work.

    wait | command, tick ... | pass | tick, command, tick ... | pass | tick | wait
           <---- pause ---->          <------- pause ------->          <-->
    """

    def __init__(
        self,
        pauses: Pauses,
        clock: Callable[[], float] = time.perf_counter,
        cpu_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        """Note what is told in `pauses`; all methods are called on the engine's thread.

        `cpu_clock` is how long that has computed.
        """
        self._pauses = pauses
        self._clock = clock
        self._cpu_clock = cpu_clock
        # When it had something to do, by both clocks; None while it waits.
        self._since: tuple[float, float] | None = None

    def wake(self) -> None:
        """The thread has something to do."""
        self._since = self._clock(), self._cpu_clock()

    def rest(self) -> None:
        """The thread waits from now on."""
        self._note(self._clock(), self._cpu_clock())
        self._since = None

    def passed(self, end_s: float, seconds: float, cpu_s: float) -> None:
        """A pass has ended at a time of the clock, and took so long, and so much computing."""
        now = self._cpu_clock()
        self._note(end_s - seconds, now - cpu_s)
        self._since = end_s, now

    def _note(self, end_s: float, end_cpu_s: float) -> None:
        if self._since is not None:
            since_s, since_cpu_s = self._since
            self._pauses.note(max(0.0, end_s - since_s), max(0.0, end_cpu_s - since_cpu_s))


async def watch_event_loop(pauses: Pauses) -> None:
    """Note by how much the running loop wakes this later than it asks for, until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due_s, cpu_s = loop.time() + _EVERY_S, time.thread_time()
        await asyncio.sleep(_EVERY_S)
        late_s = max(0.0, loop.time() - due_s)
        # What it computed before it was due is in it, so this is what it computed at most.
        pauses.note(late_s, min(late_s, time.thread_time() - cpu_s))
