"""The scheduler: which requests run, and which tokens of them the next forward pass computes.

It deals in integers and hashes. Tenants take turns (`engine/tenants.py`). The requests of each are
admitted in the order of its queue, when the pages for all they may ever need are there, so a
running request never has to stop for memory.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokendance.collector.plan import RequestPlan
from tokendance.collector.planner import Planner
from tokendance.engine.allocator import Allocation, Allocator
from tokendance.engine.request import Request, as_failure
from tokendance.engine.reservations import Reservations
from tokendance.engine.scheduling import Pace, SchedulingPolicy
from tokendance.engine.tenants import Tenant, TenantRules, Tenants
from tokendance.rounds.segments import Salt
from tokendance.store.entries import RoundId, StoredSegment
from tokendance.store.kv_store import KVStore
from tokendance.store.pages import Holder, PageIds

# For so long after several tenants ran, one that runs alone has shorter passes.
_BACK_S = 60.0


@dataclass(frozen=True, slots=True, eq=False)
class Scheduled:
    """One request's share of a step.

    Attributes:
        request: whose.
        positions: int64, to compute, ascending.
    """

    request: Request
    positions: npt.NDArray[np.int64]


class Scheduler:
    """Queues, admission and the choice of each step's tokens.

    Attributes:
        running: admitted, in the order of admission.
        pace: how many tokens a step may have while several tenants run; the engine tells it how
            long each has taken.
    """

    def __init__(
        self,
        store: KVStore,
        planner: Planner,
        policy: SchedulingPolicy,
        *,
        max_num_batched_tokens: int,
        kv_bytes_per_token: int,
        clock: Callable[[], float],
    ) -> None:
        """Schedule over a store.

        Args:
            store: where KV lies.
            planner: over its indexes.
            policy: divides the tokens that a tenant has of a step.
            max_num_batched_tokens: of a step.
            kv_bytes_per_token: for messages.
            clock: seconds.
        """
        self._store = store
        self._allocator = Allocator(store)
        self._policy = policy
        self._max_num_batched_tokens = max_num_batched_tokens
        self._clock = clock
        self._several_ran_s = -math.inf  # when several tenants ran last
        self._is_isolated_turn = False
        self._tenants = Tenants()
        self._reservations = Reservations(
            store, planner, self._allocator, self._tenants, kv_bytes_per_token
        )
        self.running: list[Request] = []
        self._resident: Mapping[RoundId, int] = {}
        self._resident_of: list[Request] = []  # for whom that was counted
        self.pace = Pace()

    def set_rules(self, rules: TenantRules) -> None:
        """Say what is kept for each tenant, before there is any request.

        Raises:
            ConfigError: if there is no page for each.
        """
        self._reservations.set_rules(rules)
        self.pace.pass_s = rules.pass_s

    def num_kept(self, salt: Salt) -> int:
        """Pages that have to be left alone when KV of a tenant is read from disk."""
        return self._reservations.num_kept_from_disk(salt)

    @property
    def num_waiting(self) -> int:
        """Requests that are not admitted yet."""
        return self._tenants.num_waiting

    # -- admission ----------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Let a request wait, as the last of its tenant."""
        self._tenants.add(request)

    def admit(self) -> tuple[list[Request], list[Request]]:
        """Admit waiting requests while there is room, each time of the tenant with least use.

        It ends when its time is over, and at least one has had its turn; but who has nothing
        running need not wait for the next pass.

        One whose next request has no room yet does not keep others from the pages that are
        reserved for them; the pages for all are kept for it until it has enough.

        Returns:
            Those that were admitted; and those that never can be, whose `error` is set.
        """
        admitted: list[Request] = []
        refused: list[Request] = []
        turns = self._tenants.waiting()
        used = self._use_in_sight(turns)
        is_first = True  # of those whose turn it is
        is_late = False
        seconds = self._reservations.rules.admission_s
        until = self._clock() + seconds
        while turns:
            if (admitted or refused) and (now := self._clock()) >= until:
                if is_late or self._reservations.num_reserved == 0:
                    break
                is_first, is_late, until = False, True, now + seconds
            if is_late:
                # Who has nothing running is let in all the same, to the pages that are its own, in
                # as much time again.
                turns = [tenant for tenant in turns if not tenant.num_running]
                if not turns:
                    break
            tenant = min(turns, key=used.__getitem__)
            request = tenant.waiting[0]
            num_kept = self._reservations.num_kept(tenant, only_own=not is_first)
            plan: RequestPlan | None = None
            try:
                plan = self._reservations.fitting_plan(request, num_kept)
            except Exception as error:
                request.error = as_failure(request, error)
            if plan is not None:
                self._admit(request, plan)
                used[tenant] += len(plan.compute)
                admitted.append(request)
            elif request.error is not None:
                refused.append(request)
            else:  # its turn comes when others have finished
                is_first = False
                turns.remove(tenant)
                turns = [
                    other for other in turns if other.num_pages < self._reservations.num_reserved
                ]
                continue
            tenant.waiting.popleft()
            if not tenant.waiting:
                turns.remove(tenant)
        return admitted, refused

    def _use_in_sight(self, turns: Sequence[Tenant]) -> dict[Tenant, int]:
        """Tokens that each of some tenants has used, or will have when its prompts are computed."""
        used = {tenant: tenant.used for tenant in turns}
        if len(turns) > 1:
            for request in self.running:
                tenant = self._tenants.of(request)
                if tenant in used:
                    used[tenant] += request.num_left
        return used

    def _admit(self, request: Request, plan: RequestPlan) -> None:
        """Let a request run, whose plan fits."""
        tenant = self._tenants.of(request)
        request.plan = plan
        request.allocation = self._allocator.allocate(plan, request.prompt, request.round_id)
        tenant.hold(request.allocation.pages)
        tenant.num_running += 1
        self.running.append(request)

    # -- steps --------------------------------------------------------------------------------

    def schedule(self) -> list[Scheduled]:
        """Choose the tokens of the next step and mark their slots as ready.

        Requests that are isolated get passes of their own, in turn with the others. Each tenant
        may have an equal part of the step, and what others leave of theirs.
        """
        isolated = [request for request in self.running if request.isolated]
        others = [request for request in self.running if not request.isolated]
        self._is_isolated_turn = bool(isolated) and (self._is_isolated_turn or not others)
        chosen = others
        if self._is_isolated_turn:
            chosen = [min(isolated, key=lambda request: self._tenants.of(request).used)]
        self._is_isolated_turn = not self._is_isolated_turn
        budget = self._budget()
        step: dict[Request, Scheduled] = {}
        turns = self._tenants.in_turn(chosen)
        wanted = [sum(request.num_left for request in requests) for _, requests in turns[1:]]
        for index, (tenant, requests) in enumerate(turns):
            equal = -(-budget // (len(turns) - index))
            share = max(equal, budget - sum(wanted[index:]))
            budget -= self._take(tenant, requests, share, step)
        # The rows of a pass lie in the order of admission: owners before their mirrors.
        return [step[request] for request in chosen if request in step]

    def _budget(self) -> int:
        """Tokens of the next step: few while several tenants run, so that none waits long.

        Not so few where one runs alone, but others may soon be back.
        """
        num_tenants, now = self._tenants.num_running, self._clock()
        if num_tenants > 1:
            self._several_ran_s = now
            return min(self._max_num_batched_tokens, max(self.pace.num_tokens, num_tenants))
        if now - self._several_ran_s > _BACK_S:
            return self._max_num_batched_tokens
        longer = self._reservations.rules.alone * self.pace.num_tokens
        return int(min(self._max_num_batched_tokens, longer))

    def _take(
        self,
        tenant: Tenant,
        requests: Sequence[Request],
        share: int,
        step: dict[Request, Scheduled],
    ) -> int:
        """Divide a tenant's share of a step among its requests; return what they cost of it."""
        left = share
        is_first_prompt = all(request.is_decoding for request in step)
        for request in self._policy.order(requests):
            if left == 0:
                break
            chunk = self._policy.chunk(
                request, left, is_first_prompt=is_first_prompt, ready=self._store.slot_ready
            )
            if len(chunk.positions) == 0:
                continue
            assert request.allocation is not None
            self._store.slot_ready[request.allocation.slots[chunk.positions]] = True
            request.num_computed += len(chunk.positions)
            tenant.used += len(chunk.positions)
            left -= min(left, chunk.cost)
            is_first_prompt &= request.is_decoding
            step[request] = Scheduled(request, chunk.positions)
        return share - left

    # -- leaving ------------------------------------------------------------------------------

    def release(self, request: Request, *, keep_kv: bool) -> list[Request]:
        """Take a request out, whatever its state, and free what only it held.

        Args:
            request: waiting, running, or neither.
            keep_kv: leave what it has computed in the store. Otherwise, and for what it has not
                computed yet, its entries are dropped, and requests that read them begin anew.

        Returns:
            The requests that began anew.
        """
        self._tenants.take_out(request)
        if request not in self.running:
            return []
        self.running.remove(request)
        allocation = request.allocation
        assert allocation is not None
        for entry in allocation.entries:
            if not (keep_kv and self._store.slot_ready[entry.slots].all()):
                self._store.drop(entry)
        tenant = self._tenants.of(request)
        self._store.pool.release(allocation.pages, Holder.REQUEST)
        tenant.let_go(allocation.pages)
        tenant.num_running -= 1
        request.allocation = None
        computed = allocation.slots[allocation.compute]
        bad = computed[~self._store.slot_ready[computed]] if keep_kv else computed
        return self._restart_readers(bad)

    def _restart_readers(self, bad: npt.NDArray[np.int32]) -> list[Request]:
        """Send requests that read slots without good KV back to the head of the queue."""
        if len(bad) == 0:
            return []
        is_bad = np.zeros(self._store.num_slots, np.bool_)
        is_bad[bad] = True
        readers = [
            request for request in self.running if is_bad[_allocation(request).reads()].any()
        ]
        restarted: list[Request] = []
        for request in reversed(readers):  # so that they stand in the queue as they ran
            restarted += self.restart(request)
        return restarted

    def restart(self, request: Request) -> list[Request]:
        """Send a running request, and those that read its KV, back to the head of the queue.

        Returns:
            Those requests; none if it does not run (any more).
        """
        if request not in self.running:
            return []
        others = self.release(request, keep_kv=False)
        request.restart()
        self._tenants.of(request).waiting.appendleft(request)
        return [request, *others]

    def retry_without_suspects(self, request: Request) -> bool:
        """Drop what a request reads of owners that have yet to show finite logits; begin it anew.

        Returns:
            Whether there was any.
        """
        assert request.plan is not None
        suspects = [
            use.source
            for use in request.plan.uses
            if isinstance(use.source, StoredSegment) and not use.source.verified
        ]
        for suspect in suspects:
            self._store.drop(suspect)
        if suspects:
            self.restart(request)
        return bool(suspects)

    def publish_answer(self, request: Request) -> None:
        """Publish the KV of a finished request's answer, so that its next prompt finds it."""
        plan, allocation = request.plan, _allocation(request)
        assert plan is not None
        if not plan.publish:
            return
        # The last token's KV is there only if the model went on from it, to a token that ended it.
        num_fed = request.num_computed - len(allocation.compute)
        text = request.prompt.prefix_hashes.extended(request.generated)
        slots = allocation.slots[: len(request.prompt) + num_fed]
        self._store.publish_prefix(text, slots, plan.num_exact, guarded=plan.guarded)

    def mark_verified(self, request: Request) -> None:
        """Note that what a request owns led to finite logits."""
        for entry in _allocation(request).entries:
            if isinstance(entry, StoredSegment):
                entry.verified = True

    def unmark(self, item: Scheduled) -> None:
        """Note that what was scheduled of a request is not computed."""
        if item.request.allocation is not None:
            self._store.slot_ready[item.request.allocation.slots[item.positions]] = False

    def undo(self, step: Sequence[Scheduled]) -> None:
        """Send the requests of a step that was not computed back to the queue."""
        for item in step:
            self.unmark(item)
        for item in reversed(step):
            self.restart(item.request)

    def held_pages(self) -> list[PageIds]:
        """Pages that each running request holds."""
        return [_allocation(request).pages for request in self.running]

    def num_resident_pages(self, requests: Iterable[Request]) -> int:
        """Distinct pages that some running requests hold."""
        held = [_allocation(request).pages for request in requests]
        return len(np.unique(np.concatenate(held))) if held else 0

    def resident_pages(self) -> Mapping[RoundId, int]:
        """Distinct pages that the running requests of each round hold; counted when they change."""
        if self._resident_of != self.running:
            self._resident_of = list(self.running)
            by_round: dict[RoundId, list[Request]] = {}
            for request in self._resident_of:
                by_round.setdefault(request.round_id, []).append(request)
            self._resident = {
                round_id: self.num_resident_pages(requests)
                for round_id, requests in by_round.items()
            }
        return self._resident

    def check_integrity(self) -> None:
        """Assert that what is counted of each tenant agrees with what it runs."""
        running = dict(self._tenants.in_turn(self.running))
        for tenant in {*self._tenants, *running}:
            requests = running.get(tenant, [])
            assert tenant.num_running == len(requests), "running requests are miscounted"
            num_pages = self.num_resident_pages(requests)
            assert tenant.num_pages == num_pages, "pages of a tenant are miscounted"


def _allocation(request: Request) -> Allocation:
    """Of a request that runs."""
    assert request.allocation is not None
    return request.allocation
