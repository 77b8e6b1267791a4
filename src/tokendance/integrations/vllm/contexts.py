"""The worker's view of requests: at which slot each position of a context lies.

vLLM knows a mirror's own tokens only, numbered one after the other. Here are the true positions of
these, and the slots of what it reads. Contexts grow with their requests: a step costs as much as it
has new tokens. Nothing here imports vLLM.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tokendance.attention.interface import PackedBatch, PackedRequest
from tokendance.collector.known import NO_SLOT

Slots = npt.NDArray[np.int32]
Positions = npt.NDArray[np.int64]


@dataclass(slots=True, eq=False)
class _Context:
    """A request's context.

    Attributes:
        own: true positions of the prompt's tokens that it computes itself; None: all of them.
        num_prompt: length of the true prompt.
        slots: int32, by true position; longer than it is filled.
        num_filled: own tokens whose slots are known.
    """

    own: Positions | None
    num_prompt: int
    slots: Slots = field(default_factory=lambda: np.empty(0, np.int32))
    num_filled: int = 0

    def positions(self, first: int, last: int) -> Positions:
        """True positions of own tokens `first` to `last` - 1."""
        if self.own is None:
            return np.arange(first, last)
        num_own = len(self.own)
        if last <= num_own:
            return self.own[first:last]
        behind = self.num_prompt - num_own + np.arange(max(first, num_own), last)
        return np.concatenate([self.own[first:], behind]) if first < num_own else behind

    def fill(self, last: int, size: int, pages: npt.NDArray[np.integer]) -> None:
        """Note the slots of all own tokens up to `last` - 1."""
        tokens = np.arange(self.num_filled, last)
        positions = self.positions(self.num_filled, last)
        if len(positions) and positions[-1] >= len(self.slots):
            longer = np.full(max(256, 2 * int(positions[-1] + 1)), NO_SLOT, np.int32)
            longer[: len(self.slots)] = self.slots
            self.slots = longer
        self.slots[positions] = pages[tokens // size].astype(np.int64) * size + tokens % size
        self.num_filled = last


class Contexts:
    """The contexts of all requests that a worker knows.

    Attributes:
        slot_position: int32, of each slot the true position of what was written there last.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        """Begin with none, over so many pages."""
        self.slot_position = np.zeros(num_pages * page_size, np.int32)
        self._page_size = page_size
        self._by_request: dict[str, _Context] = {}

    def begin(self, request_id: str, reads: Slots | None) -> None:
        """Begin a request, or begin one anew.

        Args:
            request_id: vLLM's.
            reads: int32, of each position of its prompt the slot that it reads, NO_SLOT for its own
                tokens; None for a request that reads nothing of others.
        """
        if reads is None:
            self._by_request[request_id] = _Context(None, 0)
        else:
            own = np.flatnonzero(reads == NO_SLOT)
            self._by_request[request_id] = _Context(own, len(reads), reads.copy())

    def restart(self, request_id: str) -> None:
        """Note that vLLM has given a request other pages."""
        if request_id in self._by_request:
            self._by_request[request_id].num_filled = 0

    def forget(self, request_ids: Collection[str]) -> None:
        """Drop requests that are done."""
        for request_id in request_ids:
            self._by_request.pop(request_id, None)

    def is_mirror(self, request_id: str) -> bool:
        """Whether a request reads KV of others."""
        return self._by_request[request_id].own is not None

    def add_step(
        self,
        request_id: str,
        first_row: int,
        num_done: int,
        num_new: int,
        pages: npt.NDArray[np.integer],
    ) -> PackedRequest:
        """Take what a request computes in a step.

        Args:
            request_id: of the request.
            first_row: its rows in the batch begin here.
            num_done: own tokens before.
            num_new: own tokens of this step.
            pages: of its own tokens, in order.
        """
        context = self._by_request[request_id]
        if num_done < context.num_filled:
            # Drafts that were not accepted are computed again, in the same pages.
            context.num_filled = num_done
        context.fill(num_done + num_new, self._page_size, pages)
        positions = context.positions(num_done, num_done + num_new)
        self.slot_position[context.slots[positions]] = positions
        return PackedRequest(first_row, positions, context.slots)

    def batch(self, requests: list[PackedRequest]) -> PackedBatch:
        """The step as attention sees it."""
        return PackedBatch(requests, self.slot_position)
