"""The engine in a thread of its own, so that the event loop never waits for the model.

Handlers hand in jobs and listen to events; everything that touches the engine happens here:

    handler   arrive() ... submit(job)           cancel(job)
                             |                       |
    thread    inbox -> window, rounds with ids -> engine.add -> engine.step -> job.listen(event)

All methods of `Worker` may be called from any thread; a job's listener is called on the worker's.
"""

import asyncio
import contextlib
import logging
import math
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

from tokendance.disk.records import SessionKey
from tokendance.engine.request import Request
from tokendance.errors import AbortedError, TokenDanceError
from tokendance.llm import LLM, make_output
from tokendance.rounds.discovery import Discovery, DiscoveryConfig
from tokendance.rounds.segments import Salt
from tokendance.server.errors import as_api_error
from tokendance.server.idle_shadows import IdleShadows
from tokendance.server.jobs import Finished, Job, NewTokens, RoundKey
from tokendance.server.kept import KeptSessions
from tokendance.server.metrics import Metrics
from tokendance.server.reading import Readings
from tokendance.server.window import Window
from tokendance.session import Session
from tokendance.store.entries import RoundId

Result = TypeVar("Result")

log = logging.getLogger("tokendance.server")

# Tenants whose shared pieces are remembered; the one that asked longest ago is forgotten.
_MAX_TENANTS = 64
# A named round whose requests keep coming waits so many times as long as for one.
_LONGEST_WAITS = 10


@dataclass(slots=True)
class _NamedRound:
    """A round that has not ended.

    Attributes:
        waiting: jobs that have not started.
        first_s: when the first of them came.
        last_s: when the last of them came.
        size: requests of it, if a client has said.
        num_requests: that have come and not gone before it began.
        round_id: of the engine, once it has started.
        num_live: jobs that have started and are not done.
        sessions: whose KV it goes on from, and whether somebody has answered in it.
    """

    waiting: list[Job]
    first_s: float
    last_s: float
    size: int | None = None
    num_requests: int = 0
    round_id: RoundId | None = None
    num_live: int = 0
    sessions: dict[SessionKey, bool] = field(default_factory=dict)

    def due_s(self, wait_s: float) -> float:
        """When it starts if nobody else comes: at once if all are there."""
        if self.size is not None and self.num_requests >= self.size:
            return self.last_s
        return min(self.last_s + wait_s, self.first_s + _LONGEST_WAITS * wait_s)


