"""The store: finds KV that was computed before, and makes room when memory is short.

Two indexes over one page pool:

    prefix     hash of all tokens up to the end of a block  ->  where the block's KV lies
    segments   hash of a shared segment's content           ->  its copies, one per context

Both hold references to pages, never tensors. An entry may be listed before its KV is computed:
`slot_ready` says which slots can be read, and a request that found unready ones waits for the
request that computes them. So requests that start together share like any others.

Eviction goes by `store/eviction.py`, and leaves out entries whose pages running requests hold.
A mirror holds the runs that it reads whole, so they stay as long as it runs. Entries of one prompt
are touched from its end to its beginning, so the end of a prompt goes before its start.
"""

import itertools
from collections.abc import Collection, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from tokendance.rounds.segments import ChainHash, Salt, SegmentHash, TokenIds, hash_chain
from tokendance.store.entries import (
    Entry,
    PrefixBlock,
    RoundId,
    RunId,
    SegmentCopy,
    Slots,
    pages_of,
)
from tokendance.store.eviction import EvictionOrder
from tokendance.store.pages import Holder, PageIds, PagePool

# Copies of one segment that a request may choose from.
_MOST_COPIES = 64


class KVStore:
    """Pages, what is known of each slot, and the two indexes.

    Attributes:
        pool: the pages.
        slot_position: int32, position at which the key of a slot was rotated; the request that
            allocates the slot writes it.
        slot_ready: bool, whether the slot's KV is computed, or will be in the step that is being
            scheduled; the scheduler writes it.
        order: in which entries are evicted.
        slot_stamp: int64, which `take_slots` the slot was taken with; another number tells that
            what a slot held is gone.
        loading: pages that whoever fills them from elsewhere holds, from one step to another.
    """

    def __init__(self, num_pages: int, page_size: int, max_reuse_rounds: int) -> None:
        """Make an empty store.

        Args:
            num_pages: pages of the pool.
            page_size: tokens per page, and per block of the prefix index.
            max_reuse_rounds: a segment that was reused in this many rounds is computed afresh.
        """
        self.pool = PagePool(num_pages, page_size)
        self.slot_position = np.zeros(num_pages * page_size, np.int32)
        self.slot_ready = np.zeros(num_pages * page_size, np.bool_)
        self.slot_stamp = np.zeros(num_pages * page_size, np.int64)
        self.loading: dict[object, list[PageIds]] = {}
        self._num_taken = 0
        self._max_reuse_rounds = max_reuse_rounds
        self.order = EvictionOrder()
        self._prefix: dict[tuple[ChainHash, bool], PrefixBlock] = {}
        self._segments: dict[SegmentHash, list[SegmentCopy]] = {}
        self._num_runs = 0

    # -- looking up ---------------------------------------------------------------------------

    def match_prefix(
        self, token_ids: TokenIds, salt: Salt, *, exact: bool
    ) -> tuple[list[PrefixBlock], Slots]:
        """Find the longest known beginning of a prompt. Changes nothing.

        Args:
            token_ids: int32, the tokens that may be matched.
            salt: the prompt's.
            exact: leave out blocks that hold reused KV of another context.

        Returns:
            The blocks, and the slots of their tokens; valid until the next eviction.
        """
        size = self.pool.page_size
        blocks: list[PrefixBlock] = []
        parent: ChainHash | None = None
        start = 0
        while start < len(token_ids):
            found = None
            longest = min(size, len(token_ids) - start)
            # A block that ends a prompt may be shorter than a page.
            for length in range(longest, 0, -1):
                chain = hash_chain(parent, token_ids[start : start + length], salt)
                found = self._prefix.get((chain, True))
                if found is None and not exact:
                    found = self._prefix.get((chain, False))
                if found is not None:
                    break
            if found is None:
                break
            blocks.append(found)
            parent = found.chain
            start += len(found.slots)
            if len(found.slots) < size:
                break
        slots = [block.slots for block in blocks]
        return blocks, np.concatenate(slots) if slots else np.empty(0, np.int32)

    def copies(self, segment: SegmentHash, round_id: RoundId) -> Sequence[SegmentCopy]:
        """List the copies of a segment that a round may reuse, the newest last. Changes nothing.

        A round that has begun to reuse a copy may go on, so that its agents all read the same. Of
        a text that repeats itself there may be thousands; then the newest are listed.
        """
        usable = (
            copy
            for copy in reversed(self._segments.get(segment, ()))
            if round_id in copy.rounds or len(copy.rounds) < self._max_reuse_rounds
        )
        return list(itertools.islice(usable, _MOST_COPIES))[::-1]

    def all_copies(self, segment: SegmentHash) -> Sequence[SegmentCopy]:
        """List every copy of a segment, also those that have been reused enough."""
        return self._segments.get(segment, ())

    # -- putting in ---------------------------------------------------------------------------

    def put_prefix(
        self, token_ids: TokenIds, slots: Slots, salt: Salt, num_exact: int
    ) -> list[Entry]:
        """List the blocks of a prompt, each with the tokens before it.

        Args:
            token_ids: int32, the prompt up to the last token whose KV is or will be computed.
            slots: int32, as long as `token_ids`.
            salt: the prompt's.
            num_exact: length of the beginning that holds no reused KV of another context.

        Returns:
            The entries that are new; the caller drops them if it fails to compute them.
        """
        size = self.pool.page_size
        new: list[Entry] = []
        touched: list[Entry] = []
        parent: ChainHash | None = None
        for start in range(0, len(token_ids), size):
            block_ids = token_ids[start : start + size]
            parent = hash_chain(parent, block_ids, salt)
            block_slots = slots[start : start + size]
            exact = start + len(block_ids) <= num_exact
            entry = self._prefix.get((parent, exact))
            if entry is None:
                entry = PrefixBlock(parent, block_slots.copy(), self._pages(block_slots), exact)
                self._prefix[parent, exact] = entry
                self._add(entry)
                new.append(entry)
            touched.append(entry)
        self.touch(touched)
        return new

    def put_run(
        self, segments: Sequence[tuple[SegmentHash, Slots]], round_id: RoundId | None = None
    ) -> list[Entry]:
        """List the segments of a run as copies, in the order in which their owner reads them."""
        run = RunId(self._num_runs)
        self._num_runs += 1
        new: list[Entry] = []
        for index, (segment, slots) in enumerate(segments):
            copy = SegmentCopy(segment, run, index, slots.copy(), self._pages(slots), round_id)
            self._segments.setdefault(segment, []).append(copy)
            self._add(copy)
            new.append(copy)
        return new

    def put_copies(
        self, token_ids: TokenIds, salt: Salt, parts: Iterable[tuple[int, int, SegmentHash]]
    ) -> None:
        """List parts of an earlier prompt as copies of segments of which there are none.

        Args:
            token_ids: int32, of the whole prompt; only as much of it is looked at as is known.
            salt: the prompt's.
            parts: first position, position after the last, and hash of each.
        """
        missing = [part for part in parts if part[2] not in self._segments]
        if not missing:
            return
        _, slots = self.match_prefix(token_ids, salt, exact=False)
        # What is still being computed may fail, and then nobody would take it out of the index.
        known = [
            (segment, slots[first:last])
            for first, last, segment in missing
            if last <= len(slots) and self.slot_ready[slots[first:last]].all()
        ]
        if known:
            self.put_run(known)

    def touch(self, entries: Sequence[Entry]) -> None:
        """Mark entries of one prompt, given from its beginning to its end, as just used."""
        self.order.begin_use()
        for entry in reversed(entries):
            if entry in self.order:
                self.order.use(entry)

    def count_reuse(self, copies: Iterable[SegmentCopy], round_id: RoundId) -> None:
        """Note that mirrors of a round reuse these copies."""
        for copy in copies:
            copy.rounds.add(round_id)

    # -- making room ---------------------------------------------------------------------------

    def can_make_room(self, count: int, keep: PageIds) -> bool:
        """Say whether `count` pages could be free, with `keep` left alone. Changes nothing."""
        pool = self.pool
        taken = pool.num_refs(pool.all_pages(), Holder.REQUEST) > 0
        taken[keep] = True
        return count <= pool.num_pages - int(np.count_nonzero(taken))

    def make_room(self, count: int) -> bool:
        """Evict entries in their order until `count` pages are free; say if they are."""
        missing = count - self.pool.num_free
        if missing <= 0:
            return True
        for entry in self.order.in_turn():
            if (self.pool.num_refs(entry.pages, Holder.REQUEST) > 0).all():
                continue  # running requests hold all of it: taking it out would free nothing
            self.drop(entry)
            if self.pool.can_allocate(count):
                return True
        return False

    def take_slots(self, parts: Sequence[npt.NDArray[np.int64]]) -> tuple[list[Slots], PageIds]:
        """Allocate slots for tokens, each part in pages of its own; call after `make_room`.

        Args:
            parts: positions of the tokens of each part, in storage order.

        Returns:
            The slots of each part, not ready; and the pages, held for a request.
        """
        size = self.pool.page_size
        pages = self.pool.allocate(self.num_pages(parts))
        fresh = (pages[:, None] * size + np.arange(size, dtype=np.int32)).reshape(-1)
        self._num_taken += 1
        taken: list[Slots] = []
        offset = 0
        for positions in parts:
            slots: Slots = fresh[offset : offset + len(positions)].astype(np.int32)
            self.slot_position[slots] = positions
            self.slot_ready[slots] = False
            self.slot_stamp[slots] = self._num_taken
            taken.append(slots)
            offset += self.num_pages([positions]) * size
        return taken, pages

    def num_pages(self, parts: Iterable[npt.NDArray[np.int64]]) -> int:
        """Pages that these parts need."""
        return sum(-(-len(positions) // self.pool.page_size) for positions in parts)

    def drop(self, entry: Entry) -> None:
        """Take one entry out of its index. Does nothing if it is gone already."""
        if entry not in self.order:
            return
        self.order.discard(entry)
        self.pool.release(entry.pages, Holder.INDEX)
        if isinstance(entry, PrefixBlock):
            del self._prefix[entry.chain, entry.exact]
        else:
            copies = self._segments[entry.hash]
            copies.remove(entry)
            if not copies:
                del self._segments[entry.hash]

    def clear(self, keep: Collection[Entry] = ()) -> None:
        """Drop every entry but some; pages that running requests hold live on until they end."""
        for entry in list(self.order):
            if entry not in keep:
                self.drop(entry)

    # -- bookkeeping --------------------------------------------------------------------------

    def _pages(self, slots: Slots) -> PageIds:
        return pages_of(slots, self.pool.page_size)

    def _add(self, entry: Entry) -> None:
        self.order.add(entry)
        self.pool.retain(entry.pages, Holder.INDEX)

    def check_integrity(self, request_pages: Iterable[PageIds]) -> None:
        """Assert that counts, indexes and requests agree.

        Args:
            request_pages: the pages of each request that runs.
        """
        expected = np.zeros((len(Holder), self.pool.num_pages), np.int32)
        for pages in itertools.chain(request_pages, *self.loading.values()):
            expected[Holder.REQUEST][pages] += 1
        for entry in self.order:
            expected[Holder.INDEX][entry.pages] += 1
            assert np.array_equal(entry.pages, self._pages(entry.slots))
        self.pool.check_integrity(expected)
        listed = set(self._prefix.values()) | {
            copy for copies in self._segments.values() for copy in copies
        }
        assert listed == set(self.order), "the indexes and the eviction order disagree"
