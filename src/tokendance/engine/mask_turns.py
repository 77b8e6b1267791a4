"""Divides the time between two passes among constraints, which find out what may come next.

    pass | accept accept accept | prepare prepare prepare | pass

Most take 0.1 ms for it, and a few take many. No step waits for long: whoever is not ready when the
time is over sits out the next pass, and the others go on. Tenants take turns: one with many that
are slow leaves the others theirs.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from tokendance.engine.request import Request
from tokendance.rounds.segments import Salt

# For all constraints in a step, but for the last that was begun.
STEP_S = 0.02
# Who took so long has its next turn after so many times that, if others want one before.
_REST = 20


class MaskTurns:
    """Says whose constraint is prepared; see the module."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Begin; a test may have a clock of its own."""
        self._clock = clock

    def take(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Requests whose constraint the caller has to prepare now, one after the other.

        At least one comes, if any is not ready.
        """
        pending = [request for request in requests if not request.has_mask]
        pending.sort(key=lambda request: request.mask_due_s)
        num_before: Counter[Salt] = Counter()  # of each tenant
        turns: dict[Request, int] = {}
        for request in pending:
            turns[request] = num_before[request.tenant]
            num_before[request.tenant] += 1
        pending.sort(key=turns.__getitem__)
        begun = now = self._clock()
        for request in pending:
            if now - begun > STEP_S:
                return
            yield request
            before, now = now, self._clock()
            request.mask_due_s = now + _REST * (now - before)
