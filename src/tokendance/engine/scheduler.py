"""The scheduler: which tokens of which requests the next forward pass computes.

It deals in integers and hashes. Requests are admitted in the order of the queue, when the pages
for all they may ever need are there, so a running request never has to stop for memory. A step
takes one token of every decoding request, then prompt tokens in the order of admission, up to
the token budget. An owner was admitted before its mirrors, so its tokens come first; a mirror
goes as far as the KV that it reads is computed, or is about to be in the same pass.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokendance.collector.placement import ReuseRules, draft_placement, kept_pages, place
from tokendance.config import EngineConfig, format_bytes
from tokendance.engine.request import Request
from tokendance.errors import BudgetError
from tokendance.store.kv_store import KVStore
from tokendance.store.pages import Holder


@dataclass(frozen=True, slots=True, eq=False)
class Scheduled:
    """One request's share of a step.

    Attributes:
        request: whose.
        positions: int64, to compute, ascending.
        wants_logits: whether the last of them yields its next token.
    """

    request: Request
    positions: npt.NDArray[np.int64]
    wants_logits: bool


class Scheduler:
    """Queue, admission and the choice of each step's tokens.

    Attributes:
        waiting: not admitted yet, first come first served.
        running: admitted, in the order of admission.
    """

    def __init__(self, config: EngineConfig, store: KVStore, kv_bytes_per_token: int) -> None:
        """Schedule over a store; `kv_bytes_per_token` is for messages."""
        self._config = config
        self._store = store
        self._kv_bytes_per_token = kv_bytes_per_token
        self._exact_turn = False
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    # -- admission ----------------------------------------------------------------------------

    def rules(self, request: Request) -> ReuseRules:
        """What a request may take from the store and leave there."""
        reuse = self._config.reuse
        if request.exact:
            return ReuseRules(prefix=False, segments=False, leave=reuse != "none")
        return ReuseRules(
            prefix=reuse != "none",
            segments=reuse == "collective",
            leave=reuse != "none",
            owns_order=request.owns_order,
        )

    def admit(self) -> list[Request]:
        """Admit waiting requests while there is room.

        Returns:
            Requests that can never be admitted; their `error` is set.
        """
        refused: list[Request] = []
        while self.waiting:
            request = self.waiting[0]
            if not self._admit(request):
                if self.running:
                    break  # its turn comes when others have finished
                request.error = self._too_large(request)
                refused.append(request)
            else:
                self.running.append(request)
            self.waiting.popleft()
        return refused

    def _admit(self, request: Request) -> bool:
        rules = self.rules(request)
        draft = draft_placement(
            request.prompt, request.max_new_tokens, self._store, self._config.correction, rules
        )
        if draft.blocks:
            self._store.touch(draft.blocks)
        placement = place(request.prompt, draft, self._store, rules, request.round_id)
        if placement is None:
            return False
        request.placement = placement
        request.num_computed = 0
        request.num_cached = len(request.prompt) - len(placement.compute)
        request.num_corrected = placement.num_corrected
        return True

    def _too_large(self, request: Request) -> BudgetError:
        draft = draft_placement(
            request.prompt,
            request.max_new_tokens,
            self._store,
            self._config.correction,
            self.rules(request),
        )
        pages = draft.num_pages + len(kept_pages(draft, self._store))
        page_bytes = self._kv_bytes_per_token * self._store.pool.page_size
        return BudgetError(
            f"The request of {request.agent!r} needs {format_bytes(pages * page_bytes)} of KV for "
            f"{len(request.prompt)} prompt tokens and up to {request.max_new_tokens} more, and "
            f"the budget is {format_bytes(self._store.pool.num_pages * page_bytes)}. "
            "Raise kv_budget (--kv-budget), or lower max_tokens."
        )

    # -- steps --------------------------------------------------------------------------------

    def schedule(self) -> list[Scheduled]:
        """Choose the tokens of the next step and mark their slots as ready.

        Requests that must be exact get passes of their own, in turn with the others.
        """
        exact = [request for request in self.running if request.exact]
        others = [request for request in self.running if not request.exact]
        self._exact_turn = bool(exact) and (self._exact_turn or not others)
        chosen = exact[:1] if self._exact_turn else others
        self._exact_turn = not self._exact_turn
        budget = self._config.max_batch_tokens
        step: list[Scheduled] = []
        # A stable sort: decoding requests first, else the order of admission.
        for request in sorted(chosen, key=lambda request: not request.is_decoding):
            if budget == 0:
                break
            positions = self._computable(request, budget)
            if len(positions) == 0:
                continue
            assert request.placement is not None
            self._store.slot_ready[request.placement.slots[positions]] = True
            request.num_computed += len(positions)
            budget -= len(positions)
            step.append(
                Scheduled(request, positions, request.num_computed == request.num_to_compute)
            )
        # The rows of a pass lie in the order of admission: owners before their mirrors.
        order = {request: place_ for place_, request in enumerate(chosen)}
        return sorted(step, key=lambda item: order[item.request])

    def _computable(self, request: Request, budget: int) -> npt.NDArray[np.int64]:
        """The next positions of a request, up to the first whose context is not ready."""
        positions = request.next_positions(budget)
        if request.is_decoding or len(positions) == 0:
            return positions
        assert request.placement is not None
        ready = self._store.slot_ready[request.placement.slots[: int(positions[-1]) + 1]]
        ready[positions] = True
        blocked = np.flatnonzero(~ready)
        return positions[: np.searchsorted(positions, blocked[0])] if len(blocked) else positions

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
        placement = request.placement
        assert placement is not None
        for entry in placement.entries:
            if not (keep_kv and self._store.slot_ready[entry.slots].all()):
                self._store.drop(entry)
        self._store.pool.release(placement.pages, Holder.REQUEST)
        request.placement = None
        computed = placement.slots[placement.compute]
        bad = computed[~self._store.slot_ready[computed]] if keep_kv else computed
        return self._restart_readers(bad)

    def _restart_readers(self, bad: npt.NDArray[np.int32]) -> list[Request]:
        """Send requests that read slots without good KV back to the head of the queue."""
        is_bad = np.zeros(len(self._store.slot_ready), np.bool_)
        is_bad[bad] = True
        readers = [
            request
            for request in self.running
            if request.placement is not None and is_bad[request.placement.slots].any()
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

    def keep_answer(self, request: Request) -> None:
        """List the KV of a finished request's answer, so that its next prompt finds it."""
        rules = self.rules(request)
        if not rules.leave or request.placement is None:
            return
        # The KV of the last token is not computed: nothing came after it.
        length = len(request.prompt) + len(request.generated) - 1
        tokens = np.concatenate([request.prompt.token_ids, np.array(request.generated, np.int32)])[
            :length
        ]
        self._store.put_prefix(
            tokens,
            request.placement.slots[:length],
            request.prompt.salt,
            request.placement.num_exact,
        )

    def resident_pages(self, requests: Iterable[Request]) -> int:
        """Distinct pages that some running requests hold."""
        held = [request.placement.pages for request in requests if request.placement is not None]
        return len(np.unique(np.concatenate(held))) if held else 0
