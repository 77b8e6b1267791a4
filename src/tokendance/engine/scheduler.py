"""The scheduler: which requests run, and which tokens of them the next forward pass computes.

It deals in integers and hashes. Requests are admitted in the order of the queue, when the pages
for all they may ever need are there, so a running request never has to stop for memory.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokendance.collector.plan import RequestPlan, ReuseRules
from tokendance.collector.planner import Planner, alone
from tokendance.engine.allocator import Allocation, Allocator
from tokendance.engine.request import Request, as_failure
from tokendance.engine.scheduling import SchedulingPolicy
from tokendance.errors import BudgetError
from tokendance.store.entries import StoredSegment
from tokendance.store.kv_store import KVStore
from tokendance.store.pages import Holder, PageIds
from tokendance.units import format_bytes


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
    """Queue, admission and the choice of each step's tokens.

    Attributes:
        waiting: not admitted yet, first come first served.
        running: admitted, in the order of admission.
    """

    def __init__(
        self,
        store: KVStore,
        planner: Planner,
        policy: SchedulingPolicy,
        *,
        max_num_batched_tokens: int,
        kv_bytes_per_token: int,
    ) -> None:
        """Schedule over a store.

        Args:
            store: where KV lies.
            planner: over its indexes.
            policy: divides the tokens of a step.
            max_num_batched_tokens: of a step.
            kv_bytes_per_token: for messages.
        """
        self._store = store
        self._allocator = Allocator(store)
        self._planner = planner
        self._policy = policy
        self._max_num_batched_tokens = max_num_batched_tokens
        self._kv_bytes_per_token = kv_bytes_per_token
        self._is_isolated_turn = False
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    # -- admission ----------------------------------------------------------------------------

    def admit(self) -> tuple[list[Request], list[Request]]:
        """Admit waiting requests while there is room.

        Returns:
            Those that were admitted; and those that never can be, whose `error` is set.
        """
        admitted: list[Request] = []
        refused: list[Request] = []
        while self.waiting:
            request = self.waiting[0]
            rules = self._rules(request)
            try:
                plan = self._fitting_plan(request, rules)
                if plan is None and not self.running and not self._store.loading:
                    request.error = self._too_large(request, rules)
            except Exception as error:
                plan, request.error = None, as_failure(request, error)
            if plan is not None:
                request.plan = plan
                request.allocation = self._allocator.allocate(
                    plan, request.prompt, request.round_id
                )
                self.running.append(request)
                admitted.append(request)
            elif request.error is not None:
                refused.append(request)
            else:
                break  # its turn comes when others have finished
            self.waiting.popleft()
        return admitted, refused

    def _fitting_plan(self, request: Request, rules: ReuseRules) -> RequestPlan | None:
        """The plan of a request, if there is room for it now."""
        plan = self._plan(request, rules)
        if not self._allocator.can_allocate(plan) and not self.running:
            # Reading KV of others keeps their pages; computing all of it may need fewer.
            plan = self._plan(request, alone(rules))
        return plan if self._allocator.can_allocate(plan) else None

    def _rules(self, request: Request) -> ReuseRules:
        return self._planner.rules(
            in_round=request.in_round,
            isolated=request.isolated,
            publishes=request.publishes,
            owns_order=request.owns_order,
            guarded=request.guarded,
        )

    def _plan(self, request: Request, rules: ReuseRules) -> RequestPlan:
        return self._planner.plan(request.prompt, request.max_new_tokens, rules, request.round_id)

    def _too_large(self, request: Request, rules: ReuseRules) -> BudgetError:
        page_bytes = self._kv_bytes_per_token * self._store.page_size
        num_pages = self._allocator.num_pages(self._plan(request, alone(rules)))
        return BudgetError(
            f"The request of {request.agent!r} needs {format_bytes(num_pages * page_bytes)} of KV "
            f"for {len(request.prompt)} prompt tokens and up to {request.max_new_tokens} more, and "
            f"the budget is {format_bytes(self._store.pool.num_pages * page_bytes)}. "
            "Raise kv_budget (--kv-budget), or lower max_tokens."
        )

    # -- steps --------------------------------------------------------------------------------

    def schedule(self) -> list[Scheduled]:
        """Choose the tokens of the next step and mark their slots as ready.

        Requests that are isolated get passes of their own, in turn with the others.
        """
        isolated = [request for request in self.running if request.isolated]
        others = [request for request in self.running if not request.isolated]
        self._is_isolated_turn = bool(isolated) and (self._is_isolated_turn or not others)
        chosen = isolated[:1] if self._is_isolated_turn else others
        self._is_isolated_turn = not self._is_isolated_turn
        budget = self._max_num_batched_tokens
        step: dict[Request, Scheduled] = {}
        is_first_prompt = True
        for request in self._policy.order(chosen):
            if budget == 0:
                break
            chunk = self._policy.chunk(
                request, budget, is_first_prompt=is_first_prompt, ready=self._store.slot_ready
            )
            if len(chunk.positions) == 0:
                continue
            assert request.allocation is not None
            self._store.slot_ready[request.allocation.slots[chunk.positions]] = True
            request.num_computed += len(chunk.positions)
            budget -= min(budget, chunk.cost)
            is_first_prompt &= request.is_decoding
            step[request] = Scheduled(request, chunk.positions)
        # The rows of a pass lie in the order of admission: owners before their mirrors.
        return [step[request] for request in chosen if request in step]

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
        if request in self.waiting:
            self.waiting.remove(request)
        if request not in self.running:
            return []
        self.running.remove(request)
        allocation = request.allocation
        assert allocation is not None
        for entry in allocation.entries:
            if not (keep_kv and self._store.slot_ready[entry.slots].all()):
                self._store.drop(entry)
        self._store.pool.release(allocation.pages, Holder.REQUEST)
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
        self.waiting.appendleft(request)
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


def _allocation(request: Request) -> Allocation:
    """Of a request that runs."""
    assert request.allocation is not None
    return request.allocation
