"""Discovery: shared text that nobody has marked, found in token ids.

Prompts that arrive together are compared by their grams, all windows of so many tokens, through a
rolling hash (Rabin and Karp, IBM Journal of Research and Development 31, 1987). What several
prompts have in a row is cut wherever one of them begins, ends or goes on otherwise:

    prompt 1   [ private ][ A . . . . . . ][ B . . . . ][ private ]
    prompt 2   [ private    ][ B . . . . ][ private ][ A . . . . . . ]
    prompt 3   [ A . . . . . . ][ B . . . . ][ private ]
    found        A, B, each with the same ids in all of them

In terms of the graph whose nodes are grams, and whose edges are steps by one token, a shared piece
is a path without branches (a unitig, as genome assemblers call it). Ids are those of the prompt as
a whole: near the edge of a piece they can differ from prompt to prompt, and then the piece is
shorter by those tokens. So the model reads what it would have read anyway.

Pieces that were found before take part like prompts, so that a later round finds them again in
whatever is longer by then, and a prompt that comes late finds those of its round.
"""

import itertools
import secrets
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokendance.rounds.segments import (
    EncodedPrompt,
    Salt,
    SegmentHash,
    TokenIds,
    build_prompt,
)

Words = npt.NDArray[np.uint64]

_NONE = np.uint64(0)  # before the first gram of a prompt, and after its last
# Shortening a path may let it overlap no more, or drop it; that is over after a pass or two.
_MAX_PASSES = 4


@dataclass(frozen=True, slots=True)
class DiscoveryConfig:
    """What counts as shared.

    Attributes:
        gram: tokens that are compared at once; shorter pieces are never found.
        min_tokens: shorter pieces are not worth correcting their edges.
        memory_tokens: pieces found before that are kept for comparison, in tokens.
    """

    gram: int = 16
    min_tokens: int = 32
    memory_tokens: int = 2**15


class Discovery:
    """Finds shared pieces in prompts of one salt, and remembers them."""

    def __init__(self, salt: Salt, config: DiscoveryConfig | None = None) -> None:
        """Begin with nothing remembered."""
        self._salt = salt
        self._config = config or DiscoveryConfig()
        self._hasher = _GramHasher(self._config.gram)
        self._known: OrderedDict[SegmentHash, TokenIds] = OrderedDict()
        self._num_known = 0

    def segment(self, prompts: Sequence[TokenIds]) -> list[EncodedPrompt]:
        """Cut prompts that arrive together into private and shared segments.

        Args:
            prompts: int32 token ids of each.
        """
        # Several answers to one prompt are no reason to call it shared.
        distinct = list({prompt.tobytes(): prompt for prompt in prompts}.values())
        texts = [*distinct, *self._known.values()]
        found = find_shared(texts, self._hasher, self._config.min_tokens)
        ranges = {prompt.tobytes(): places for prompt, places in zip(distinct, found, strict=False)}
        segmented = [
            build_prompt(_pieces(prompt, ranges[prompt.tobytes()]), self._salt)
            for prompt in prompts
        ]
        for prompt in segmented:
            for _, segment in prompt.shared_segments():
                self._remember(segment.hash, segment.token_ids)
        return segmented

    def _remember(self, segment: SegmentHash, token_ids: TokenIds) -> None:
        if segment in self._known:
            self._known.move_to_end(segment)
            return
        if len(token_ids) > self._config.memory_tokens:
            return
        self._known[segment] = token_ids
        self._num_known += len(token_ids)
        while self._num_known > self._config.memory_tokens:
            _, oldest = self._known.popitem(last=False)
            self._num_known -= len(oldest)


class _GramHasher:
    """Hashes of all grams: token ids become random numbers, the digits of a number modulo 2^64.

    The random numbers are drawn anew for each `Discovery`, so nobody can write texts that collide.
    A collision does no harm beyond a needless cut: segments are known by another hash.
    """

    def __init__(self, gram: int) -> None:
        self.gram = gram
        self._digits = np.zeros(0, np.uint64)
        self._base = np.uint64(secrets.randbits(64) | 1)
        self._inverse = np.uint64(pow(int(self._base), -1, 2**64))

    def hashes(self, token_ids: TokenIds) -> Words:
        """Hash the gram at each position but the last few; never 0."""
        count = len(token_ids) - self.gram + 1
        if count <= 0:
            return np.zeros(0, np.uint64)
        powers = self._powers(self._base, len(token_ids))
        sums = np.cumsum(self._digit(token_ids) * powers, dtype=np.uint64)
        sums = np.concatenate(([_NONE], sums))
        grams = (sums[self.gram :] - sums[: -self.gram]) * self._powers(self._inverse, count)
        found: Words = np.maximum(grams, np.uint64(1))
        return found

    def _digit(self, token_ids: TokenIds) -> Words:
        largest = int(token_ids.max())
        if largest >= len(self._digits):
            raw = secrets.token_bytes(8 * (largest + 1 - len(self._digits)))
            self._digits = np.concatenate((self._digits, np.frombuffer(raw, np.uint64)))
        digits: Words = self._digits[token_ids]
        return digits

    @staticmethod
    def _powers(base: np.uint64, count: int) -> Words:
        powers = np.full(count, base, np.uint64)
        powers[0] = 1
        return np.cumprod(powers, dtype=np.uint64)


