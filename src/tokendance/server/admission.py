"""Who is let in: requests that are answered at a time, and how many of them are one tenant's."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tokendance.server.errors import ApiError
from tokendance.server.settings import ServerSettings


class Admission:
    """Counts the requests that are being answered.

    Some of the room is each tenant's own, and the rest goes to who comes first:

        max_open_requests   [ own | own | own |   for all    ]

    Attributes:
        is_draining: no more requests are taken.
    """

    def __init__(self, settings: ServerSettings, is_serving: Callable[[], bool]) -> None:
        """Let in as many as the settings say, while `is_serving` says that somebody answers."""
        num_tenants = max(1, len(settings.api_keys))
        self._num_own = max(1, settings.max_open_requests // (2 * num_tenants))
        self._num_for_all = settings.max_open_requests - self._num_own * num_tenants
        self._is_serving = is_serving
        self._open: Counter[str] = Counter()  # by tenant
        self.is_draining = False

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self._is_serving() and not self.is_draining

    @property
    def num_open(self) -> int:
        """Requests that are being answered."""
        return self._open.total()

    @contextmanager
    def admitted(self, tenant: str, num_agents: int = 1) -> Iterator[None]:
        """Count a tenant's request as open while it is answered.

        Args:
            tenant: who asks.
            num_agents: of a round in one call. It counts as so many, but never as more than a
                tenant has for itself, so that the largest is served when the others are done.

        Raises:
            ApiError: 503 while the server stops or its engine has failed, 429 if too many are open.
        """
        if not self.is_ready:
            raise ApiError(
                503, "The server is stopping. Ask another, or later.", headers={"Retry-After": "5"}
            )
        count = min(num_agents, self._num_own)
        if not self._has_room(tenant, count):
            raise ApiError(
                429,
                f"{self.num_open} requests are being answered, {self._open[tenant]} of them yours, "
                "and no more are taken at a time. Ask again in a moment.",
                code="too_many_requests",
                headers={"Retry-After": "1"},
            )
        self._open[tenant] += count
        try:
            yield
        finally:
            self._open[tenant] -= count

    def _has_room(self, tenant: str, count: int) -> bool:
        would_be = self._open + Counter({tenant: count})
        num_beyond = sum(max(0, num_open - self._num_own) for num_open in would_be.values())
        return would_be[tenant] <= self._num_own or num_beyond <= self._num_for_all
