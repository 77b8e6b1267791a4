"""What the indexes hold: blocks of prompts, and copies of shared segments."""

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
class PrefixBlock:
    """Up to one page of consecutive tokens of a prompt, known by all tokens up to its end.

    Attributes:
        chain: hash of the prompt up to the end of this block.
        slots: where the KV of each of its tokens lies. In a mirror these point into own pages
            and into pages of runs.
        pages: the distinct pages of `slots`.
        exact: whether the KV is what the model computes for this very prompt.
    """

    chain: ChainHash
    slots: Slots
    pages: PageIds
    exact: bool


@dataclass(slots=True, eq=False)
class SegmentCopy:
    """The KV of a shared segment, as its owner computed it in the owner's context.

    Attributes:
        hash: of the segment's content.
        run: the run it belongs to.
        index: its place among the segments of the run.
        slots: where the KV of each of its tokens lies, in the order of the tokens.
        pages: the distinct pages of `slots`.
        round_id: in which its owner computed it; None if it is listed for another reason.
        rounds: the rounds in which mirrors have reused it so far; the store counts them.
        sound: whether its owner has had finite logits; the scheduler writes it.
    """

    hash: SegmentHash
    run: RunId
    index: int
    slots: Slots
    pages: PageIds
    round_id: RoundId | None = None
    rounds: set[RoundId] = field(default_factory=set)
    sound: bool = False


Entry = PrefixBlock | SegmentCopy


def exact_length(blocks: Sequence[PrefixBlock]) -> int:
    """Tokens of the blocks of a prompt up to the first that is not exact."""
    return sum(len(block.slots) for block in itertools.takewhile(lambda one: one.exact, blocks))


def pages_of(slots: Slots, page_size: int) -> PageIds:
    """Distinct pages of `slots`, ascending."""
    return np.unique(slots // page_size).astype(np.int32)
