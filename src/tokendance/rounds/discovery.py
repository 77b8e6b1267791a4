"""Discovery: shared text that nobody has marked, found in token ids.

Prompts that arrive together are compared by their grams, all windows of so many tokens. What
several prompts have in a row is cut wherever one of them begins, ends or goes on otherwise:

    prompt 1   [ private ][ A . . . . . . ][ B . . . . ][ private ]
    prompt 2   [ private    ][ B . . . . ][ private ][ A . . . . . . ]
    prompt 3   [ A . . . . . . ][ B . . . . ][ private ]
    found        A, B, each with the same ids in all of them

In terms of the graph whose nodes are grams, and whose edges are steps by one token, a shared piece
is a path without branches (a unitig, as genome assemblers call it). Ids are those of the prompt as
a whole: near the edge of a piece they can differ from prompt to prompt, and then the piece is
shorter by those tokens. So the model reads what it would have read anyway.

What was found before takes part like a prompt, so that a later round finds it again in whatever is
longer by then, and a prompt that comes late finds that of its round. Prompts of the last minutes
take part, too: agents who are asked one after another make a round that is drawn out. Of such a
prompt only what follows after the beginning that it has in common with a new one: a conversation
that goes on finds its beginning, exactly, by its prefix.
"""

import bisect
import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from tokendance.rounds.memory import GramHasher, Text, TextMemory, Words
from tokendance.rounds.segments import (
    EncodedPrompt,
    Salt,
    SegmentHash,
    TokenIds,
    build_prompt,
    hash_segment,
)

_NONE = np.uint64(0)  # before the first gram of a prompt, and after its last
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio: spreads hashes of hashes
# So many short paths in a row are compared at once, few first.
_JOINED = (2, 4)
# Earlier prompts, and pieces of such, that a prompt is compared with at most: those met last.
_MOST_PROMPTS = 256
_MOST_PIECES = 1024
# Shortening a path may let it overlap no more, or drop it; that is over after a pass or two.
_MAX_PASSES = 4


@dataclass(frozen=True, slots=True)
class DiscoveryConfig:
    """What counts as shared.

    Attributes:
        gram: tokens that are compared at once; shorter pieces are never found.
        min_tokens: shorter pieces are not worth correcting their edges.
        memory_tokens: texts that are kept for comparison, in tokens.
        recent_s: whole prompts take part so many seconds after they, or what they had in common
            with others, were last seen; with 0 only those that arrive together.
    """

    gram: int = 16
    min_tokens: int = 16
    memory_tokens: int = 2**17
    recent_s: float = 600.0


