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
from tokendance.rounds.segments import EncodedPrompt, SegmentHash
from tokendance.store.entries import PrefixPage


@dataclass(frozen=True, slots=True)
class LentText:
    """What stands before a run in a co-owner's prompt.

    Attributes:
        pages: where it is cached.
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

    Those may own a run together who read the same shared segments in the same order, if those that
    are new stand side by side, and nobody who starts before them owns these. The one with the
    longest text before them takes the place of the first of them. No text is lent twice.

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
    for start in starts:
        shared = prompts[start.index].shared_segments()
        alike.setdefault(tuple(segment.hash for _, segment in shared), []).append(start.index)
    owned = set(known)
    takes_place_of: dict[int, int] = {}
    lenders: dict[int, Lenders] = {}
    for segments, members in alike.items():  # in the order of their first starts
        run = [segment for segment in segments if segment not in known]
        is_new = owned.isdisjoint(run)
        owned.update(run)
        if not run or not is_new:
            continue
        texts = {index: _text_before(run, prompts[index]) for index in members}
        with_text = {index: text for index, text in texts.items() if text is not None}
        if len(with_text) < 2:
            continue
        owner = max(with_text, key=lambda index: len(with_text[index]))
        own_ids = with_text[owner].token_ids.tobytes()
        lent = {text.token_ids.tobytes(): text for text in with_text.values()}
        del lent[own_ids]
        if lent:
            takes_place_of |= {members[0]: owner, owner: members[0]}
            lenders[owner] = Lenders(tuple(run), tuple(lent.values())[: most - 1])
    chosen = []
    for start in starts:
        index = takes_place_of.get(start.index, start.index)
        chosen.append(replace(start, index=index, lenders=lenders.get(index)))
    return chosen


def _text_before(run: Sequence[SegmentHash], prompt: EncodedPrompt) -> EncodedPrompt | None:
    """All that stands before a run in a prompt.

    None if nothing does, or if anything stands between the segments of the run.
    """
    places = [
        place
        for place, segment in enumerate(prompt.segments)
        if segment.shared and segment.hash in run
    ]
    if places[0] == 0 or places[-1] - places[0] != len(run) - 1 or len(places) != len(run):
        return None
    return EncodedPrompt(prompt.segments[: places[0]], prompt.salt)


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
        The texts that are cached and no longer than the owner's, no more than there are tokens for;
        None if there is none.
    """
    found: list[LentText] = []
    for text in texts[: max(0, len(common) - 1)]:
        pages = cached_pages(text, index)
        if pages is not None and len(text) <= begin:
            found.append(LentText(pages, len(text)))
    return LentTexts(tuple(found), begin, common) if found else None


def cached_pages(text: EncodedPrompt, index: KVIndex) -> tuple[PrefixPage, ...] | None:
    """Pages that hold all of a text; None if any of it is not cached."""
    pages = tuple(index.match_prefix(text.prefix_hashes, exact=False))
    return pages if sum(page.num_tokens for page in pages) >= len(text) else None