class Worker:
    """Runs an engine; see the module."""

    def __init__(
        self,
        llm: LLM,
        metrics: Metrics,
        *,
        window_s: float,
        window_share: float,
        round_wait_s: float,
        recent_s: float,
    ) -> None:
        """Prepare; `start` begins.

        Args:
            llm: nobody else may use its engine.
            metrics: told of what happens.
            window_s: see `ServerSettings`.
            window_share: likewise.
            round_wait_s: likewise.
            recent_s: likewise.
        """
        self._llm = llm
        self._metrics = metrics
        self._round_wait_s = round_wait_s
        self._discovery = DiscoveryConfig(recent_s=recent_s)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._window: Window[Job] = Window(window_s, window_share)
        self._named: OrderedDict[RoundKey, _NamedRound] = OrderedDict()
        self._live: dict[Request, Job] = {}
        self._shadows = IdleShadows(llm.engine, metrics)
        self._kept = KeptSessions(llm.tiers)
        self._reading = Readings()
        self._discoveries: OrderedDict[Salt, Discovery] = OrderedDict()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._stopping = False
        self._gate = threading.Lock()
        self._is_closed = False  # nobody reads the inbox any more
        self._deadline = math.inf  # when what is under way is ended
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

    def arrive(self) -> None:
        """Announce a request that is still being read, so that a round waits for it a little."""

        def note() -> None:
            self._window.num_expected += 1

        self._put(note)

    def submit(self, jobs: Sequence[Job], *, announced: bool = False) -> None:
        """Hand in jobs that arrived together.

        Args:
            jobs: of one request; those without a key wait for others in the window.
            announced: whether `arrive` was called for them.
        """

        def take() -> None:
            self._window.num_expected -= announced
            now = time.perf_counter()
            for job in jobs:
                if job.key is None:
                    self._window.add(job, now)
            if jobs and jobs[0].key is not None:
                self._add_named(jobs, jobs[0].key, now)

        if not self._put(take):
            self._refuse(jobs)

    def submit_round(self, jobs: Sequence[Job]) -> None:
        """Hand in a whole round, which starts at once."""

        def take() -> None:
            self._begin(jobs, self._llm.engine.new_round_id())

        if not self._put(take):
            self._refuse(jobs)

    async def call(self, work: Callable[[], Result]) -> Result:
        """Do something on the engine's thread, between two steps; what it raises is raised here.

        Raises:
            ApiError: 503 if there is no thread any more.
        """

        def run(future: Future[Result]) -> None:
            if not future.set_running_or_notify_cancel():
                return  # who waited for it has gone
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        return await self._answer_of(run)

    async def restore(self, session: Session) -> None:
        """Read what memory lacks of a session, while others are answered.

        Raises:
            TokenDanceError: if it cannot be read.
            ApiError: 503 if there is no thread any more.
        """

        def begin(future: Future[None]) -> None:
            def ended(error: TokenDanceError | None) -> None:
                if not future.set_running_or_notify_cancel():
                    return  # who waited for it has gone
                if error is None:
                    future.set_result(None)
                else:
                    future.set_exception(error)

            assert session.key is not None
            self._reading.begin(session.key, session.restoring, ended)

        await self._answer_of(begin)

    async def _answer_of(self, begin: Callable[[Future[Result]], None]) -> Result:
        """Begin something on the engine's thread, and wait until it has an answer."""
        future: Future[Result] = Future()
        if not self._put(lambda: begin(future)):
            raise as_api_error(AbortedError("The engine has stopped."))
        return await asyncio.wrap_future(future)

    def withdraw(self) -> None:
        """Take an announcement back."""
        self.submit((), announced=True)

    def cancel(self, jobs: Iterable[Job]) -> None:
        """Take jobs back, wherever they are; nothing happens to those that are done."""
        given = list(jobs)
        self._put(lambda: self._cancel(given))

    def stop(self, drain_s: float) -> None:
        """Finish what is under way, for so many seconds at most, then end the thread."""
        self._stop_by(time.perf_counter() + drain_s)
        self._thread.join(drain_s + 10.0)

    def hurry(self) -> None:
        """End what is under way, and then the thread; who waits is told."""
        self._stop_by(time.perf_counter())

    def _stop_by(self, deadline: float) -> None:
        def begin_to_stop() -> None:
            self._stopping = True
            self._deadline = min(self._deadline, deadline)

        self._put(begin_to_stop)

    def _put(self, command: Callable[[], None]) -> bool:
        """Hand a command to the thread; say whether there is one that will read it."""
        with self._gate:
            if not self._is_closed:
                self._inbox.put(command)
            return not self._is_closed

    # -- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not (self._stopping and self._is_idle()):
                self._read_inbox()
                self._begin_due()
                if self._live or self._stopping:
                    self._shadows.give_way()
                else:
                    self._shadows.go_on()
                if time.perf_counter() > self._deadline:
                    self._reading.stop()
                    self._cancel(list(self._live.values()), "The server is stopping.")
                if self._llm.engine.has_work:
                    self._llm.engine.step()
                if self._llm.tiers is not None:
                    self._llm.tiers.after_step(time.perf_counter(), self._live.keys())
                self._reading.go_on()
                self._publish()
        except BaseException as error:
            self.failure = error
            log.exception("the engine has failed; nothing is served any more")
        finally:
            with self._gate:
                self._is_closed = True
            self._take_last_commands()
            self._reading.stop()
            self._refuse([*self._live.values(), *self._take_waiting()])

    def _take_last_commands(self) -> None:
        """Take what has come before nobody reads the inbox any more: all of it is answered."""
        with contextlib.suppress(queue.Empty):
            while True:
                command = self._inbox.get_nowait()
                try:
                    command()
                except Exception:  # of an engine that has failed
                    log.exception("what came last could not be taken")

    def _is_idle(self) -> bool:
        named = any(named.waiting for named in self._named.values())
        return not (self._live or named or self._reading) and self._window.due_s() is None

    def _read_inbox(self) -> None:
        """Take what has come; wait only where there is nothing to compute."""
        timeout: float | None = 0.0
        tiers = self._llm.tiers
        if not self._llm.engine.can_compute:
            tier_s = tiers.due_s() if tiers is not None else None
            due_s = (self._window.due_s(), self._shadows.due_s(), tier_s, *self._named_due())
            due = [time_ for time_ in due_s if time_ is not None]
            timeout = max(0.0, min(due) - time.perf_counter()) if due else None
            if self._stopping:
                timeout = 0.0
            if self._reading:
                timeout = self._reading.pause_s
        with contextlib.suppress(queue.Empty):
            if timeout is None or timeout > 0:
                self._inbox.get(timeout=timeout)()
            while True:
                self._inbox.get_nowait()()

    def _named_due(self) -> list[float]:
        return [
            named.due_s(self._round_wait_s)
            for named in self._named.values()
            if named.waiting and not self._is_being_read(named)
        ]

    def _is_being_read(self, named: _NamedRound) -> bool:
        return any(session in self._reading for session in named.sessions)

    def _begin_due(self) -> None:
        now = time.perf_counter()
        ready = self._window.take_all() if self._stopping else self._window.take(now)
        if ready:
            self._begin(ready, self._llm.engine.new_round_id())
        for named in self._named.values():
            if not named.waiting or self._is_being_read(named):
                continue
            if self._stopping or now >= named.due_s(self._round_wait_s):
                if named.round_id is None:
                    named.round_id = self._llm.engine.new_round_id()
                jobs, named.waiting = named.waiting, []
                named.num_live += len(jobs)
                self._begin(jobs, named.round_id)

    def _add_named(self, jobs: Sequence[Job], key: RoundKey, now: float) -> None:
        named = self._named.setdefault(key, _NamedRound([], now, now))
        if not named.waiting:
            named.first_s = now
        named.waiting += jobs
        named.last_s = now
        named.num_requests += 1
        named.size = jobs[0].round_size or named.size
        session, salt = jobs[0].session, jobs[0].request.prompt.salt
        if session is not None and session not in named.sessions:  # once for the whole round
            named.sessions[session] = False
            self._reading.begin(session, lambda: self._kept.restoring(session, salt))

    def _begin(self, jobs: Sequence[Job], round_id: RoundId) -> None:
        """Start jobs as one round: those of a tenant are compared with each other."""
        by_salt: dict[Salt, list[Job]] = {}
        for job in jobs:
            self._live[job.request] = job  # so that they are answered even if what follows fails
            by_salt.setdefault(job.request.prompt.salt, []).append(job)
        for salt, together in by_salt.items():
            prompts = [job.request.prompt for job in together]
            known = [self._llm.engine.num_known(prompt) for prompt in prompts]
            self._discover(
                salt, [pair for pair in zip(together, known, strict=True) if not pair[0].marked]
            )
            sizes = len(together)
            for job, num_known in zip(together, known, strict=True):
                request = job.request
                request.round_id = round_id
                # A lone request that shares nothing is computed exactly, unless it goes on from
                # what was not.
                request.in_round = bool(request.prompt.shared_segments()) or num_known > 0
                job.alone = sizes == 1
            self._metrics.begin_round(sizes)
            self._llm.engine.add([job.request for job in together])

    def _discover(self, salt: Salt, known: Sequence[tuple[Job, int]]) -> None:
        """Cut the prompts of jobs into segments; with each job, what its prefix finds."""
        if not known or not self._llm.engine.config.reuses_segments:
            return
        jobs = [job for job, _ in known]
        if salt not in self._discoveries:
            self._discoveries[salt] = Discovery(salt, self._discovery)
            if len(self._discoveries) > _MAX_TENANTS:
                self._discoveries.popitem(last=False)
        self._discoveries.move_to_end(salt)
        try:
            found = self._discoveries[salt].segment(
                [job.request.prompt.token_ids for job in jobs],
                time.perf_counter(),
                [num_known for _, num_known in known],
            )
        except Exception:  # nothing is found then, and all are served
            log.exception("prompts could not be compared; what was remembered is forgotten")
            del self._discoveries[salt]
            return
        self._llm.engine.recall(found.heard, salt)
        for job, prompt in zip(jobs, found.prompts, strict=True):
            job.request.prompt = prompt

    def _publish(self) -> None:
        """Tell listeners what is new, and let go of what is done."""
        for request, job in list(self._live.items()):
            # A request that began anew says again what it has said.
            new = tuple(request.generated[job.num_sent :])
            if new and request.error is None:
                logprobs = tuple(request.top_logprobs[job.num_sent :])
                job.num_sent += len(new)
                job.listen(NewTokens(new, logprobs))
            if request.finish_reason is not None:
                self._finish(job)

    def _finish(self, job: Job) -> None:
        request = job.request
        del self._live[request]
        output = make_output(request)
        self._metrics.finish(job, request, output)
        if job.alone and output.error is None:
            self._window.note_lone(time.perf_counter() - job.arrived_s)
        named = self._named.get(job.key) if job.key is not None else None
        if named is not None and job.key is not None:
            named.num_live -= 1
            if job.session is not None and output.error is None:
                self._kept.note(job.session, request)
                named.sessions[job.session] = True
            self._end_if_done(job.key)
        if all(other.round_id != request.round_id for other in self._live):
            self._llm.engine.pop_round(request.round_id)
        job.listen(Finished(output))

    def _cancel(self, jobs: Sequence[Job], why: str = "The request was taken back.") -> None:
        """End jobs, wherever they are."""
        left: set[RoundKey] = set()
        for job in jobs:
            if self._remove_waiting(job):
                self._refuse([job], why)
                left |= {job.key} if job.key is not None else set()
            elif job.request in self._live:
                self._llm.engine.abort(job.request, why)
        for key in left & self._named.keys():
            self._named[key].num_requests -= 1

    def _remove_waiting(self, job: Job) -> bool:
        """Take a job back that has not started; say whether there was one."""
        named = self._named.get(job.key) if job.key is not None else None
        if named is None:
            return self._window.remove(job)
        if job not in named.waiting:
            return False
        named.waiting.remove(job)
        if job.key is not None:
            self._end_if_done(job.key)
        return True

    def _end_if_done(self, key: RoundKey) -> None:
        """Let go of a named round of which nobody is left, and store what was said in it."""
        named = self._named[key]
        if named.waiting or named.num_live > 0:
            return
        del self._named[key]
        for session, has_answers in named.sessions.items():
            if has_answers:
                self._kept.save(session)

    def _take_waiting(self) -> list[Job]:
        named = [job for one in self._named.values() for job in one.waiting]
        return [*self._window.take_all(), *named]

    @staticmethod
    def _refuse(jobs: Iterable[Job], why: str = "The engine has stopped.") -> None:
        """Answer jobs that nobody will run."""
        for job in jobs:
            job.request.error = AbortedError(why)
            job.request.finish_reason = "error"
            with contextlib.suppress(Exception):
                job.listen(Finished(make_output(job.request)))
