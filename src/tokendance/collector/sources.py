"""Sources: which cached segments a request reuses, and what is known of that reuse beforehand."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from tokendance.collector.correction import Reuse
from tokendance.rounds.segments import EncodedPrompt, PrefixHashes, Segment, SegmentHash
from tokendance.store.entries import CachedSegment, PrefixPage, RoundId, RunId

# New tokens of a round that make what stands behind them in earlier rounds stale.
_MANY_NEW_TOKENS = 32


class KVIndex(Protocol):
    """What the collector asks: where KV is cached, by hashes. Nothing changes by asking."""

    def match_prefix(self, text: PrefixHashes, *, exact: bool) -> Sequence[PrefixPage]:
        """Find the longest known beginning of a text; `exact` leaves out reused KV."""
        ...

    def cached(self, segment: SegmentHash, round_id: RoundId) -> Sequence[CachedSegment]:
        """Where a round may reuse a segment from, the newest last."""
        ...


class _Reader:
    """Says what a prompt may reuse of what others guard: KV of text that it has read itself.

    That holds if all that its owner had read stands in the prompt before it.
    """

    def __init__(self, segments: Sequence[tuple[int, Segment]]) -> None:
        """Take all shared segments of a prompt."""
        self._nowhere = len(segments)  # behind all places, of which a segment may have several
        self._places: dict[SegmentHash, int] = {}
        for place, (_, segment) in enumerate(segments):
            self._places.setdefault(segment.hash, place)
        # By owner: the place behind which the prompt has read so many of the owner's segments.
        self._read_at: dict[int, list[int]] = {}

    def may_read(self, source: CachedSegment, place: int) -> bool:
        if source.num_behind == 0:
            return True
        read_at = self._read_at.get(id(source.context))
        if read_at is None:
            places = (self._places.get(segment, self._nowhere) for segment in source.context)
            read_at = self._read_at[id(source.context)] = list(itertools.accumulate(places, max))
        return read_at[source.num_behind - 1] < place


def usable_sources(
    prompt: EncodedPrompt,
    segments: Sequence[tuple[int, Segment]],
    index: KVIndex,
    round_id: RoundId,
) -> Iterator[Sequence[CachedSegment]]:
    """For each of the last shared segments of a prompt, where a round may reuse it from.

    Behind segments that are new in this round, KV of earlier rounds is stale: who computed it had
    not read these. What a host asks in the same words in each round, behind what was said in it,
    would be asked by one who has heard nothing of that. A few new words, as those that say what
    time it is, matter little to all that follows.
    """
    num_new = 0
    shared = prompt.shared_segments()
    reader = _Reader(shared)
    for place, (_, segment) in enumerate(segments, len(shared) - len(segments)):
        sources = [
            source
            for source in index.cached(segment.hash, round_id)
            if reader.may_read(source, place)
        ]
        if all(source.round_id == round_id for source in sources):
            num_new += len(segment)
        if num_new >= _MANY_NEW_TOKENS:
            sources = [source for source in sources if source.round_id == round_id]
        yield sources


def choose_sources(
    prompt: EncodedPrompt,
    segments: Sequence[tuple[int, Segment]],
    index: KVIndex,
    round_id: RoundId,
    *,
    owns_order: bool,
) -> dict[int, CachedSegment]:
    """Choose a source for each of a prompt's last shared segments, by its index in `segments`.

    A run whose segments stand in the request's order comes first, and of those the one that
    covers most tokens: inside one run all distances are the owner's, and one offset serves all
    of it. What is left takes the newest source, unless the request is to own its order.
    """
    by_run: dict[RunId, dict[int, list[CachedSegment]]] = {}
    for at, sources in enumerate(usable_sources(prompt, segments, index, round_id)):
        for source in sources:
            by_run.setdefault(source.run, {}).setdefault(at, []).append(source)

    ranked: list[tuple[bool, int, RunId, dict[int, CachedSegment]]] = []
    for run, of_run in by_run.items():
        in_order: dict[int, CachedSegment] = {}
        last = -1
        for at, sources in of_run.items():
            following = [source for source in sources if source.index > last]
            if following:
                in_order[at] = min(following, key=lambda source: source.index)
                last = in_order[at].index
        covered = sum(len(segments[at][1]) for at in in_order)
        ranked.append((len(in_order) == len(of_run), covered, run, in_order))
    ranked.sort(key=lambda item: item[:3], reverse=True)

    chosen: dict[int, CachedSegment] = {}
    for is_whole, _, _, in_order in ranked:
        if is_whole or not owns_order:
            for at, source in in_order.items():
                chosen.setdefault(at, source)
    if not owns_order:
        for _, of_run in sorted(by_run.items(), reverse=True):
            for at, sources in of_run.items():
                chosen.setdefault(at, sources[-1])
    return dict(sorted(chosen.items()))


def in_place(
    prompt: EncodedPrompt,
    segments: Sequence[tuple[int, Segment]],
    chosen: Mapping[int, CachedSegment],
) -> list[int]:
    """Find the segments before all private text that stand where they did in their owner's prompt.

    That what stands before them is the same there is not looked at, but taken for granted.

    Args:
        prompt: that reads them.
        segments: shared segments of it, in order.
        chosen: their sources, by index.

    Returns:
        Indices, in order.
    """
    return [
        at
        for at, source in sorted(chosen.items())
        if segments[at][0] + len(segments[at][1]) <= prompt.num_public
        and source.start == segments[at][0]
    ]


def read_before(reused: Sequence[tuple[int, Segment]], begin: int) -> Iterator[int]:
    """For each segment that a request reuses, the tokens that it reuses before it.

    Args:
        reused: segments with their positions, in order, which end behind `begin`.
        begin: where to count from: what stands before is the request's own.

    Returns:
        See `num_read` of `CorrectionPolicy.choose`.
    """
    num_read = 0
    for start, segment in reused:
        first = max(start, begin)
        yield num_read - (first - start)
        num_read += start + len(segment) - first


def describe_reuse(
    prompt: EncodedPrompt,
    num_exact: int,
    num_prefix: int,
    chosen: Mapping[int, CachedSegment],
    *,
    isolated: bool = False,
) -> Reuse:
    """Say what is known of a reuse before the pass.

    Args:
        prompt: that reuses.
        num_exact: length of its matched beginning that is exact.
        num_prefix: length of its matched beginning.
        chosen: sources of shared segments after it, by their index among those.
        isolated: whether it guards its private text.
    """
    shared = prompt.shared_segments()
    inherited = [at for at in shared if num_exact < at[0] + len(at[1]) <= num_prefix]
    later = [at for at in shared if at[0] + len(at[1]) > num_prefix]
    exact = set(in_place(prompt, later, chosen))
    indices = [at for at in sorted(chosen) if at not in exact] or sorted(chosen)
    sources = [chosen[at] for at in indices]
    in_order = len({source.run for source in sources}) <= 1 and all(
        source.index < following.index for source, following in itertools.pairwise(sources)
    )
    reused = inherited + [later[at] for at in indices]
    first = reused[0][0] if reused else num_exact
    num_private = first - sum(len(part) for start, part in shared if start < first)
    if sources:
        # Whatever shifts the owner's segment against this one is private text of one of them.
        num_private += max(0, sources[0].start - later[indices[0]][0])
    num_tokens = sum(len(part) for _, part in reused)
    return Reuse(
        in_order,
        num_private,
        len(reused),
        num_tokens,
        len(inherited),
        isolated,
        goes_on=num_exact < num_prefix,
    )


def reuse_like(prompt: EncodedPrompt, runs: Sequence[Sequence[tuple[int, Segment]]]) -> Reuse:
    """Say what a mirror would reuse whose prompt is like an owner's.

    Args:
        prompt: of the owner.
        runs: that it owns, at least one: segments with their positions.
    """
    shared = prompt.shared_segments()
    # What stands before all private text is everybody's exact beginning. A prompt without private
    # text is a neutral owner's.
    has_private = prompt.num_public < len(prompt)
    first = prompt.num_public if has_private else 0
    behind = [(start, part) for start, part in shared if start >= first] or shared
    runs = [run for run in runs if run[0][0] >= behind[0][0]]
    return Reuse(
        in_order=len(runs) == 1,
        num_before=max(0, behind[0][0] - sum(len(part) for at, part in shared if at < first)),
        num_blocks=len(behind),
        num_tokens=sum(len(part) for _, part in behind),
        num_inherited=len(behind) - sum(map(len, runs)),
        isolated=not has_private,
    )
