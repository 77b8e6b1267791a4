"""Tenants: who waits, what each has used, and what is kept for each.

A tenant is everybody whose prompts have one salt: in a server, whoever asks with one API key.
Tenants share time and memory and nothing else, and whatever one asks for, each of the others has
its part:

    turns    each has a queue of its own, first come first served; who has used least is next
    passes   while several run, passes are short, and their tokens are divided among them
    pages    a part is reserved for each, the rest is first come, first served:

             KV memory   [ reserved | reserved | reserved |          for all          ]

What a tenant has used is counted in tokens that were computed for it. Whoever comes, or comes back,
begins with no less than the least that any other active tenant has used, so idling saves up nothing
(a virtual token counter, arXiv 2401.00588). A tenant that is alone is served as if there were none.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tokendance.engine.request import Request
from tokendance.rounds.segments import Salt
from tokendance.store.pages import PageIds


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantRules:
    """What is kept for each of several tenants; for one alone it makes no difference.

    Attributes:
        num_tenants: that may ask.
        reserved: share of the KV memory (0 to 1) that is divided among them.
        pass_s: seconds that a pass takes, about, while requests of several tenants run.
        alone: how many times as long a pass takes of one that runs alone, where others have run
            not long ago: they may come back while it is under way.
        admission_s: seconds that admission takes before a pass, about; who is left is admitted
            before the next.
    """

    num_tenants: int = 1
    reserved: float = 0.0
    pass_s: float = 0.1
    alone: float = math.inf
    admission_s: float = math.inf

    def pages_for_each(self, num_pages: int) -> int:
        """Of so many pages, those that are reserved for each tenant: one at least, if any are."""
        if self.num_tenants <= 1 or self.reserved == 0:
            return 0
        return max(1, int(num_pages * self.reserved / self.num_tenants))


@dataclass(slots=True, eq=False)
class Tenant:
    """What the scheduler, which writes all of it, knows of a tenant.

    Attributes:
        waiting: requests that are not admitted yet, first come first served.
        num_running: requests that are.
        num_pages: distinct pages that those hold.
        used: tokens that were computed for it, or that it was taken to have used when it came.
    """

    waiting: deque[Request] = field(default_factory=deque)
    num_running: int = 0
    num_pages: int = 0
    used: int = 0
    # By page, how many of its requests hold it. Not to be told by the pool's counts: pages that are
    # being read from disk are held there, too.
    _num_refs: npt.NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))

    def hold(self, pages: PageIds) -> None:
        """Count what one more of its requests holds: distinct pages."""
        missing = int(pages.max(initial=-1)) + 1 - len(self._num_refs)
        if missing > 0:
            self._num_refs = np.append(self._num_refs, np.zeros(missing, np.int32))
        self._num_refs[pages] += 1
        self.num_pages += int(np.count_nonzero(self._num_refs[pages] == 1))

    def let_go(self, pages: PageIds) -> None:
        """Count what one of its requests holds no more."""
        self._num_refs[pages] -= 1
        self.num_pages -= int(np.count_nonzero(self._num_refs[pages] == 0))

    @property
    def is_active(self) -> bool:
        """Whether any of its requests waits or runs."""
        return bool(self.waiting) or self.num_running > 0


class Tenants:
    """All tenants that were active since the last time that nobody was."""

    def __init__(self) -> None:
        """Begin without any."""
        self._by_salt: dict[Salt, Tenant] = {}

    def __iter__(self) -> Iterator[Tenant]:
        return iter(self._by_salt.values())

    def of(self, request: Request) -> Tenant:
        """The tenant of a request that waits or runs."""
        return self._by_salt[request.tenant]

    def find(self, salt: Salt) -> Tenant | None:
        """A tenant, if it was active since the last time that nobody was."""
        return self._by_salt.get(salt)

    def add(self, request: Request) -> None:
        """Let a request wait, as the last of its tenant."""
        tenant = self._by_salt.get(request.tenant)
        if tenant is None or not tenant.is_active:
            active_used = [other.used for other in self._by_salt.values() if other.is_active]
            if not active_used:
                self._by_salt.clear()  # nobody is left with whom to compare what was used
                tenant = None
            if tenant is None:
                tenant = self._by_salt[request.tenant] = Tenant()
            tenant.used = max(tenant.used, min(active_used, default=0))
        tenant.waiting.append(request)

    def take_out(self, request: Request) -> None:
        """Let a request wait no more, if it does."""
        tenant = self._by_salt.get(request.tenant)
        if tenant is not None and request in tenant.waiting:
            tenant.waiting.remove(request)

    @property
    def num_waiting(self) -> int:
        """Requests that wait, of all."""
        return sum(len(tenant.waiting) for tenant in self._by_salt.values())

    @property
    def num_running(self) -> int:
        """Tenants of which any request runs."""
        return sum(tenant.num_running > 0 for tenant in self._by_salt.values())

    def waiting(self) -> list[Tenant]:
        """Those of which any request waits."""
        return [tenant for tenant in self._by_salt.values() if tenant.waiting]

    def in_turn(self, requests: Sequence[Request]) -> list[tuple[Tenant, list[Request]]]:
        """Sort running requests by tenant, who has used least first; each keeps its order."""
        if len(self._by_salt) == 1:  # as almost always
            return [(tenant, list(requests)) for tenant in self if requests]
        by_tenant: dict[Tenant, list[Request]] = {}
        for request in requests:
            by_tenant.setdefault(self.of(request), []).append(request)
        return sorted(by_tenant.items(), key=lambda item: item[0].used)

    def num_kept(self, tenant: Tenant | None, rules: TenantRules, each: int) -> int:
        """Pages that a tenant has to leave to the others, since they may come and want them.

        Args:
            tenant: which; None for one that is not among them.
            rules: say how many others there may be.
            each: pages that are reserved for each.
        """
        if each == 0:
            return 0
        num_others = rules.num_tenants - 1
        others = [other for other in self._by_salt.values() if other is not tenant]
        unused = sum(max(0, each - other.num_pages) for other in others)
        return min(unused + max(0, num_others - len(others)) * each, num_others * each)
