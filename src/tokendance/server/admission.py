"""Admission: a limit on requests that are open at a time, with a share for each tenant."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tokendance.server.errors import ApiError
from tokendance.server.settings import ServerSettings
from tokendance.server.switches import switch_quickly


class Admission:
    """Counts open requests, which are those being answered.

    Part of the limit is reserved for each tenant, the rest is first come, first served:

        max_open_requests   [ reserved | reserved | reserved |   for all    ]

    Attributes:
        is_draining: whether new requests are refused because the server stops.
    """

    def __init__(self, settings: ServerSettings, is_serving: Callable[[], bool]) -> None:
        """Admit as many as the settings allow, as long as `is_serving()` is true."""
        num_tenants = max(1, len(settings.api_keys))
        self._num_reserved = max(1, settings.max_open_requests // (2 * num_tenants))
        self._num_for_all = settings.max_open_requests - self._num_reserved * num_tenants
        self._is_serving = is_serving
        self._open: Counter[str] = Counter()  # by tenant
        self._num_begun = 0
        self.is_draining = False

    @property
    def is_ready(self) -> bool:
        """Whether new requests are accepted."""
        return self._is_serving() and not self.is_draining

    @property
    def num_open(self) -> int:
        """Requests that are being answered."""
        return self._open.total()

    def activity(self) -> tuple[int, int]:
        """How many requests have been admitted since the server began, and how many are open."""
        return self._num_begun, self.num_open

    def tenants(self) -> list[str]:
        """Whose requests are being answered; while the server stops, that counts for nothing."""
        return [] if self.is_draining else [one for one, count in self._open.items() if count]

    @contextmanager
    def admitted(self, tenant: str, num_agents: int = 1) -> Iterator[None]:
        """Count a tenant's request as open while the context lasts.

        Args:
            tenant: whose request it is.
            num_agents: of a round in one call, which counts as so many requests, but never as more
                than are reserved for a tenant: so even the largest fits when the others are done.

        Raises:
            ApiError: 503 while the server stops or its engine has failed, 429 if too many are open.
        """
        if not self.is_ready:
            raise ApiError(
                503, "The server is stopping. Ask another, or later.", headers={"Retry-After": "5"}
            )
        count = min(num_agents, self._num_reserved)
        if not self._has_room(tenant, count):
            raise ApiError(
                429,
                f"{self.num_open} requests are being answered, {self._open[tenant]} of them yours, "
                "and no more are taken at a time. Ask again in a moment.",
                code="too_many_requests",
                headers={"Retry-After": "1"},
            )
        self._num_begun += 1
        self._count(tenant, count)
        try:
            yield
        finally:
            self._count(tenant, -count)

    def _count(self, tenant: str, change: int) -> None:
        self._open[tenant] += change
        switch_quickly(len(self.tenants()) > 1)

    def _has_room(self, tenant: str, count: int) -> bool:
        would_be = self._open + Counter({tenant: count})
        num_beyond = sum(max(0, num_open - self._num_reserved) for num_open in would_be.values())
        return would_be[tenant] <= self._num_reserved or num_beyond <= self._num_for_all
