"""The scheduler: which tokens of which requests the next forward pass computes.

It deals in integers and hashes. Requests are admitted in the order of the queue, when the pages
for all they may ever need are there, so a running request never has to stop for memory. A step
takes one token of every decoding request, then prompt tokens in the order of admission, up to
the token budget. An owner was admitted before its mirrors, so its tokens come first; a mirror
goes as far as the KV that it reads is computed, or is about to be in the same pass.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from tokendance.collector.correction import NO_CORRECTION
from tokendance.collector.placement import (
    UNPLACED,
    Draft,
    ReuseRules,
    draft_placement,
    place,
)
from tokendance.config import EngineConfig, format_bytes
from tokendance.engine.request import Request
from tokendance.errors import BudgetError
from tokendance.store.entries import SegmentCopy
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
        # Where requests take copies, what to compute afresh is known in the pass only.
        self._correction = NO_CORRECTION if config.takes_copies else config.correction
        self._exact_turn = False
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    # -- admission ----------------------------------------------------------------------------

    def rules(self, request: Request) -> ReuseRules:
        """What a request may take from the store and leave there."""
        reuse = self._config.reuse
        leave = reuse != "none" and request.leaves
        if request.exact:
            return ReuseRules(prefix=False, segments=False, leave=leave)
        return ReuseRules(
            prefix=reuse != "none",
            segments=self._config.reuses_segments and request.in_round,
            leave=leave,
            copies=self._config.takes_copies,
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
            rules = self.rules(request)
            # Reading KV of others keeps their pages; computing all of it may need fewer.
            alone = replace(rules, prefix=False, segments=False)
            if self._admit(request, rules) or (not self.running and self._admit(request, alone)):
                self.running.append(request)
            elif self.running or self._store.loading:
                break  # its turn comes when others have finished
            else:
                request.error = self._too_large(request, alone)
                refused.append(request)
            self.waiting.popleft()
        return refused

    def _admit(self, request: Request, rules: ReuseRules) -> bool:
        draft = self._draft(request, rules)
        self._store.touch(draft.blocks)
        placement = place(request.prompt, draft, self._store, rules, request.round_id)
        if placement is None:
            return False
        request.placement = placement
        request.num_cached = len(request.prompt) - len(placement.compute) + placement.num_copied
        request.num_corrected = placement.num_corrected
        request.num_exact = placement.num_exact
        request.reads_copies = bool(placement.copies)
        return True

    def _draft(self, request: Request, rules: ReuseRules) -> Draft:
        return draft_placement(
            request.prompt,
            request.max_new_tokens,
            self._store,
            self._correction,
            rules,
            request.round_id,
        )

    def _too_large(self, request: Request, rules: ReuseRules) -> BudgetError:
        page_bytes = self._kv_bytes_per_token * self._store.pool.page_size
        needed = format_bytes(self._draft(request, rules).num_pages * page_bytes)
        return BudgetError(
            f"The request of {request.agent!r} needs {needed} of KV for "
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
        # Decoding requests first, those that have said least before the others, so that none waits
        # for ever where the budget is small; then the order of admission.
        turns = sorted(chosen, key=lambda one: (not one.is_decoding, len(one.generated)))
        first_prompt = True
        for request in turns:
            if budget == 0:
                break
            if self._config.reuse == "pic" and not (first_prompt or request.is_decoding):
                break  # one prompt at a time
            positions, num_rows = self._computable(request, budget, first_prompt)
            if len(positions) == 0:
                continue
            assert request.placement is not None
            self._store.slot_ready[request.placement.slots[positions]] = True
            request.num_computed += len(positions)
            budget -= min(budget, num_rows)
            first_prompt &= request.is_decoding
            step.append(
                Scheduled(request, positions, request.num_computed == request.num_to_compute)
            )
        # The rows of a pass lie in the order of admission: owners before their mirrors.
        order = {request: place_ for place_, request in enumerate(chosen)}
        return sorted(step, key=lambda item: order[item.request])

    def _computable(
        self, request: Request, budget: int, first_prompt: bool
    ) -> tuple[npt.NDArray[np.int64], int]:
        """The next positions of a request, up to the first whose context is not ready.

        From the first token that is copied on, a prompt is computed in one pass, since which of
        its tokens to recompute is chosen among all.

        Returns:
            The positions, and the rows that they add to most layers.
        """
        positions = request.next_positions(budget)
        if request.is_decoding or len(positions) == 0:
            return positions, len(positions)
        placement = request.placement
        assert placement is not None
        copied = np.flatnonzero(placement.sources != UNPLACED)
        if len(copied) and positions[-1] >= copied[0]:
            if positions[0] < copied[0]:
                positions = positions[positions < copied[0]]
            else:
                rest = placement.compute[request.num_computed :]
                num_rows = len(rest) - placement.num_copied
                ready = self._store.slot_ready[placement.slots[: len(request.prompt)]]
                ready[rest] = True
                can_copy = ready.all() and self._store.slot_ready[placement.sources[copied]].all()
                if can_copy and (num_rows <= budget or first_prompt):
                    return rest, num_rows
                return rest[:0], 0
        ready = self._store.slot_ready[placement.slots[: int(positions[-1]) + 1]]
        ready[positions] = True
        blocked = np.flatnonzero(~ready)
        if len(blocked):
            positions = positions[: np.searchsorted(positions, blocked[0])]
        return positions, len(positions)

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
            if request.placement is not None and is_bad[request.placement.reads()].any()
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
        # The last token's KV is there only if the model went on from it, to a token that ended it.
        num_fed = request.num_computed - len(request.placement.compute)
        length = len(request.prompt) + num_fed
        tokens = np.concatenate([request.prompt.token_ids, np.array(request.generated, np.int32)])[
            :length
        ]
        self._store.put_prefix(
            tokens,
            request.placement.slots[:length],
            request.prompt.salt,
            request.placement.num_exact,
        )

    def mark_sound(self, request: Request) -> None:
        """Note that what a request owns led to finite logits."""
        assert request.placement is not None
        for entry in request.placement.entries:
            if isinstance(entry, SegmentCopy):
                entry.sound = True

    def undo(self, step: Sequence[Scheduled]) -> None:
        """Send the requests of a step that was not computed back to the queue."""
        for item in step:
            if item.request.placement is not None:
                slots = item.request.placement.slots[item.positions]
                self._store.slot_ready[slots] = False
        for item in reversed(step):
            self.restart(item.request)

    def resident_pages(self, requests: Iterable[Request]) -> int:
        """Distinct pages that some running requests hold."""
        held = [request.placement.pages for request in requests if request.placement is not None]
        return len(np.unique(np.concatenate(held))) if held else 0
