"""Where one block of shared text ends and the next begins, if all prompts have both in a row.

Comparing prompts shows no such place: blocks that everybody reads in one order are one range. Only
their outer edges would be corrected then, and who reads them in another order would find none of
them. What tells blocks apart is that somebody has spoken, and stopped:

- a special token follows text, as at the end of a message in a chat template;
- what a finished request has said ends. It is known by its last grams (`OutputEnds`).

A block so has what stands before its text, a name or the head of a message: that is what is
corrected first. All of it is a function of the tokens of the range alone, so that a range is cut in
the same places wherever it stands.
"""

import numpy as np
import numpy.typing as npt

from tokendance.rounds.grams import Hashes
from tokendance.rounds.segments import TokenIds

Positions = npt.NDArray[np.int64]

# The last tokens of an output may be others where it is read: a token that ended it, a line break
# that merges with what follows. So it ends behind its last grams but so many, too.
_NUM_TAILS = 4


class OutputEnds:
    """The ends of the last outputs; the oldest is forgotten first."""

    def __init__(self, max_outputs: int) -> None:
        """Remember so many outputs, 32 bytes each."""
        self._tails = np.zeros((max_outputs, _NUM_TAILS), np.uint64)  # 0 is no gram
        self._num_noted = 0
        self._ascending: Hashes | None = None  # all tails; None where one has been noted since

    @property
    def num_bytes(self) -> int:
        """Memory that they take."""
        return self._tails.nbytes

    def note(self, grams: Hashes) -> None:
        """Remember an output, of which these are the grams."""
        tails = np.unique(grams[-_NUM_TAILS:])
        if len(tails) == 0 or np.isin(tails, self._tails).all():
            return
        row = self._tails[self._num_noted % len(self._tails)]
        row[:] = 0
        row[: len(tails)] = tails
        self._num_noted += 1
        self._ascending = None

    def found_in(self, grams: Hashes, gram_size: int) -> Positions:
        """Positions in a text, given by its grams, before which an output ends; ascending."""
        if self._ascending is None:
            self._ascending = np.unique(self._tails[self._tails != 0])
        is_tail = _is_among(grams, self._ascending)
        # Of the last grams in a row, the last.
        is_tail[:-1] &= ~is_tail[1:]
        return np.flatnonzero(is_tail) + gram_size


def message_ends(token_ids: TokenIds, special_ids: TokenIds) -> Positions:
    """Positions of special tokens that stand behind others; ascending.

    Args:
        token_ids: int32, of a text.
        special_ids: int32, ascending.
    """
    is_special = _is_among(token_ids, special_ids)
    return np.flatnonzero(is_special[1:] & ~is_special[:-1]) + 1


def split_range(
    begin: int,
    end: int,
    messages: Positions,
    outputs: Positions,
    gram_size: int,
    min_tokens: int,
) -> list[tuple[int, int]]:
    """Cut a range of shared text into blocks of `min_tokens` at least.

    Args:
        begin: its first position in a text.
        end: position after its last.
        messages: of the text, from `message_ends`.
        outputs: of the text, from `OutputEnds.found_in`; those whose gram begins before the range
            are left out, since another text with the same range need not have them.
        gram_size: tokens of a gram.
        min_tokens: of a block.
    """
    within = [
        messages[np.searchsorted(messages, begin, "right") : np.searchsorted(messages, end)],
        outputs[np.searchsorted(outputs, begin + gram_size) : np.searchsorted(outputs, end)],
    ]
    edges = [begin]
    for cut in np.unique(np.concatenate(within)).tolist():
        if cut - edges[-1] >= min_tokens and end - cut >= min_tokens:
            edges.append(cut)
    return list(zip(edges, [*edges[1:], end], strict=True))


def _is_among(
    values: npt.NDArray[np.integer], ascending: npt.NDArray[np.integer]
) -> npt.NDArray[np.bool_]:
    """Whether each value is one of some that ascend: `np.isin`, which would sort these anew."""
    if len(ascending) == 0:
        return np.zeros(len(values), bool)
    nearest = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    found: npt.NDArray[np.bool_] = ascending[nearest] == values
    return found
