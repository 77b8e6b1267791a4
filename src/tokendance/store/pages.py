"""The page pool: who holds which page of KV memory. Integers only, no tensor."""

from enum import IntEnum
from typing import NewType

import numpy as np
import numpy.typing as npt

PageId = NewType("PageId", int)
PageIds = npt.NDArray[np.int32]


class Holder(IntEnum):
    """Who keeps a page alive."""

    REQUEST = 0  # a request that runs: the page is resident
    INDEX = 1  # an index entry: the page is stored, and can be evicted


class PagePool:
    """Fixed-size pages with reference counts, counted apart for requests and index.

    A page is free when nobody holds it. Pages are handed out side by side where possible, since
    attention reads neighbouring pages as one matrix without a copy.

    Attributes:
        num_pages: of the pool.
        page_size: tokens of a page.
        num_free: pages that nobody holds.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        """Make a pool of `num_pages` free pages of `page_size` tokens each."""
        self.num_pages = num_pages
        self.page_size = page_size
        self.num_free = num_pages
        self._refs = np.zeros((len(Holder), num_pages), np.int32)

    def num_held(self, holder: Holder) -> int:
        """Count the pages with at least one reference by `holder`."""
        return int(np.count_nonzero(self._refs[holder]))

    def all_pages(self) -> PageIds:
        """Every page."""
        return np.arange(self.num_pages, dtype=np.int32)

    def num_refs(self, pages: PageIds, holder: Holder) -> npt.NDArray[np.int32]:
        """References by `holder` to each of `pages`."""
        refs: npt.NDArray[np.int32] = self._refs[holder][pages]
        return refs

    def can_allocate(self, count: int) -> bool:
        """Say whether `count` pages are free now; holds until the next change."""
        return count <= self.num_free

    def allocate(self, count: int) -> PageIds:
        """Take `count` free pages for a request, ascending, side by side where possible.

        The first gap that is large enough wins; where there is none, the largest gaps are used up
        first, so that there are few of them. Call only after `can_allocate(count)`.
        """
        assert self.can_allocate(count), "allocate() without can_allocate()"
        free = ~self._refs.any(axis=0)
        edges = np.flatnonzero(np.diff(np.concatenate(([False], free, [False])).astype(np.int8)))
        starts, sizes = edges[::2], edges[1::2] - edges[::2]
        fits = np.flatnonzero(sizes >= count)
        if len(fits):
            first = starts[fits[0]]
            pages = np.arange(first, first + count, dtype=np.int32)
        else:
            ranges: list[npt.NDArray[np.int64]] = []
            missing = count
            for gap in np.argsort(-sizes, kind="stable"):
                take = min(missing, int(sizes[gap]))
                ranges.append(np.arange(starts[gap], starts[gap] + take))
                missing -= take
                if missing == 0:
                    break
            pages = np.sort(np.concatenate(ranges)).astype(np.int32)
        self.retain(pages, Holder.REQUEST)
        return pages

    def retain(self, pages: PageIds, holder: Holder) -> None:
        """Add one reference to each of `pages`, and as many to one that is named several times."""
        self.num_free -= self._count_free(np.unique(pages))
        np.add.at(self._refs[holder], pages, 1)

    def release(self, pages: PageIds, holder: Holder) -> None:
        """Drop one reference from each of `pages`; as many from one that is named several times."""
        refs = self._refs[holder]
        np.subtract.at(refs, pages, 1)
        assert (refs[pages] >= 0).all(), "a page was released twice"
        self.num_free += self._count_free(np.unique(pages))

    def _are_free(self, pages: PageIds) -> npt.NDArray[np.bool_]:
        """Of each page whether nobody holds it."""
        num_refs: npt.NDArray[np.int32] = self._refs[:, pages].sum(axis=0)
        are_free: npt.NDArray[np.bool_] = num_refs == 0
        return are_free

    def _count_free(self, pages: PageIds) -> int:
        """How many of `pages`, which are distinct, nobody holds."""
        return int(np.count_nonzero(self._are_free(pages)))

    def check_integrity(self, expected: npt.NDArray[np.int32]) -> None:
        """Assert that the counts equal `expected`, int32 of shape (holders, pages)."""
        assert np.array_equal(self._refs, expected), "reference counts are out of balance"
        assert self.num_free == self._count_free(self.all_pages()), "free pages are miscounted"
