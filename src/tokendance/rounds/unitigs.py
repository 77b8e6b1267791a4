"""Text that several token sequences share, as paths without branches in the graph of their grams.

The nodes of the graph are the distinct grams of all texts; an edge leads from each gram to the one
that begins a token later. Texts that agree walk the same path. It has a branch where one of them
begins, ends, or goes on differently, and shared text is what lies between two branches:

    text 1    p q A B C D r          p -> q -> A -> B -> C -> D -> r
    text 2    s A B C D t u               s -^                ^-> t -> u

The path A B C D is shared: both texts walk it, A is reached from two sides, and D goes on to two.
Genome assembly calls such a path a unitig of a de Bruijn graph, and reads are what texts are here.

A gram spans several tokens, so paths that follow each other in a text overlap in tokens. What two
paths have in common is given to one of them, and taken from the other wherever it stands, so that
the same shared text has the same tokens everywhere. All functions here are pure.
"""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from tokendance.rounds.grams import Hashes

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

_NO_GRAM = np.uint64(0)  # stands before the first gram of a text, and after its last
_SPREAD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio: spreads hashes of hashes
# Short paths are compared in sequences of so many, short sequences first.
_SEQUENCE_LENGTHS = (2, 4)
# Shortening a path may end its overlaps, or drop it. That settles after a pass or two.
_MAX_PASSES = 4


@dataclass(slots=True)
class _Path:
    """A path without branches, as it stands in one text, from token `begin` to before `end`."""

    key: int  # hash of its first gram: the same for the path wherever it stands
    begin: int
    end: int
    branches_before: bool  # reached from several sides; the beginning of a text is one
    branches_after: bool  # goes on to several; the end of a text is one


def find_shared(
    grams: Sequence[Hashes], gram_size: int, min_tokens: int
) -> list[list[tuple[int, int]]]:
    """Find what each text has in common with any other.

    Args:
        grams: of each text, uint64 (tokens - gram_size + 1,), never 0.
        gram_size: tokens of a gram; shared text is at least as long.
        min_tokens: shorter shared text is left out.

    Returns:
        For each text its ranges of positions (begin, end), ascending and disjoint. Where two texts
        have something in common, both have it as one of these ranges, unless paths overlap in ways
        that cannot be settled.
    """
    collapsed = [_collapse_runs(text, gram_size) for text in grams]
    all_paths = _find_paths([text for text, _, _ in collapsed], range(len(grams)))
    for paths, (_, begins, ends) in zip(all_paths, collapsed, strict=True):
        for path in paths:  # from indices of grams to positions of tokens
            path.begin, path.end = int(begins[path.begin]), int(ends[path.end - 1])
    shared = [[replace(path) for path in paths] for paths in all_paths]
    _settle_overlaps(shared, min_tokens)
    for length in _SEQUENCE_LENGTHS:
        settled = {path.key for path in itertools.chain.from_iterable(shared)}
        sequences = _join_short_paths(all_paths, settled, gram_size, length)
        for paths, joined in zip(shared, sequences, strict=True):
            paths += joined
            paths.sort(key=lambda path: path.begin)
        _settle_overlaps(shared, min_tokens, settled)
    return [_disjoint_ranges(paths) for paths in shared]


def _collapse_runs(grams: Hashes, gram_size: int) -> tuple[Hashes, Int64Array, Int64Array]:
    """Make one gram of neighbours that are equal: a ruler, blank lines, one token many times.

    Such a gram follows itself and is followed by something else: a branch behind each of them.

    Returns:
        The grams (a run's hash depends on its length), the position of the first token of each,
        and that after its last.
    """
    changes = grams[1:] != grams[:-1]
    if changes.all():  # most often
        begins = np.arange(len(grams))
        return grams, begins, begins + gram_size
    begins = np.flatnonzero(np.append(True, changes))
    lengths = np.diff(np.append(begins, len(grams)))
    run_hashes = np.maximum((grams[begins] ^ lengths.astype(np.uint64)) * _SPREAD, np.uint64(1))
    collapsed = np.where(lengths > 1, run_hashes, grams[begins])
    return collapsed, begins, begins + lengths - 1 + gram_size


def _find_paths(grams: Sequence[Hashes], text_of: Sequence[int]) -> list[list[_Path]]:
    """For each sequence of grams, its paths through grams that several texts have.

    `text_of` says of which text each sequence is. `begin` and `end` of the paths are indices of
    grams.
    """
    counts = np.array([len(sequence) for sequence in grams])
    if counts.sum() == 0:
        return [[] for _ in grams]
    ends = np.cumsum(counts)
    gram = np.concatenate(grams)
    text = np.repeat(np.array(text_of), counts)
    before, after = np.roll(gram, 1), np.roll(gram, -1)
    before[(ends - counts)[counts > 0]] = _NO_GRAM
    after[ends[counts > 0] - 1] = _NO_GRAM

    # Sorted, equal grams are side by side: do several texts have them, are all reached from the
    # same side, do all go on alike?
    order = np.argsort(gram)
    node_begins = np.flatnonzero(np.concatenate(([True], np.diff(gram[order]) != 0)))
    node_sizes = np.diff(np.append(node_begins, len(gram)))
    node = np.empty(len(gram), np.int64)  # of each gram
    node[order] = np.repeat(np.arange(len(node_begins)), node_sizes)
    is_shared = _differ(text[order], node_begins)[node]
    branches_before = _differ(before[order], node_begins)[node]
    branches_after = _differ(after[order], node_begins)[node]

    sequences = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
    return [
        _paths_of_sequence(gram[s], is_shared[s], branches_before[s], branches_after[s])
        for s in sequences
    ]


