"""Owners: the order in which the requests of a round start, so that little is computed twice.

Whoever starts first computes what is missing, and everybody after it finds it in the store. So
choosing owners is choosing an order:

1.  Greedily, the request that misses the most shared tokens comes next, until every shared
    segment has an owner. The first owner has all its segments in its own context; where all
    agents read the same, it is the master and nothing is left for the others.
2.  Owners only ever depend on owners before them, so nobody waits in a circle.
3.  A segment reused in another order is reused far from what it said in its owner's context
    (docs/benchmarks.md has the price). So requests whose order no owner shares, but that share
    it with each other, get an owner of their own: the first of them computes its run afresh.

Only hashes and lengths are looked at.
"""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from tokendance.rounds.segments import EncodedPrompt, SegmentHash

SegmentList = Sequence[tuple[SegmentHash, int]]


@dataclass(frozen=True, slots=True)
class Lenders:
    """Those who may own a run together with its owner (`co_owners.py`).

    Attributes:
        segments: of the run.
        texts: what stands before it in the prompt of each.
    """

    segments: tuple[SegmentHash, ...]
    texts: tuple[EncodedPrompt, ...]

    def within(self, num_tokens: int) -> "Lenders":
        """Those of the first texts that have so many tokens together, or fewer."""
        ends = itertools.accumulate(map(len, self.texts))
        num_texts = sum(1 for _ in itertools.takewhile(lambda end: end <= num_tokens, ends))
        return Lenders(self.segments, self.texts[:num_texts])


@dataclass(frozen=True, slots=True)
class Start:
    """One request's turn.

    Attributes:
        index: of the request in the round as it was given.
        owns_order: compute segments that the store has in another order only.
        lenders: of its run, if it has co-owners.
    """

    index: int
    owns_order: bool = False
    lenders: Lenders | None = None


def order_starts(requests: Sequence[SegmentList], known: Collection[SegmentHash]) -> list[Start]:
    """Choose the order in which the requests of a round start.

    Args:
        requests: for each request its shared segments in order, as (hash, number of tokens).
        known: segments that the store has.
    """
    owned = set(known)
    waiting = list(range(len(requests)))
    owners: list[int] = []
    while True:
        missing = {
            index: sum({h: size for h, size in requests[index] if h not in owned}.values())
            for index in waiting
        }
        best = max(waiting, key=lambda index: missing[index], default=None)
        if best is None or missing[best] == 0:
            break
        owners.append(best)
        waiting.remove(best)
        owned.update(h for h, _ in requests[best])

    orders = [[h for h, _ in requests[index]] for index in owners]
    strangers: list[list[int]] = []  # requests of one order that no owner has
    for index in waiting:
        order = [h for h, _ in requests[index]]
        if not owners or any(in_order(order, known_order) for known_order in orders):
            continue
        for group in strangers:
            if in_order(order, [h for h, _ in requests[group[0]]]):
                group.append(index)
                break
        else:
            strangers.append([index])
    leaders = [group[0] for group in strangers if len(group) > 1]
    return [
        *(Start(index) for index in owners),
        *(Start(index, owns_order=True) for index in leaders),
        *(Start(index) for index in waiting if index not in leaders),
    ]


def in_order(order: Sequence[SegmentHash], other: Sequence[SegmentHash]) -> bool:
    """Say whether the segments that both lists have stand in the same order in both."""
    places: dict[SegmentHash, list[int]] = {}
    for place, segment in enumerate(other):
        places.setdefault(segment, []).append(place)
    last = -1
    for segment in order:
        if segment in places:
            later = next((place for place in places[segment] if place > last), None)
            if later is None:
                return False
            last = later
    return True
