"""vLLM's blocks as the pages of our store.

The store counts who reads a page and which index entries name it. To vLLM all of that is one more
reference to the block: it is taken with the first of ours and given back with the last. So vLLM
allocates, caches and evicts as it always does, and never gives away a block that we still name.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from tokendance.store.pages import Holder, PageIds, PagePool


class BlockPool(Protocol):
    """What we need of `vllm.v1.core.block_pool.BlockPool`."""

    @property
    def blocks(self) -> Sequence[Any]:
        """All blocks, by their numbers."""

    def touch(self, blocks: Sequence[Any]) -> None:
        """Take a reference to each block."""

    def free_blocks(self, ordered_blocks: Sequence[Any]) -> None:
        """Give one back."""


class BlockPages(PagePool):
    """A page pool whose pages are vLLM's blocks, of the same numbers. It allocates none itself."""

    def __init__(self, blocks: BlockPool, page_size: int) -> None:
        """Name pages of `page_size` tokens each, which are vLLM's blocks."""
        super().__init__(len(blocks.blocks), page_size)
        self._blocks = blocks

    def retain(self, pages: PageIds, holder: Holder) -> None:
        """See `PagePool.retain`."""
        distinct = np.unique(pages)
        fresh = distinct[self._are_free(distinct)]
        super().retain(pages, holder)
        self._blocks.touch([self._blocks.blocks[page] for page in fresh.tolist()])

    def release(self, pages: PageIds, holder: Holder) -> None:
        """See `PagePool.release`."""
        super().release(pages, holder)
        # What stands last in a prompt is given away first; each page once, if it is named twice.
        gone = dict.fromkeys(pages[self._are_free(pages)][::-1].tolist())
        self._blocks.free_blocks([self._blocks.blocks[page] for page in gone])

    def allocate(self, count: int) -> PageIds:
        """See `PagePool.allocate`; blocks are allocated by vLLM alone."""
        raise NotImplementedError("vLLM allocates")
