"""The engine in a thread of its own, so that the event loop never waits for the model.

Handlers hand in jobs and listen to events; everything that touches the engine happens there:

    handler   announce() ... submit(jobs)        cancel(jobs)
                             |                       |
    thread    inbox -> dispatcher.tick -> job.on_event(event)

All methods of `EngineThread` may be called from any thread; jobs' listeners are called on its own.
"""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from tokendance.errors import AbortedError, TokenDanceError
from tokendance.server.dispatcher import Dispatcher, refuse
from tokendance.server.errors import as_api_error
from tokendance.server.jobs import Job
from tokendance.session import Session

Result = TypeVar("Result")

log = logging.getLogger("tokendance.server")


class EngineThread:
    """Drives a dispatcher; see the module.

    Attributes:
        failure: what has ended it, if it was not told to stop.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        """Prepare to drive a dispatcher, which nobody else may use then."""
        self._dispatcher = dispatcher
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._gate = threading.Lock()
        self._is_closed = False  # nobody reads the inbox any more
        self.failure: BaseException | None = None

    # -- from any thread ----------------------------------------------------------------------

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs and serves."""
        return self.is_running and self.failure is None

    @property
    def is_running(self) -> bool:
        """Whether the thread runs: nobody else may touch the engine."""
        return self._thread.is_alive()

    def announce(self) -> None:
        """Have rounds wait a little for a request that is being read; `submit` or `withdraw` it."""
        self._put(lambda: self._dispatcher.arrivals.expect(1))

    def withdraw(self) -> None:
        """Take an announcement back."""
        self._put(lambda: self._dispatcher.arrivals.expect(-1))

    def submit(self, jobs: Sequence[Job]) -> None:
        """Hand in the jobs of a request that was announced; they wait for others of their round."""

        def take() -> None:
            self._dispatcher.arrivals.expect(-1)
            self._dispatcher.arrivals.add(jobs, time.perf_counter())

        if not self._put(take):
            refuse(jobs)

    def submit_round(self, jobs: Sequence[Job]) -> None:
        """Hand in a whole round, which begins at once."""
        if not self._put(lambda: self._dispatcher.begin(jobs)):
            refuse(jobs)

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Take jobs back, wherever they are; nothing happens to those that are done."""
        self._put(lambda: self._dispatcher.cancel(jobs))

    async def call(self, work: Callable[[], Result]) -> Result:
        """Do something on the engine's thread, between two steps; what it raises is raised here.

        Raises:
            ApiError: 503 if there is no thread any more.
        """
        future: Future[Result] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return  # whoever waited for it has gone
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        if not self._put(run):
            raise as_api_error(AbortedError("The engine has stopped."))
        return await asyncio.wrap_future(future)

    async def restore(self, session: Session) -> None:
        """Read what memory lacks of a session, while others are answered.

        Raises:
            TokenDanceError: if it cannot be read.
            ApiError: 503 if there is no thread any more.
        """
        loaded: Future[TokenDanceError | None] = Future()
        loaded.set_running_or_notify_cancel()  # it can be set though nobody waits any more
        await self.call(lambda: self._dispatcher.loader.begin(session, loaded.set_result))
        if (error := await asyncio.wrap_future(loaded)) is not None:
            raise error

    def stop(self, drain_s: float) -> None:
        """Finish what is under way, for so many seconds at most, then end the thread."""
        self._stop_in(drain_s)
        self._thread.join(drain_s + 10.0)

    def hurry(self) -> None:
        """End what is under way, and then the thread; who waits is told."""
        self._stop_in(0.0)

    def _stop_in(self, seconds: float) -> None:
        deadline_s = time.perf_counter() + seconds
        self._put(lambda: self._dispatcher.stop_by(deadline_s))

    def _put(self, command: Callable[[], None]) -> bool:
        """Hand a command to the thread; return whether it will read it."""
        with self._gate:
            if not self._is_closed:
                self._inbox.put(command)
            return not self._is_closed

    # -- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._dispatcher.is_stopped:
                self._read_inbox()
                self._dispatcher.tick(time.perf_counter())
        except BaseException as error:
            self.failure = error
            log.exception("the engine has failed; nothing is served any more")
        finally:
            with self._gate:
                self._is_closed = True
            self._take_last_commands()
            self._dispatcher.give_up()

    def _read_inbox(self) -> None:
        """Take what has come; wait only where there is nothing to do."""
        pause_s = self._dispatcher.pause_s(time.perf_counter())
        with contextlib.suppress(queue.Empty):
            if pause_s is None or pause_s > 0:
                self._inbox.get(timeout=pause_s)()
            while True:
                self._inbox.get_nowait()()

    def _take_last_commands(self) -> None:
        """Take what has come before the inbox was closed, so that all of it is answered."""
        with contextlib.suppress(queue.Empty):
            while True:
                command = self._inbox.get_nowait()
                try:
                    command()
                except Exception:  # of an engine that has failed
                    log.exception("what came last could not be taken")