@dataclass(frozen=True, slots=True, eq=False)
class Heard:
    """An earlier prompt that has shared pieces of new ones.

    Attributes:
        token_ids: int32, of the whole prompt.
        parts: first position, position after the last, and hash of each of these pieces in it.
    """

    token_ids: TokenIds
    parts: tuple[tuple[int, int, SegmentHash], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What was found in prompts that arrived together.

    Attributes:
        prompts: cut into private and shared segments, in the order given.
        heard: earlier prompts with the same pieces.
    """

    prompts: list[EncodedPrompt]
    heard: list[Heard]


class Discovery:
    """Finds shared pieces in prompts of one salt, and remembers them."""

    def __init__(self, salt: Salt, config: DiscoveryConfig | None = None) -> None:
        """Begin with nothing remembered."""
        self._salt = salt
        self._config = config or DiscoveryConfig()
        self._hasher = GramHasher(self._config.gram)
        self._memory = TextMemory(self._config.memory_tokens, self._config.recent_s)

    @property
    def num_bytes(self) -> int:
        """Of what is remembered."""
        return self._memory.num_bytes

    def segment(self, prompts: Sequence[TokenIds], now: float, known: Sequence[int] = ()) -> Found:
        """Cut prompts that arrive together into private and shared segments.

        Args:
            prompts: int32 token ids of each.
            now: clock time in seconds.
            known: tokens at the beginning of each that are found by its prefix, if there are any.
                They take no part. So what an agent itself has said, and reads there, does not cut
                what it reads of all later.
        """
        # Several answers to one prompt are no reason to call it shared.
        distinct = {prompt.tobytes(): prompt for prompt in prompts}
        begins = dict(zip([one.tobytes() for one in prompts], known, strict=False))
        new = list(distinct.values())
        news = [begins.get(key, 0) for key in distinct]
        grams = [self._hasher.hashes(prompt) for prompt in new]
        met = self._memory.meet(np.concatenate(grams), now)
        earlier = [text for text in met if text.is_prompt][-_MOST_PROMPTS:]
        begins_alike = _common_beginnings([text.token_ids for text in earlier], new)
        # Each text that takes part, and where that part of it begins.
        texts = list(zip(earlier, begins_alike, strict=True))
        texts += [(text, 0) for text in met if not text.is_prompt][-_MOST_PIECES:]
        parts = [one[begin:] for one, begin in zip(grams, news, strict=True)]
        parts += [text.grams[begin:] for text, begin in texts]
        found = find_shared(parts, self._config.gram, self._config.min_tokens)
        cut = {
            key: build_prompt(_pieces(prompt, begin, ranges), self._salt)
            for (key, prompt), begin, ranges in zip(distinct.items(), news, found, strict=False)
        }
        segmented = [cut[prompt.tobytes()] for prompt in prompts]
        heard = self._heard(segmented, texts, found[len(new) :])
        self._remember(segmented, new, grams, texts, now)
        return Found(segmented, heard)

    def _heard(
        self,
        prompts: Sequence[EncodedPrompt],
        texts: Sequence[tuple[Text, int]],
        found: Sequence[Sequence[tuple[int, int]]],
    ) -> list[Heard]:
        wanted = {segment.hash for prompt in prompts for _, segment in prompt.shared_segments()}
        heard: list[Heard] = []
        for (text, begin), places in zip(texts, found, strict=True):
            if not text.is_prompt:
                continue
            hashed = [
                (
                    begin + first,
                    begin + last,
                    hash_segment(text.token_ids[begin + first : begin + last], self._salt),
                )
                for first, last in places
            ]
            parts = tuple(part for part in hashed if part[2] in wanted)
            if parts:
                heard.append(Heard(text.token_ids, parts))
        return heard

    def _remember(
        self,
        segmented: Sequence[EncodedPrompt],
        new: Sequence[TokenIds],
        grams: Sequence[Words],
        texts: Sequence[tuple[Text, int]],
        now: float,
    ) -> None:
        # Prompts that have gone on since are part of what they have become.
        self._memory.discard(
            text for text, begin in texts if text.is_prompt and begin == len(text.token_ids)
        )
        pieces = {
            segment.hash: segment.token_ids
            for encoded in segmented
            for _, segment in encoded.shared_segments()
        }
        hashed = [(ids, self._hasher.hashes(ids)) for ids in pieces.values()]
        self._memory.add(hashed, now, is_prompt=False)
        if self._config.recent_s > 0:
            self._memory.add(zip(new, grams, strict=True), now, is_prompt=True)

    def check_integrity(self) -> None:
        """Assert that what is remembered can be found, and no more."""
        self._memory.check_integrity()


def _common_beginnings(texts: Sequence[TokenIds], prompts: Sequence[TokenIds]) -> list[int]:
    """Length of the longest beginning that each text has in common with any of the prompts.

    In a sorted list that is one of the two between which the text stands.
    """
    by_bytes = {prompt.tobytes(): prompt for prompt in prompts}
    ordered = sorted(by_bytes)
    found = []
    for text in texts:
        place = bisect.bisect(ordered, text.tobytes())
        nearest = ordered[max(0, place - 1) : place + 1]
        found.append(max(_common_beginning(text, by_bytes[one]) for one in nearest))
    return found


def _common_beginning(text: TokenIds, other: TokenIds) -> int:
    length = min(len(text), len(other))
    differs = np.flatnonzero(text[:length] != other[:length])
    return int(differs[0]) if len(differs) else length


@dataclass(slots=True)
class _Path:
    """A path without branches in one text.

    Attributes:
        key: the same for the path wherever it stands.
        first: position of its first token.
        last: position after its last; paths that follow each other overlap, in less than a gram.
        branches_before: whether it is reached from several sides, or begins a text somewhere.
        branches_after: likewise whether it goes on to several.
    """

    key: int
    first: int
    last: int
    branches_before: bool
    branches_after: bool


def find_shared(grams: Sequence[Words], size: int, min_tokens: int) -> list[list[tuple[int, int]]]:
    """Find the pieces of each text that some other text has, too.

    Args:
        grams: of each text; a piece has at least one.
        size: tokens of a gram.
        min_tokens: shorter pieces are left out.

    Returns:
        For each text ranges of positions, ascending and apart. Where two texts have a piece in
        common, both have it as one of these ranges, unless pieces overlap.
    """
    collapsed = [_collapse(one, size) for one in grams]
    paths = _find_paths([one for one, _, _ in collapsed], range(len(grams)))
    for one, (_, firsts, lasts) in zip(paths, collapsed, strict=True):
        for path in one:
            path.first, path.last = int(firsts[path.first]), int(lasts[path.last - 1])
    found = [[replace(path) for path in one] for one in paths]
    _set_apart(found, min_tokens)
    for count in _JOINED:
        kept = {path.key for path in itertools.chain.from_iterable(found)}
        joined = _join(paths, kept, size, count)
        for one, more in zip(found, joined, strict=True):
            one += more
            one.sort(key=lambda path: path.first)
        _set_apart(found, min_tokens, kept)
    return [_ranges(one) for one in found]


def _collapse(
    grams: Words, size: int
) -> tuple[Words, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Make one gram of neighbours that are equal: a ruler, blank lines, one token many times.

    Otherwise each of them would be a path, as there is a branch behind each.

    Args:
        grams: of one text.
        size: tokens of a gram.

    Returns:
        Grams, different for each length of such a run; position of the first token of each, and
        after its last.
    """
    differs = grams[1:] != grams[:-1]
    if differs.all():  # most often
        firsts = np.arange(len(grams))
        return grams, firsts, firsts + size
    firsts = np.flatnonzero(np.append(True, differs))
    counts = np.diff(np.append(firsts, len(grams)))
    runs = np.maximum((grams[firsts] ^ counts.astype(np.uint64)) * _ODD, np.uint64(1))
    return np.where(counts > 1, runs, grams[firsts]), firsts, firsts + counts - 1 + size


def _join(
    paths: Sequence[Sequence[_Path]], kept: Collection[int], size: int, count: int
) -> list[list[_Path]]:
    """Find longer pieces where what is repeated within a text has left short ones only.

    Where a text says something twice there is a branch behind it, and so a cut, even if all texts
    repeat it alike. What is too short by itself is therefore compared once more, with paths in the
    place of tokens: "to be or not to be that is" is one piece although "to be" has two sequels.

    Args:
        paths: of each text.
        kept: keys of those that are long enough.
        size: tokens of a gram.
        count: so many paths in a row are compared at once.

    Returns:
        Pieces of so many paths or more, for each text.
    """
    runs: list[list[_Path]] = []  # of short paths, each one token after the one before
    texts: list[int] = []
    for text, one in enumerate(paths):
        last = -1
        for path in one:
            if path.key in kept:
                continue
            if path.first != last:
                runs.append([])
                texts.append(text)
            runs[-1].append(path)
            last = path.last - size + 1
    grams = [_grams_of([path.key for path in run], count) for run in runs]
    found: list[list[_Path]] = [[] for _ in paths]
    for text, run, joined in zip(texts, runs, _find_paths(grams, texts), strict=True):
        for path in joined:
            path.first, path.last = run[path.first].first, run[path.last + count - 2].last
            found[text].append(path)
    return found


def _grams_of(keys: Sequence[int], count: int) -> Words:
    """Hash so many neighbours at a time; never 0."""
    words = np.array(keys, np.uint64)
    hashes = np.zeros(max(0, len(words) - count + 1), np.uint64)
    for place in range(count):
        hashes = (hashes ^ words[place : place + len(hashes)]) * _ODD
    return np.maximum(hashes, np.uint64(1))


def _find_paths(grams: Sequence[Words], texts: Sequence[int]) -> list[list[_Path]]:
    """Find paths in sequences.

    Args:
        grams: of each sequence.
        texts: that each sequence is of.

    Returns:
        For each sequence its paths through grams that several texts have, in their order; `first`
        and `last` count grams.
    """
    counts = np.array([len(one) for one in grams])
    if counts.sum() == 0:
        return [[] for _ in grams]
    ends = np.cumsum(counts)
    gram = np.concatenate(grams)
    text = np.repeat(np.array(texts), counts)
    before, after = np.roll(gram, 1), np.roll(gram, -1)
    before[(ends - counts)[counts > 0]] = _NONE
    after[ends[counts > 0] - 1] = _NONE

    # Equal grams side by side: do they stand in several texts, and do all go on alike?
    order = np.argsort(gram)
    firsts = np.flatnonzero(np.concatenate(([True], np.diff(gram[order]) != 0)))
    group = np.empty(len(gram), np.int64)
    group[order] = np.repeat(np.arange(len(firsts)), np.diff(np.append(firsts, len(gram))))
    is_shared = _differs(text[order], firsts)[group]
    branches_before = _differs(before[order], firsts)[group]
    branches_after = _differs(after[order], firsts)[group]

    return [
        _paths(
            gram[end - count : end],
            is_shared[end - count : end],
            branches_before[end - count : end],
            branches_after[end - count : end],
        )
        for end, count in zip(ends.tolist(), counts.tolist(), strict=True)
    ]


def _differs(
    values: npt.NDArray[np.generic], firsts: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """For each group of neighbours, whether not all of its values are equal."""
    differs: npt.NDArray[np.bool_] = np.minimum.reduceat(values, firsts) != np.maximum.reduceat(
        values, firsts
    )
    return differs


def _paths(
    gram: Words,
    is_shared: npt.NDArray[np.bool_],
    branches_before: npt.NDArray[np.bool_],
    branches_after: npt.NDArray[np.bool_],
) -> list[_Path]:
    """Paths of one sequence in their order."""
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
            stop,
            bool(branches_before[begin]),
            bool(branches_after[stop - 1]),
        )
        for begin, stop in zip(begins.tolist(), stops.tolist(), strict=True)
    ]


def _set_apart(
    found: list[list[_Path]], min_tokens: int, kept: Collection[int] = frozenset()
) -> None:
    """Leave out short paths, and shorten those that overlap, each by the same wherever it stands.

    What two paths have in common goes to the one that is kept, if it is one of them. Otherwise it
    goes to the later one where only that is reached from several sides, else to the earlier one.

    Args:
        found: of each text; changed.
        min_tokens: shorter paths are left out.
        kept: keys of paths that stay as they are; they do not overlap.
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
                to_later = other.branches_before and not one.branches_after
                if other.key in kept or (to_later and one.key not in kept):
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


def _pieces(
    prompt: TokenIds, begin: int, ranges: Sequence[tuple[int, int]]
) -> list[tuple[TokenIds, bool]]:
    """Cut a prompt at ranges that are counted from `begin`."""
    pieces: list[tuple[TokenIds, bool]] = []
    done = 0
    for first, last in ranges:
        pieces.append((prompt[done : begin + first], False))
        pieces.append((prompt[begin + first : begin + last], True))
        done = begin + last
    return [*pieces, (prompt[done:], False)]
