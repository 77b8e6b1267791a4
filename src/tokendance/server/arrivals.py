"""Arrivals: jobs that have come and not begun, until their round is there.

Most rounds have no name: what arrives within moments of each other begins together (`window.py`).
A client may name its round, and then it begins when all are there, or when nobody else comes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tokendance.server.jobs import Job, RoundKey
from tokendance.server.kept_chats import KeptChat
from tokendance.server.loading import Loader
from tokendance.server.window import ArrivalWindow
from tokendance.store.entries import RoundId

# A named round whose requests keep coming waits so many times as long as for one.
_LONGEST_WAITS = 10


@dataclass(slots=True)
class NamedRound:
    """A round that a client has named, and that has not ended.

    Attributes:
        waiting: jobs that have not begun.
        first_s: when the first of them came.
        last_s: when the last of them came.
        size: requests of it, if a client has said.
        num_requests: that have come and not gone before it began.
        round_id: of the engine, once it has begun.
        num_live: jobs that have begun and are not done.
        chats: sessions whose KV it goes on from, and whether somebody has answered in it.
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
        """When it begins if nobody else comes: at once if all are there."""
        if self.size is not None and self.num_requests >= self.size:
            return self.last_s
        return min(self.last_s + wait_s, self.first_s + _LONGEST_WAITS * wait_s)


class Arrivals:
    """What has come and not begun. The clock is the caller's.

    Attributes:
        window: holds jobs of rounds without a name.
    """

    def __init__(self, window: ArrivalWindow[Job], loader: Loader, round_wait_s: float) -> None:
        """Begin with nobody.

        Args:
            window: for jobs of rounds without a name.
            loader: named rounds wait for sessions that it loads.
            round_wait_s: a named round begins so long after its last request, if it is not full.
        """
        self.window = window
        self._loader = loader
        self._round_wait_s = round_wait_s
        self._named: dict[RoundKey | None, NamedRound] = {}  # None is no key of it

    @property
    def num_named(self) -> int:
        """Named rounds that have not ended."""
        return len(self._named)

    def announce(self, count: int) -> None:
        """Have rounds without a name wait for requests that are still being read.

        Args:
            count: how many more there are; negative for fewer.
        """
        self.window.num_expected += count

    def add(self, jobs: Sequence[Job], now: float) -> None:
        """Take jobs of one request."""
        key = jobs[0].key
        if key is None:
            for job in jobs:
                self.window.add(job, now)
            return
        named = self._named.setdefault(key, NamedRound([], now, now))
        if not named.waiting:
            named.first_s = now
        named.waiting += jobs
        named.last_s = now
        named.num_requests += 1
        named.size = jobs[0].round_size or named.size
        chat = jobs[0].chat
        if chat is not None and chat not in named.chats:  # once for the whole round
            named.chats[chat] = False
            self._loader.begin(chat)

    def due_s(self) -> float | None:
        """When a round begins if nobody else comes; None while nobody waits."""
        due = [named.due_s(self._round_wait_s) for named in self._ready()]
        window_s = self.window.due_s()
        return min([*due, *([] if window_s is None else [window_s])], default=None)

    def _ready(self) -> list[NamedRound]:
        """Named rounds with jobs that wait for nothing but others of their round."""
        return [
            named
            for named in self._named.values()
            if named.waiting and not any(chat in self._loader for chat in named.chats)
        ]

    def take(
        self, now: float, *, all_now: bool = False
    ) -> list[tuple[list[Job], NamedRound | None]]:
        """Hand over the rounds that begin now, each with its name, if it has one.

        Args:
            now: clock time.
            all_now: do not wait for others.
        """
        rounds: list[tuple[list[Job], NamedRound | None]] = []
        jobs = self.window.take_all() if all_now else self.window.take(now)
        if jobs:
            rounds.append((jobs, None))
        for named in self._ready():
            if all_now or now >= named.due_s(self._round_wait_s):
                jobs, named.waiting = named.waiting, []
                named.num_live += len(jobs)
                rounds.append((jobs, named))
        return rounds

    def remove(self, job: Job) -> bool:
        """Take a job back that has not begun; return whether there was one."""
        named = self._named.get(job.key)
        if named is None:
            return self.window.remove(job)
        if job not in named.waiting:
            return False
        named.waiting.remove(job)
        return True

    def note_gone(self, key: RoundKey | None) -> None:
        """Note that a request was taken back before it began: its round is smaller by it."""
        if (named := self._named.get(key)) is not None:
            named.num_requests -= 1

    def note_done(self, job: Job, *, has_answer: bool) -> None:
        """Note that a job that had begun is done."""
        if (named := self._named.get(job.key)) is None:
            return
        named.num_live -= 1
        if job.chat is not None and has_answer:
            job.chat.note(job.request)
            named.chats[job.chat] = True

    def end_if_done(self, key: RoundKey | None) -> list[KeptChat]:
        """Let go of a named round of which nobody is left; return the sessions to be stored."""
        named = self._named.get(key)
        if named is None or named.waiting or named.num_live > 0:
            return []
        del self._named[key]
        return [chat for chat, has_answers in named.chats.items() if has_answers]

    def take_waiting(self) -> list[Job]:
        """Hand over everybody who has not begun, when nobody will."""
        waiting = [job for named in self._named.values() for job in named.waiting]
        return [*self.window.take_all(), *waiting]

    def __bool__(self) -> bool:
        """Whether somebody waits."""
        waiting = any(named.waiting for named in self._named.values())
        return waiting or self.window.due_s() is not None
