"""The worker's view of requests: at which slot each position of a context lies.

vLLM knows a mirror's own tokens only, numbered one after the other. Here are the true positions of
these, and the slots of what it reads. What a request reads is worked out when it is added; after
that, contexts grow with their requests, and a step costs as much as it has new tokens.

    vLLM's tokens     0 ........ 40 41-44                       45 ... 65     own
    true positions    0 ........ 40 41-44  45 ............ 619  620 .. 640
    slots             own pages             reads of others     own pages

Both model runners of vLLM use it. Nothing here imports vLLM.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokendance.attention.interface import PackedBatch, PackedRequest, SlotRanges
from tokendance.collector.known import NO_SLOT

Ints = npt.NDArray[np.integer]
Slots = npt.NDArray[np.int32]
Positions = npt.NDArray[np.int64]

_NO_ROWS = np.empty(0, np.int64)

NO_TOKEN = -2
"""In what a request reads: the context begins behind this position."""


@dataclass(slots=True, eq=False)
class _Context:
    """A request's context.

    Attributes:
        own: true positions of the prompt's tokens that it computes itself; none if it reads
            nothing: then these are 0, 1, 2 ...
        shift: behind `own`, a token's true position less its number.
        slots: int32, by true position; longer than it is filled.
        ranges: of these slots.
        num_filled: own tokens whose slots are known.
    """

    own: Positions
    shift: int
    slots: Slots
    ranges: SlotRanges
    num_filled: int = 0

    def make_room(self, length: int) -> None:
        """Have room for so many slots."""
        if length > len(self.slots):
            longer = np.full(max(256, 2 * length), NO_SLOT, np.int32)
            longer[: len(self.slots)] = self.slots
            self.slots = longer


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A step, from a model runner to the model and its attention.

    Attributes:
        batch: as attention sees it.
        rows: int64, of the new tokens of mirrors.
        positions: int64, true positions of these rows; all others have vLLM's.
    """

    batch: PackedBatch
    rows: Positions
    positions: Positions


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
            context = _Context(np.empty(0, np.int64), 0, np.empty(0, np.int32), SlotRanges())
        else:
            own = np.flatnonzero(reads == NO_SLOT)
            start = int(np.argmax(reads != NO_TOKEN))
            context = _Context(own, len(reads) - len(own), reads.copy(), SlotRanges(start))
        self._by_request[request_id] = context

    def restart(self, request_id: str) -> None:
        """Note that vLLM has given a request other pages."""
        if request_id in self._by_request:
            context = self._by_request[request_id]
            context.num_filled = 0
            context.ranges = SlotRanges(context.ranges.start)

    def forget(self, request_ids: Collection[str]) -> None:
        """Drop requests that are done."""
        for request_id in request_ids:
            self._by_request.pop(request_id, None)

    def take(
        self,
        request_ids: Sequence[str],
        num_done: Ints,
        num_new: Ints,
        tables: npt.NDArray[np.int32],
        table_rows: Ints,
    ) -> Step:
        """Take a step of N requests.

        Args:
            request_ids: in the order of their rows.
            num_done: (N,), own tokens before.
            num_new: (N,), own tokens of this step, at least one each.
            tables: pages of own tokens, in their order, a row for each request that vLLM knows.
            table_rows: (N,), rows of these requests.
        """
        requests: list[PackedRequest] = []
        rows: list[Positions] = []
        true: list[Positions] = []
        first_row = 0
        for request_id, done, new, row in zip(
            request_ids, num_done.tolist(), num_new.tolist(), table_rows.tolist(), strict=True
        ):
            context = self._by_request[request_id]
            positions = self._extend(context, done, done + new, tables[row])[-new:]
            is_mirror = len(context.own) > 0
            if is_mirror:
                rows.append(np.arange(first_row, first_row + new))
                true.append(positions)
            requests.append(
                PackedRequest(first_row, positions, context.slots, context.ranges, is_mirror)
            )
            first_row += new
        if not rows:
            return Step(self.batch(requests), _NO_ROWS, _NO_ROWS)
        return Step(self.batch(requests), np.concatenate(rows), np.concatenate(true))

    def _extend(
        self, context: _Context, done: int, until: int, pages: npt.NDArray[np.int32]
    ) -> Positions:
        """Note slots up to an own token; returns the true positions of those that are new here.

        These are more than the step's where vLLM's prefix cache had some, or copied them: their
        slots are known by their table alone. Drafts that were not accepted are computed again, in
        the same pages.
        """
        filled, context.num_filled = min(context.num_filled, done), until
        if until - filled == 1 and filled >= len(context.own):  # decodes: without arrays
            position = filled + context.shift
            slot = int(pages[filled // self._page_size]) * self._page_size
            slot += filled % self._page_size
            context.make_room(position + 1)
            context.slots[position] = slot
            self.slot_position[slot] = position
            return np.array([position])
        tokens = np.arange(filled, until)
        positions = tokens + context.shift
        own = context.own[filled:until]
        positions[: len(own)] = own
        page, place = np.divmod(tokens, self._page_size)
        slots = pages[page] * self._page_size + place
        context.make_room(int(positions[-1]) + 1)
        context.slots[positions] = slots
        self.slot_position[slots] = positions
        return positions

    def batch(self, requests: list[PackedRequest]) -> PackedBatch:
        """The step as attention sees it."""
        return PackedBatch(requests, self.slot_position)