def find_shared(
    texts: Sequence[TokenIds], hasher: _GramHasher, min_tokens: int
) -> list[list[tuple[int, int]]]:
    """Find the pieces of each text that some other text has, too.

    Args:
        texts: int32 token ids of each.
        hasher: of grams; a piece has at least one.
        min_tokens: shorter pieces are left out.

    Returns:
        For each text ranges of positions, ascending and apart. Where two texts have a piece in
        common, both have it as one of these ranges, unless pieces overlap.
    """
    grams = [hasher.hashes(text) for text in texts]
    counts = np.array([len(one) for one in grams])
    if counts.sum() == 0:
        return [[] for _ in texts]
    ends = np.cumsum(counts)
    gram = np.concatenate(grams)
    text = np.repeat(np.arange(len(texts)), counts)
    before, after = np.roll(gram, 1), np.roll(gram, -1)
    before[(ends - counts)[counts > 0]] = _NONE
    after[ends[counts > 0] - 1] = _NONE

    # Equal grams side by side: do they stand in several texts, and do all go on alike?
    order = np.argsort(gram, kind="stable")
    firsts = np.flatnonzero(np.concatenate(([True], np.diff(gram[order]) != 0)))
    group = np.empty(len(gram), np.int64)
    group[order] = np.repeat(np.arange(len(firsts)), np.diff(np.append(firsts, len(gram))))
    is_shared = _differs(text[order], firsts)[group]
    branches_before = _differs(before[order], firsts)[group]
    branches_after = _differs(after[order], firsts)[group]

    found = [
        _paths(
            gram[end - count : end],
            is_shared[end - count : end],
            branches_before[end - count : end],
            branches_after[end - count : end],
            hasher.gram,
        )
        for end, count in zip(ends.tolist(), counts.tolist(), strict=True)
    ]
    _set_apart(found, min_tokens)
    return [_ranges(paths) for paths in found]


def _differs(
    values: npt.NDArray[np.generic], firsts: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """For each group of neighbours, whether not all of its values are equal."""
    differs: npt.NDArray[np.bool_] = np.minimum.reduceat(values, firsts) != np.maximum.reduceat(
        values, firsts
    )
    return differs


@dataclass(slots=True)
class _Path:
    """A path without branches in one text.

    Attributes:
        key: the same for the path wherever it stands.
        first: position of its first token.
        last: position after its last.
        branches_before: whether it is reached from several sides, or begins a text somewhere.
        branches_after: likewise whether it goes on to several.
    """

    key: int
    first: int
    last: int
    branches_before: bool
    branches_after: bool


def _paths(
    gram: Words,
    is_shared: npt.NDArray[np.bool_],
    branches_before: npt.NDArray[np.bool_],
    branches_after: npt.NDArray[np.bool_],
    size: int,
) -> list[_Path]:
    """Paths of one text in their order. Neighbours may overlap, in less than a gram's tokens."""
    if not is_shared.any():
        return []
    cut = branches_before.copy()
    cut[1:] |= branches_after[:-1] | ~is_shared[:-1]
    cut[0] = True
    begins = np.flatnonzero(cut & is_shared)
    stops = np.flatnonzero(np.append(cut[1:] | ~is_shared[1:], True) & is_shared) + 1
    return [
        _Path(
            int(gram[begin]),
            begin,
            stop + size - 1,
            bool(branches_before[begin]),
            bool(branches_after[stop - 1]),
        )
        for begin, stop in zip(begins.tolist(), stops.tolist(), strict=True)
    ]


def _set_apart(found: list[list[_Path]], min_tokens: int) -> None:
    """Leave out short paths, and shorten those that overlap, each by the same wherever it stands.

    What two paths have in common goes to the later one where only that is reached from several
    sides, else to the earlier one.
    """
    for _ in range(_MAX_PASSES):
        for paths in found:
            paths[:] = [path for path in paths if path.last - path.first >= min_tokens]
        heads: dict[int, int] = {}
        tails: dict[int, int] = {}
        for paths in found:
            for one, other in itertools.pairwise(paths):
                overlap = one.last - other.first
                if overlap <= 0:
                    continue
                if other.branches_before and not one.branches_after:
                    tails[one.key] = max(overlap, tails.get(one.key, 0))
                else:
                    heads[other.key] = max(overlap, heads.get(other.key, 0))
        if not heads and not tails:
            return
        for path in itertools.chain.from_iterable(found):
            path.first += heads.get(path.key, 0)
            path.last -= tails.get(path.key, 0)


def _ranges(paths: Sequence[_Path]) -> list[tuple[int, int]]:
    """Where the paths of a text lie; what should still overlap is cut."""
    ranges: list[tuple[int, int]] = []
    done = 0
    for path in paths:
        first = max(path.first, done)
        if first < path.last:
            ranges.append((first, path.last))
            done = path.last
    return ranges


def _pieces(prompt: TokenIds, ranges: Sequence[tuple[int, int]]) -> list[tuple[TokenIds, bool]]:
    pieces: list[tuple[TokenIds, bool]] = []
    done = 0
    for first, last in ranges:
        pieces += [(prompt[done:first], False), (prompt[first:last], True)]
        done = last
    return [*pieces, (prompt[done:], False)]
