"""Co-owners: several agents of a round own a run together, a token each in turn.

What an owner computes behind its own text is as far from what a mirror would have computed as their
two texts are from each other. With co-owners the tokens of a run are computed behind the texts of
several agents in turn, so whoever reads it reads a mean of them, from which nobody is that far:

    tokens of the run    0    1    2    3    4    5    6
    behind the text of   Ann  Bob  Cy   Ann  Bob  Cy   Ann

Each token is computed once, and sees all tokens of the run before it, whosever they are. Tokens
that are stored apart, since mirrors compute them afresh, are computed behind the owner's text: it
reads its own run like a mirror. So no answer of the round is exact, and the others are nearer than
they would have been, on average (docs/log.md).

The run lies at the owner's positions. The owner is the one whose text is longest; the others' texts
are read so that they end where the run begins:

    positions      0 ......................... run
    Ann, owner     [text of Ann               ][run]
    Bob                         [text of Bob  ][run]      at an offset, as mirrors read a run

A text that is not cached when the round begins is computed before the run, by a request without an
answer; its agent finds it there.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from tokendance.collector.owners import Lenders, Start
from tokendance.collector.sources import KVIndex
from tokendance.rounds.segments import EncodedPrompt, Segment, SegmentHash
from tokendance.store.entries import PrefixPage


@dataclass(frozen=True, slots=True)
class LentText:
    """What stands before a run in a co-owner's prompt.

    Attributes:
        pages: where it is cached; the last may have more tokens.
        num_tokens: its length.
    """

    pages: tuple[PrefixPage, ...]
    num_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class LentTexts:
    """The texts of all co-owners of a request's run.

    Attributes:
        texts: of each but the owner, whose text is in its own prompt.
        begin: position of the run's first token in the owner's prompt.
        common: int64, positions of the run that are computed behind all texts in turn, ascending.
    """

    texts: tuple[LentText, ...]
    begin: int
    common: npt.NDArray[np.int64]

    def divide(self, positions: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        """Divide positions of the owner's prompt among the owner and its co-owners.

        Args:
            positions: int64, ascending.

        Returns:
            Those of the owner, then those of each co-owner in the order of `texts`, ascending. All
            that are not among the common positions of the run are the owner's.
        """
        place = np.searchsorted(self.common, positions)
        is_common = place < len(self.common)
        is_common[is_common] = self.common[place[is_common]] == positions[is_common]
        turn = np.where(is_common, place % (len(self.texts) + 1), 0)
        return [positions[turn == owner] for owner in range(len(self.texts) + 1)]


def with_co_owners(
    starts: Sequence[Start],
    prompts: Sequence[EncodedPrompt],
    known: Collection[SegmentHash],
    most: int,
) -> list[Start]:
    """Choose co-owners for the owners of a round.

    Those may own a run together for whom the same shared segments are new, in the same order and
    with nothing in between. The one with the longest text before them takes the place of the first
    of them.

    Args:
        starts: of the round's requests.
        prompts: of all of them, by their index.
        known: segments that the store has.
        most: owners of a run.

    Returns:
        The starts, some of them in another order.
    """
    if most < 2:
        return list(starts)
    alike: dict[tuple[SegmentHash, ...], list[int]] = {}
    texts: dict[int, EncodedPrompt] = {}
    for start in starts:
        run, text = _new_run(prompts[start.index], known)
        if run and len(text):
            alike.setdefault(tuple(segment.hash for segment in run), []).append(start.index)
            texts[start.index] = text
    takes_place_of: dict[int, int] = {}
    lenders: dict[int, Lenders] = {}
    for segments, members in alike.items():
        owner = max(members, key=lambda index: len(texts[index]))
        takes_place_of |= {members[0]: owner, owner: members[0]}
        lent = [texts[index] for index in members if index != owner][: most - 1]
        if lent:
            lenders[owner] = Lenders(segments, tuple(lent))
    chosen = []
    for start in starts:
        index = takes_place_of.get(start.index, start.index)
        chosen.append(replace(start, index=index, lenders=lenders.get(index)))
    return chosen


def _new_run(
    prompt: EncodedPrompt, known: Collection[SegmentHash]
) -> tuple[list[Segment], EncodedPrompt]:
    """The shared segments of a prompt that are new, and all that stands before them.

    None are if anything stands between them.
    """
    places = [
        place
        for place, segment in enumerate(prompt.segments)
        if segment.shared and segment.hash not in known
    ]
    if not places or places[-1] - places[0] != len(places) - 1:
        return [], prompt
    run = list(prompt.segments[places[0] : places[-1] + 1])
    return run, EncodedPrompt(prompt.segments[: places[0]], prompt.salt)


def find_lent(
    begin: int, common: npt.NDArray[np.int64], texts: Sequence[EncodedPrompt], index: KVIndex
) -> LentTexts | None:
    """Find what co-owners can lend.

    Args:
        begin: position of the run's first token in the owner's prompt.
        common: see `LentTexts`.
        texts: of the co-owners.
        index: says what is cached.

    Returns:
        The texts that are cached and no longer than the owner's; None if there is none.
    """
    found: list[LentText] = []
    for text in texts:
        pages = cached_pages(text, index)
        if pages is not None and len(text) <= begin:
            found.append(LentText(pages, len(text)))
    return LentTexts(tuple(found), begin, common) if found else None


def cached_pages(text: EncodedPrompt, index: KVIndex) -> tuple[PrefixPage, ...] | None:
    """Pages that hold all of a text; None if any of it is not cached."""
    pages = tuple(index.match_prefix(text.prefix_hashes, exact=False))
    return pages if sum(page.num_tokens for page in pages) >= len(text) else None