def _differ(values: npt.NDArray[np.generic], begins: Int64Array) -> BoolArray:
    """For each group of neighbours, given where groups begin: whether its values differ."""
    lowest, highest = np.minimum.reduceat(values, begins), np.maximum.reduceat(values, begins)
    differ: BoolArray = lowest != highest
    return differ


def _paths_of_sequence(
    gram: Hashes, is_shared: BoolArray, branches_before: BoolArray, branches_after: BoolArray
) -> list[_Path]:
    """Cut one sequence of grams at its branches; the paths of shared grams, in their order."""
    if not is_shared.any():
        return []
    is_cut = branches_before.copy()  # before each gram
    is_cut[1:] |= branches_after[:-1] | ~is_shared[:-1]
    is_cut[0] = True
    begins = np.flatnonzero(is_cut & is_shared)
    ends = np.flatnonzero(np.append(is_cut[1:] | ~is_shared[1:], True) & is_shared) + 1
    return [
        _Path(*path)
        for path in zip(
            gram[begins].tolist(),
            begins.tolist(),
            ends.tolist(),
            branches_before[begins].tolist(),
            branches_after[ends - 1].tolist(),
            strict=True,
        )
    ]


def _settle_overlaps(
    texts: list[list[_Path]], min_tokens: int, settled: Collection[int] = frozenset()
) -> None:
    """Drop short paths, and shorten those that overlap, each alike wherever it stands.

    What two paths have in common goes to the settled one, if one of them is settled; these, given
    by their keys, do not overlap. Otherwise it goes to the later one if only that one has a branch
    between them, else to the earlier one.
    """
    for _ in range(_MAX_PASSES):
        for paths in texts:
            paths[:] = [path for path in paths if path.end - path.begin >= min_tokens]
        from_begin: dict[int, int] = {}  # tokens to take from each path, by key
        from_end: dict[int, int] = {}
        for paths in texts:
            for earlier, later in itertools.pairwise(paths):
                overlap = earlier.end - later.begin
                if overlap <= 0:
                    continue
                only_later_branches = later.branches_before and not earlier.branches_after
                if later.key in settled or (only_later_branches and earlier.key not in settled):
                    from_end[earlier.key] = max(overlap, from_end.get(earlier.key, 0))
                else:
                    from_begin[later.key] = max(overlap, from_begin.get(later.key, 0))
        if not from_begin and not from_end:
            return
        for path in itertools.chain.from_iterable(texts):
            path.begin += from_begin.get(path.key, 0)
            path.end -= from_end.get(path.key, 0)


def _join_short_paths(
    texts: Sequence[Sequence[_Path]], settled: Collection[int], gram_size: int, length: int
) -> list[list[_Path]]:
    """Join short paths that follow each other in several texts alike.

    Where a text repeats itself there is a branch behind the repeated words, and so a cut, even if
    all texts repeat them alike. What is too short by itself (`settled` has the keys of the others)
    is therefore compared once more, with paths in the place of tokens, `length` to a gram: "to be
    or not to be that is" is shared as a whole although "to be" goes on in two ways.
    """
    rows: list[list[_Path]] = []  # of short paths, each beginning one gram after the one before
    text_of: list[int] = []
    for text, paths in enumerate(texts):
        next_begin = -1
        for path in paths:
            if path.key in settled:
                continue
            if path.begin != next_begin:
                rows.append([])
                text_of.append(text)
            rows[-1].append(path)
            next_begin = path.end - gram_size + 1
    grams = [_hash_windows([path.key for path in row], length) for row in rows]
    joined: list[list[_Path]] = [[] for _ in texts]
    for text, row, paths in zip(text_of, rows, _find_paths(grams, text_of), strict=True):
        for path in paths:
            path.begin, path.end = row[path.begin].begin, row[path.end + length - 2].end
            joined[text].append(path)
    return joined


def _hash_windows(keys: Sequence[int], length: int) -> Hashes:
    """Hash all windows of `length` keys; never 0."""
    words = np.array(keys, np.uint64)
    hashes = np.zeros(max(0, len(words) - length + 1), np.uint64)
    for index in range(length):
        hashes = (hashes ^ words[index : index + len(hashes)]) * _SPREAD
    return np.maximum(hashes, np.uint64(1))


def _disjoint_ranges(paths: Sequence[_Path]) -> list[tuple[int, int]]:
    """Ranges (begin, end) of a text's paths; what still overlaps goes to the earlier one."""
    ranges: list[tuple[int, int]] = []
    done = 0
    for path in paths:
        begin = max(path.begin, done)
        if begin < path.end:
            ranges.append((begin, path.end))
            done = path.end
    return ranges
