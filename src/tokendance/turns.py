"""Whose turn it is: calls of one LLM are served one after the other, whoever makes them.

An engine has one driver at a time. A call waits until those before it are done, on whatever thread
it is made; coroutines have their calls made on a thread that waits for them. Where waiting would
never end there is an error in its place: in a process that was forked, in a callback of the call
that is under way, and while a server drives the engine.
"""

import asyncio
import contextvars
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

from tokendance.errors import AbortedError, UsageError
from tokendance.outputs import Progress

Result = TypeVar("Result")


@dataclass(slots=True, eq=False)
class _Turn:
    """A call that waits or runs."""

    thread: int
    refusal: str | None  # what others are told who come meanwhile; None: they wait
    stop: threading.Event  # set when nobody waits for it any more
    is_driving: bool = False  # the engine, which may call back


class Turns:
    """The queue of calls, in the order in which they came; the first has its turn."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._queue: deque[_Turn] = deque()
        self._changed = threading.Condition()
        self._background: ThreadPoolExecutor | None = None  # makes the calls of coroutines

    @contextmanager
    def take(
        self, *, refusal: str | None = None, stop: threading.Event | None = None
    ) -> Iterator[None]:
        """Wait for a turn, and have it until the end; a thread that has it need not wait again.

        Args:
            refusal: tells all who come meanwhile why they are not served; they wait if left out.
            stop: ends the waiting when `stop_waiting` sets it.

        Raises:
            UsageError: if waiting would never end; see the module.
            AbortedError: if `stop` was set.
        """
        self.check_process()
        here = threading.get_ident()
        under_way = self._under_way()
        if under_way is not None and under_way.thread == here:
            if under_way.is_driving:
                raise UsageError(
                    "An LLM was called by its own progress callback, in the middle of a round. "
                    "Call it when the round is done."
                )
            yield
            return
        turn = _Turn(here, refusal, stop or threading.Event())
        try:
            with self._changed:
                self._queue.append(turn)
                self._changed.wait_for(
                    lambda: (
                        turn.stop.is_set()
                        or self._queue[0] is turn
                        or self._queue[0].refusal is not None
                    )
                )
                if turn.stop.is_set():
                    raise AbortedError("Nobody waits for the call any more.")
                if self._queue[0] is not turn:
                    raise UsageError(self._queue[0].refusal)
            yield
        finally:
            with suppress(ValueError):  # an interrupt may come before it is there
                self._queue.remove(turn)
            with self._changed:
                self._changed.notify_all()

    def check_process(self) -> None:
        """Raise UsageError in a process that was forked."""
        if os.getpid() != self._process:
            raise UsageError(
                f"The LLM is that of process {self._process}, from which this one was forked: its "
                "threads, its device and its store stay there. Make an LLM in each process, or "
                "start processes by multiprocessing's 'spawn'."
            )

    def _under_way(self) -> _Turn | None:
        with suppress(IndexError):  # another thread may just have ended its turn
            return self._queue[0]
        return None

    # -- during a turn ------------------------------------------------------------------------

    @contextmanager
    def driving(self) -> Iterator[None]:
        """Whoever has the turn drives the engine, and is not to be called back meanwhile."""
        turn = self._queue[0]
        turn.is_driving = True
        try:
            yield
        finally:
            turn.is_driving = False

    def check_stop(self) -> None:
        """Raise AbortedError if nobody waits any more for the call that has its turn."""
        if self._queue[0].stop.is_set():
            raise AbortedError("Nobody waits for the call any more.")

    # -- coroutines ---------------------------------------------------------------------------

    async def in_background(self, call: Callable[[], Result]) -> Result:
        """Make a call in its turn, on another thread, while the event loop goes on.

        If the awaiting task is cancelled, a call that waits is not made, and one that is under way
        ends at its next `check_stop`: then the cancellation goes on.
        """
        self.check_process()
        stop = threading.Event()

        def call_in_turn() -> Result:
            with self.take(stop=stop):
                return call()

        with self._changed:
            if self._background is None:
                self._background = ThreadPoolExecutor(1, "tokendance")
        job = self._background.submit(contextvars.copy_context().run, call_in_turn)
        done = asyncio.wrap_future(job)
        try:
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            if not job.cancel():  # it has begun
                with self._changed:
                    stop.set()
                    self._changed.notify_all()
                await asyncio.wait([done])
                if not done.cancelled():
                    done.exception()  # which nobody wants: asyncio is not to complain of that
            raise


def in_event_loop(progress: Progress | None) -> Progress | None:
    """Have `progress` called in the running event loop, whatever thread it is called on."""
    if progress is None:
        return None
    loop = asyncio.get_running_loop()

    def call_soon(phase: str, count: int) -> None:
        loop.call_soon_threadsafe(progress, phase, count)

    return call_soon
