"""Arrivals: jobs that wait for other jobs of their round.

Requests of rounds without a name wait in an `ArrivalWindow`. A client may also name a round. It
begins when all its requests are there, or after a timeout.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tokendance.rounds.arrival_window import ArrivalPaces, ArrivalWindow, named_round_due_s
from tokendance.server.jobs import Job, RoundKey
from tokendance.server.kept_chats import KeptChat
from tokendance.server.loading import Loader
from tokendance.server.settings import ServerSettings
from tokendance.store.entries import RoundId


@dataclass(slots=True)
class NamedRound:
    """A round that a client has named, until all its jobs are done.

    Attributes:
        waiting: jobs that have not begun.
        first_s: when the first of them arrived.
        last_s: when the last of them arrived.
        size: number of its requests, if a client has given it.
        num_requests: that have arrived, without those cancelled before they began.
        round_id: of the engine, once it has begun.
        num_live: jobs that have begun and are not done.
        chats: its sessions, and whether any request of each was answered in it.
    """

    waiting: list[Job]
    first_s: float
    last_s: float
    size: int | None = None
    num_requests: int = 0
    round_id: RoundId | None = None
    num_live: int = 0
    chats: dict[KeptChat, bool] = field(default_factory=dict)

    def due_s(self, wait_s: float) -> float:
        """When it begins if no other request arrives: at once if all are there."""
        is_full = self.size is not None and self.num_requests >= self.size
        return named_round_due_s(self.first_s, self.last_s, wait_s, is_full=is_full)


class Arrivals:
    """Jobs that have not begun, and named rounds until they end. Times are the caller's.

    Attributes:
        window: holds jobs of rounds without a name.
    """

    def __init__(self, loader: Loader, settings: ServerSettings) -> None:
        """Begin with no jobs; named rounds wait until `loader` has loaded their sessions."""
        self.window: ArrivalWindow[Job] = ArrivalWindow(
            settings.window_ms / 1000, settings.window_share
        )
        self._paces = ArrivalPaces()
        self._loader = loader
        self._round_wait_s = settings.round_wait
        self._named: dict[RoundKey | None, NamedRound] = {}  # None is never in it

    @property
    def num_named(self) -> int:
        """Named rounds that have not ended."""
        return len(self._named)

    def expect(self, count: int) -> None:
        """Change the number of requests that are still being read, by `count`."""
        self.window.num_expected += count

    def add(self, jobs: Sequence[Job], now: float) -> None:
        """Add the jobs of one request."""
        key = jobs[0].key
        if key is None:
            for job in jobs:
                self.window.add(job, now, self._paces.begin(job, job.request.prompt.salt))
            return
        named = self._named.setdefault(key, NamedRound([], now, now))
        if not named.waiting:
            named.first_s = now
        named.waiting += jobs
        named.last_s = now
        named.num_requests += 1
        named.size = jobs[0].round_size or named.size
        chat = jobs[0].chat
        if chat is not None and chat not in named.chats:  # loaded once for the whole round
            named.chats[chat] = False
            self._loader.begin(chat)

    def due_s(self) -> float | None:
        """When the next round begins if no other request arrives; None if no job waits."""
        due = [named.due_s(self._round_wait_s) for named in self._ready()]
        window_s = self.window.due_s()
        return min([*due, *([] if window_s is None else [window_s])], default=None)

    def _ready(self) -> list[NamedRound]:
        """Named rounds with jobs that wait for requests only, not for sessions to be loaded."""
        return [
            named
            for named in self._named.values()
            if named.waiting and not any(chat in self._loader for chat in named.chats)
        ]

    def take(self, now: float) -> Iterator[tuple[list[Job], NamedRound | None]]:
        """Take out the rounds that are due at `now`, with their `NamedRound` if they have a name.

        If the caller fails to begin one of them, those after it are still here.
        """
        if jobs := self.window.take(now):
            yield jobs, None
        for named in self._ready():
            if now >= named.due_s(self._round_wait_s):
                jobs, named.waiting = named.waiting, []
                named.num_live += len(jobs)
                yield jobs, named

    def remove(self, jobs: Sequence[Job]) -> list[Job]:
        """Remove the jobs of a request that has been cancelled; return those that had not begun."""
        named = self._named.get(jobs[0].key) if jobs else None
        if named is None:
            gone = [job for job in jobs if self.window.remove(job)]
            for job in gone:
                self._paces.end(job)
            return gone
        removed = [job for job in jobs if job in named.waiting]
        if removed:
            named.waiting = [job for job in named.waiting if job not in removed]
            named.num_requests -= 1
            self._end_if_done(removed[0].key)
        return removed

    def note_done(self, job: Job, *, has_answer: bool) -> None:
        """Note that a job that had begun is done; a named round may end with it."""
        self._paces.end(job)
        if (named := self._named.get(job.key)) is None:
            return
        named.num_live -= 1
        if job.chat is not None and has_answer:
            job.chat.note(job.request)
            named.chats[job.chat] = True
        self._end_if_done(job.key)

    def _end_if_done(self, key: RoundKey | None) -> None:
        """Drop a named round that has no jobs any more, and store its sessions."""
        named = self._named[key]
        if named.waiting or named.num_live > 0:
            return
        del self._named[key]
        for chat, has_answers in named.chats.items():
            if has_answers:
                self._loader.save(chat)

    def take_waiting(self) -> list[Job]:
        """All jobs that have not begun, for when the engine has stopped."""
        waiting = [job for named in self._named.values() for job in named.waiting]
        return [*self.window.take(math.inf), *waiting]

    def __bool__(self) -> bool:
        """Whether any job waits."""
        waiting = any(named.waiting for named in self._named.values())
        return waiting or self.window.due_s() is not None
