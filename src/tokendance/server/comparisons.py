"""Prompts that are being compared before they run: many at a time on a thread, few at once.

Comparing some hundred thousand tokens takes a second, in which others' requests go on. A thread of
its own does it, in the order in which rounds have begun, since what is remembered of earlier ones
belongs to it meanwhile:

    add -> [ 4000 tokens: at once        ] -> done
    add -> [ 200,000 tokens: on a thread ] -> done, some ticks later
    add -> [ any: behind them            ]
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from tokendance.rounds.discovery import DiscoveryResult
from tokendance.rounds.segments import Salt
from tokendance.server.jobs import Job

# As many are compared in some 10 ms.
_FEW_TOKENS = 4096


@dataclass(slots=True, eq=False)
class Comparison:
    """Jobs of one tenant that begin together, and what their prompts are found to share.

    Attributes:
        salt: of the tenant.
        num_cached: the jobs, and how many tokens at the beginning of each prompt have KV.
        unmarked: those whose prompts are compared.
        num_tokens: of these prompts.
        compare: does it.
    """

    salt: Salt
    num_cached: Mapping[Job, int]
    unmarked: Sequence[Job]
    num_tokens: int
    compare: Callable[[], DiscoveryResult | None]
    _found: Future[DiscoveryResult | None] = field(default_factory=Future)

    @property
    def result(self) -> DiscoveryResult | None:
        """What was found, once it is done; None if nothing was compared."""
        return self._found.result()

    @property
    def is_done(self) -> bool:
        """Whether all is found."""
        return self._found.done()

    def run(self) -> None:
        """Compare the prompts."""
        try:
            self._found.set_result(self.compare())
        except BaseException as error:
            self._found.set_exception(error)


class Comparisons:
    """All that are under way, in the order in which they were added."""

    def __init__(self, few_tokens: int = _FEW_TOKENS) -> None:
        """Begin without any; `few_tokens` are compared at once."""
        self._few_tokens = few_tokens
        self._under_way: deque[Comparison] = deque()
        self._thread: ThreadPoolExecutor | None = None  # started when there is much to compare

    def __bool__(self) -> bool:
        """Whether any is under way."""
        return bool(self._under_way)

    def __contains__(self, job: Job) -> bool:
        """Whether a job's prompt is being compared."""
        return any(job in one.num_cached for one in self._under_way)

    def add(self, comparison: Comparison) -> None:
        """Do it now if it is small and alone, else on the thread."""
        if not self._under_way and comparison.num_tokens <= self._few_tokens:
            comparison.run()
        else:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, "discovery")
            self._thread.submit(comparison.run)
        self._under_way.append(comparison)

    def done(self) -> Iterator[Comparison]:
        """Take out those that are done; none before one that was added earlier."""
        while self._under_way and self._under_way[0].is_done:
            yield self._under_way.popleft()

    def close(self) -> None:
        """Compare no more."""
        self._under_way.clear()
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
