"""Prompts that are being compared before they run, on threads of their own.

Comparing some hundred thousand tokens takes a second, in which others' requests go on; and a short
prompt may have to be compared with long ones of before. So the engine's thread does none of it. It
waits a little for what was just begun, which is enough for most, and goes on with a pass:

    tenant A   [ round 1 ][ round 2 ]        one after the other, since what is remembered of
    tenant B   [ round ]                     earlier rounds belongs to the comparison meanwhile

Tenants take turns at the threads, so who asks for little does not wait for all that another asks.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from tokendance.rounds.discovery import DiscoveryResult
from tokendance.rounds.segments import Salt
from tokendance.server.jobs import Job

# Most are done in it, and then run in the next pass.
_WAIT_S = 0.005
_NUM_THREADS = 4


@dataclass(slots=True, eq=False)
class Comparison:
    """Jobs of one tenant that begin together, and what their prompts are found to share.

    Attributes:
        salt: of the tenant.
        num_cached: the jobs, and how many tokens at the beginning of each prompt have KV.
        unmarked: those whose prompts are compared.
        compare: does it.
        found: what it has found; None if nothing was compared.
    """

    salt: Salt
    num_cached: Mapping[Job, int]
    unmarked: Sequence[Job]
    compare: Callable[[], DiscoveryResult | None]
    found: Future[DiscoveryResult | None] = field(default_factory=Future)

    @property
    def is_done(self) -> bool:
        """Whether all is found."""
        return self.found.done()

    def when_done(self, call: Callable[[], None]) -> None:
        """Call something when all is found, on any thread; at once if it is."""
        self.found.add_done_callback(lambda _: call())

    def run(self) -> None:
        """Compare the prompts."""
        try:
            self.found.set_result(self.compare())
        except BaseException as error:
            self.found.set_exception(error)


class Comparisons:
    """All that are under way, those of each tenant in the order in which they were added.

    Its methods are called on one thread.
    """

    def __init__(self, wait_s: float = _WAIT_S) -> None:
        """Begin without any; `wait` takes no longer than `wait_s`."""
        self._wait_s = wait_s
        self._under_way: dict[Salt, deque[Comparison]] = {}
        self._new: list[Comparison] = []  # for which nobody has waited yet
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "discovery")

    def __bool__(self) -> bool:
        """Whether any is under way."""
        return bool(self._under_way)

    def __contains__(self, job: Job) -> bool:
        """Whether a job's prompt is being compared."""
        return any(job in one.num_cached for queue in self._under_way.values() for one in queue)

    def add(self, comparison: Comparison) -> None:
        """Begin it when those of its tenant are done that were added before."""
        queue = self._under_way.setdefault(comparison.salt, deque())
        queue.append(comparison)
        if not comparison.unmarked:
            comparison.run()  # there is nothing to do
            return
        self._new.append(comparison)
        if len(queue) == 1:
            self._begin(comparison)
        else:
            queue[-2].when_done(lambda: self._begin(comparison))

    def _begin(self, comparison: Comparison) -> None:
        with contextlib.suppress(RuntimeError):  # it was closed meanwhile
            self._threads.submit(comparison.run)

    def wait(self) -> None:
        """Wait for those that were added since the last time, for a moment."""
        wait([one.found for one in self._new], self._wait_s)
        self._new.clear()

    def done(self) -> Iterator[Comparison]:
        """Take out those that are done; none before one of its tenant that was added earlier."""
        for salt, queue in list(self._under_way.items()):
            while queue and queue[0].is_done:
                yield queue.popleft()
            if not queue:
                del self._under_way[salt]

    def close(self) -> None:
        """Compare no more."""
        self._under_way.clear()
        self._threads.shutdown(wait=False, cancel_futures=True)
