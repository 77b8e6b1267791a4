"""Runs the engine in a thread of its own, so that the event loop never waits for the model.

Request handlers submit jobs and listen to their events. All that touches the engine is a command
in an inbox, which the thread takes out between two steps:

    handler   announce() ... submit(jobs)        cancel(jobs)
                             |                       |
    thread    inbox -> dispatcher.tick -> job.on_event(event)

Public methods may be called on any thread; jobs' listeners are called on the engine's.
"""

import asyncio
import contextlib
import logging
import os
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
from tokendance.server.loading import Saved
from tokendance.server.pauses import EngineWatch
from tokendance.session import Session

Result = TypeVar("Result")

log = logging.getLogger("tokendance.server")

# The system waits for no longer than some centuries, and may be asked to for ever.
_LONGEST_S = 3600.0


class EngineThread:
    """Drives a dispatcher; see the module.

    Attributes:
        failure: the exception that ended the thread, if one did.
    """

    def __init__(self, dispatcher: Dispatcher, watch: EngineWatch) -> None:
        """Prepare to drive a dispatcher, which nothing else may use then; `watch` is told."""
        self._dispatcher = dispatcher
        self._watch = watch
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._gate = threading.Lock()
        self._is_closed = False  # the inbox, which is not read any more
        self._process = os.getpid()
        self.failure: BaseException | None = None

    # -- from any thread ----------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread.

        Raises:
            UsageError: in a process that was forked since the LLM was made.
        """
        self._dispatcher.check_process()
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs and has not failed."""
        return self.is_running and self.failure is None

    @property
    def is_running(self) -> bool:
        """Whether the thread runs, so that no other may touch the engine."""
        return self._thread.is_alive()

    def announce(self) -> None:
        """Let rounds wait a little for a request being read; `submit` or `withdraw` follows."""
        self._put(lambda: self._dispatcher.arrivals.expect(1))

    def withdraw(self) -> None:
        """Take back the announcement of a request that is not submitted."""
        self._put(lambda: self._dispatcher.arrivals.expect(-1))

    def submit(self, jobs: Sequence[Job]) -> None:
        """Submit the jobs of a request that was announced; they wait for others of their round."""

        def take() -> None:
            self._dispatcher.arrivals.expect(-1)
            self._dispatcher.arrivals.add(jobs, time.perf_counter())

        if not self._put(take):
            refuse(jobs, self._why_closed)

    def submit_round(self, jobs: Sequence[Job]) -> None:
        """Submit all jobs of a round, which begins at once."""
        if not self._put(lambda: self._dispatcher.begin(jobs)):
            refuse(jobs, self._why_closed)

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Abort the jobs of one request, but for those that are done."""
        self._put(lambda: self._dispatcher.cancel(jobs))

    async def call(self, work: Callable[[], Result]) -> Result:
        """Run a function on the engine's thread, between two steps; what it raises is raised here.

        Raises:
            ApiError: 503 if the thread has ended.
        """
        future: Future[Result] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return  # the caller was cancelled
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        if not self._put(run):
            raise as_api_error(AbortedError(self._why_closed))
        return await asyncio.wrap_future(future)

    async def restore(self, session: Session) -> None:
        """Load KV of a session that is not in memory, while other requests run.

        Raises:
            TokenDanceError: if it cannot be read.
            ApiError: 503 if the thread has ended.
        """
        loaded: Future[TokenDanceError | None] = Future()
        loaded.set_running_or_notify_cancel()  # so that it may be set if the caller was cancelled
        await self.call(lambda: self._dispatcher.loader.begin(session, loaded.set_result))
        if (error := await asyncio.wrap_future(loaded)) is not None:
            raise error

    async def save(self, session: Session) -> TokenDanceError | None:
        """Save a session to disk, while other requests run; return the error if that fails.

        Raises:
            ApiError: 503 if the thread has ended.
        """
        saved: Saved = Future()
        await self.call(lambda: self._dispatcher.loader.save(session, saved))
        return await asyncio.wrap_future(saved)

    def stop(self, drain_s: float) -> None:
        """Wait for live jobs, for `drain_s` seconds at most, then end the thread."""
        self._stop_in(drain_s)
        self._thread.join(drain_s + 10.0)

    def hurry(self) -> None:
        """Abort live jobs, then end the thread, without waiting for that."""
        self._stop_in(0.0)

    def _stop_in(self, seconds: float) -> None:
        deadline_s = time.perf_counter() + seconds
        self._put(lambda: self._dispatcher.stop_by(deadline_s))

    def _put(self, command: Callable[[], None]) -> bool:
        """Put a command into the inbox; return whether it will be run."""
        if self._is_forked:
            return False  # also, a thread that is not here may hold the gate
        with self._gate:
            if not self._is_closed:
                self._inbox.put(command)
            return not self._is_closed

    @property
    def _is_forked(self) -> bool:
        """Whether the engine's thread is in another process, of which this one was forked."""
        return os.getpid() != self._process

    @property
    def _why_closed(self) -> str:
        if self._is_forked:
            return (
                f"The engine runs in process {self._process}, from which this one was forked. "
                "Make the LLM and its application in each process."
            )
        return "The engine has stopped."

    # -- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        with contextlib.ExitStack() as turn:
            try:
                turn.enter_context(self._dispatcher.driving())
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
        """Run all commands in the inbox; wait for one if there is nothing else to do."""
        pause_s = self._dispatcher.pause_s(time.perf_counter())
        with contextlib.suppress(queue.Empty):
            if pause_s is None or pause_s > 0:
                self._wait_for_command(pause_s)()
            while True:
                self._inbox.get_nowait()()

    def _wait_for_command(self, timeout_s: float | None) -> Callable[[], None]:
        self._watch.rest()
        try:
            return self._inbox.get(
                timeout=None if timeout_s is None else min(timeout_s, _LONGEST_S)
            )
        finally:
            self._watch.wake()

    def _take_last_commands(self) -> None:
        """Run commands that came before the inbox was closed, so that their callers get answers."""
        with contextlib.suppress(queue.Empty):
            while True:
                command = self._inbox.get_nowait()
                try:
                    command()
                except Exception:  # the engine may have failed
                    log.exception("what came last could not be taken")
