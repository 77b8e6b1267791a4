"""What the indexes hold: pages of prompts, and cached segments.

The collector sees the base classes only: how many tokens there are, and in what context they were
computed. Where the KV lies is for whoever allocates: slots of our own store here, other handles in
another engine.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NewType

import numpy as np
import numpy.typing as npt

from tokendance.rounds.segments import ChainHash, SegmentHash
from tokendance.store.pages import PageIds

Slots = npt.NDArray[np.int32]
RunId = NewType("RunId", int)
RoundId = NewType("RoundId", int)


@dataclass(slots=True, eq=False)
class PrefixPage:
    """Up to one page of consecutive tokens of a prompt, known by all tokens up to its end."""

    chain: ChainHash  # hash of the prompt up to the end of this page
    num_tokens: int  # of the page
    exact: bool  # whether the KV is what the model computes for this very prompt
    guarded: bool = False  # whether it is of a request that guards its text: no part is offered


@dataclass(slots=True, eq=False)
class CachedSegment:
    """The KV of a shared segment, as its owner computed it in the owner's context.

    Attributes:
        hash: of the segment's content.
        num_tokens: of the segment.
        run: the run it belongs to.
        index: its place among the segments of the run.
        start: position of its first token in the owner's prompt.
        round_id: in which its owner computed it; None if it is published for another reason.
        rounds: the rounds in which mirrors have reused it so far; the store counts them.
        verified: whether its owner has had finite logits; the scheduler writes it.
        context: shared segments that its owner has read, in order, if it guards its text.
        num_behind: so many of those stand before this one. Who reuses it has to have read them
            before it, too. 0: anybody may reuse it.
    """

    hash: SegmentHash
    num_tokens: int
    run: RunId
    index: int
    start: int
    round_id: RoundId | None = None
    rounds: set[RoundId] = field(default_factory=set)
    verified: bool = False
    context: tuple[SegmentHash, ...] = ()
    num_behind: int = 0


@dataclass(slots=True, eq=False, kw_only=True)
class StoredPage(PrefixPage):
    """A page of the prefix index.

    Attributes:
        slots: where the KV of each of its tokens lies. In a mirror these point into own pages
            and into pages of runs.
        pages: the distinct pages of `slots`.
    """

    slots: Slots
    pages: PageIds


@dataclass(slots=True, eq=False, kw_only=True)
class StoredSegment(CachedSegment):
    """A cached segment of the segment index."""

    slots: Slots  # where the KV of each of its tokens lies, in the order of the tokens
    pages: PageIds  # the distinct pages of `slots`


Entry = StoredPage | StoredSegment


def exact_length(pages: Sequence[PrefixPage]) -> int:
    """Tokens of the pages of a prompt up to the first that is not exact."""
    return sum(page.num_tokens for page in itertools.takewhile(lambda page: page.exact, pages))


def pages_of(slots: Slots, page_size: int) -> PageIds:
    """Distinct pages of `slots`, ascending."""
    return np.unique(slots // page_size).astype(np.int32)
