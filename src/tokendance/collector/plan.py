"""The plan of a request: what it takes, owns, corrects and computes, before it has any memory.

A prompt falls into spans of positions, each of which is had in one way:

    position  0         16      24                     64        72
              |=========|#######|ccc.........c|OOOOOOOOO|########|______|
              prefix     own     reused, d=-5  owned     own      answer

    =  prefix     KV of an equal beginning is read
    #  own        computed, for this request and those that begin equally
    O  owned      computed, and published as a run for all who read these segments
    .  reused     KV of a cached segment is read where it lies, at offset d
    c  corrected  cached, too, but computed afresh
    s  copied     cached, and copied to memory of its own (`bench.pic`, as others do it)
    _  answer     room for generated tokens

The plan is made of hashes, lengths and an index that is asked; it changes nothing and knows no
memory. `engine.allocator` makes slots of it, and another engine may make pages.

An owned run is laid out as [common | corrected], so that its mirrors read one piece.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from tokendance.collector.co_owners import LentTexts, find_lent
from tokendance.collector.correction import (
    NO_OPENING,
    CorrectionPolicy,
    Mask,
    Reuse,
    stored_apart,
)
from tokendance.collector.owners import Lenders
from tokendance.collector.sources import (
    KVIndex,
    choose_sources,
    describe_reuse,
    in_place,
    read_before,
    reuse_like,
)
from tokendance.rounds.segments import EncodedPrompt, Segment, SegmentHash
from tokendance.store.entries import CachedSegment, PrefixPage, RoundId, exact_length

Positions = npt.NDArray[np.int64]

# Hosts often end every prompt with the same question. KV of that question from an earlier round
# was computed before this round's messages existed, so reusing it biases the answer, most of all in
# the last tokens (docs/log.md). So many are computed afresh, unless another request of this round
# already has.
FRESH_END = 32
_MOST_ANEW = 16  # tokens
_DRAWING_COLUMNS = 72


class Role(IntEnum):
    """How the KV of a position is had; see the drawing of this module."""

    PREFIX = 0
    OWN = 1
    OWNED = 2
    REUSED = 3
    CORRECTED = 4
    COPIED = 5
    ANSWER = 6


_MARKS = "=#O.cs_"  # by role
_WITH_SOURCE = frozenset({Role.REUSED, Role.CORRECTED, Role.COPIED})


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive positions that are had in one way.

    Attributes:
        start: first position.
        stop: position after the last.
        role: how.
        source: the cached segment that is reused, corrected or copied.
        offset: of the request's positions against those of the source's owner.
    """

    start: int
    stop: int
    role: Role
    source: CachedSegment | None = None
    offset: int = 0

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class SegmentUse:
    """A cached segment that a request reuses, in part at least.

    Attributes:
        start: position of its first token in the request's prompt.
        source: where it is cached.
    """

    start: int
    source: CachedSegment

    @property
    def offset(self) -> int:
        """Of the request's positions against those of the source's owner."""
        return self.start - self.source.start

    @property
    def stop(self) -> int:
        """Position after its last token."""
        return self.start + self.source.num_tokens


@dataclass(frozen=True, slots=True, eq=False)
class OwnedRun:
    """Consecutive shared segments that the request computes for all.

    Attributes:
        segments: position, hash and number of tokens of each.
        layout: its positions as they are stored, without those that the prefix has: common
            tokens, then those that mirrors correct.
        num_common: of those, how many are common.
        context: all segments of the prompt up to the end of the run, if the request guards its
            text: only those may read one of the run who have read all before it. Else nothing.
    """

    segments: tuple[tuple[int, SegmentHash, int], ...]
    layout: Positions
    num_common: int
    context: tuple[SegmentHash, ...] = ()


@dataclass(frozen=True, slots=True)
class ReuseRules:
    """What a request may take from the index, and leave there.

    Attributes:
        prefix: match the prompt's beginning.
        segments: reuse shared segments wherever they stand.
        publish: let others reuse what it computes.
        owns_order: compute segments that are cached in another order only.
        fresh_end: last tokens of a prompt that are computed even if they are cached, unless this
            round has computed them.
        guarded: see `engine.request.Request`. Of what it computes, others may reuse what stands
            before its first private token, if they have read the same before it.
        lenders: of its run, if it has co-owners.
    """

    prefix: bool
    segments: bool
    publish: bool
    owns_order: bool = False
    fresh_end: int = FRESH_END
    guarded: bool = False
    lenders: Lenders | None = None


@dataclass(frozen=True, slots=True, eq=False)
class RequestPlan:
    """What a request takes, owns, corrects and computes; valid until the index changes.

    Attributes:
        num_prompt: tokens of the prompt.
        roles: int8, a `Role` for each position of prompt and answer.
        prefix: pages of the matched beginning; not all of the last may be read.
        uses: cached segments behind it of which something is reused or copied, in their order.
        runs: that the request owns.
        publish: whether others may reuse what it computes.
        num_reused: prompt tokens that it does not compute (in all layers).
        num_corrected: cached tokens that it computes afresh.
        num_exact: length of its beginning that holds no KV of another context, answer included.
        guarded: see `engine.request.Request`.
        lent: texts of co-owners of its run; None without.
    """

    num_prompt: int
    roles: npt.NDArray[np.int8]
    prefix: tuple[PrefixPage, ...]
    uses: tuple[SegmentUse, ...]
    runs: tuple[OwnedRun, ...]
    publish: bool
    num_reused: int
    num_corrected: int
    num_exact: int
    guarded: bool = False
    lent: LentTexts | None = None

    @property
    def num_approximate(self) -> int:
        """Prompt tokens whose KV was computed in another context, or is by a co-owner."""
        roles = self.roles[self.num_exact : self.num_prompt]
        by_others = (
            0 if self.lent is None else sum(map(len, self.lent.divide(self.lent.common)[1:]))
        )
        return by_others + int(((roles == Role.PREFIX) | (roles == Role.REUSED)).sum())

    @property
    def compute(self) -> Positions:
        """Prompt positions that take part in the request's forward passes, ascending."""
        roles = self.roles[: self.num_prompt]
        return np.flatnonzero((roles != Role.PREFIX) & (roles != Role.REUSED))

    @property
    def parts(self) -> list[Positions]:
        """Positions that need memory: each run's by itself, then all others; as they are stored."""
        is_own = (self.roles != Role.PREFIX) & (self.roles != Role.REUSED)
        is_own &= self.roles != Role.OWNED
        return [*(run.layout for run in self.runs), np.flatnonzero(is_own)]

    @property
    def spans(self) -> tuple[Span, ...]:
        """All positions in order, cut where role or source change."""
        cuts = (np.flatnonzero(self.roles[1:] != self.roles[:-1]) + 1).tolist()
        uses = {use.start: use for use in self.uses}
        edges = sorted({0, *cuts, *uses, len(self.roles)})
        spans: list[Span] = []
        use: SegmentUse | None = None
        for start, stop in itertools.pairwise(edges):
            role = Role(self.roles[start])
            use = uses.get(start, use)
            if role in _WITH_SOURCE and use is not None and start < use.stop:
                spans.append(Span(start, stop, role, use.source, use.offset))
            elif spans and spans[-1].role is role and spans[-1].source is None:
                spans[-1] = Span(spans[-1].start, stop, role)  # a use may begin inside the prefix
            else:
                spans.append(Span(start, stop, role))
        return tuple(spans)

    def __str__(self) -> str:
        """Draw it, as in the drawing of this module."""
        scale = min(1.0, _DRAWING_COLUMNS / len(self.roles))
        bar, ticks, offsets = "", "", ""
        previous: Span | None = None
        for span in self.spans:
            if previous is None or _begins_stretch(previous, span):
                ticks = ticks.ljust(len(bar)) + f"{span.start} "
                if span.source is not None:
                    offsets = offsets.ljust(len(bar)) + f"d={span.offset:+d} "
                bar += "|"
            bar += _MARKS[span.role] * max(1, round(len(span) * scale))
            previous = span
        figures = (
            f"{self.num_prompt} prompt tokens: {self.num_prompt - self.num_reused} computed, "
            f"{self.num_corrected} of them corrected, {self.num_reused} reused"
        )
        return "\n".join(line.rstrip() for line in (figures, ticks, bar + "|", offsets) if line)


def _begins_stretch(previous: Span, span: Span) -> bool:
    if span.source is not None or previous.source is not None:
        return span.source is not previous.source
    return span.role is not previous.role


def plan_request(
    prompt: EncodedPrompt,
    max_new_tokens: int,
    index: KVIndex,
    policy: CorrectionPolicy,
    rules: ReuseRules,
    round_id: RoundId,
) -> RequestPlan:
    """Plan a request. Changes nothing.

    The last token of a prompt is always computed, since its logits are wanted.

    Args:
        prompt: at least one token.
        max_new_tokens: how many tokens may be generated.
        index: says what is cached.
        policy: which tokens of reused segments to compute afresh.
        rules: what the request may take and leave.
        round_id: the round that it is of.
    """
    length = len(prompt)
    pages: list[PrefixPage] = []
    if rules.prefix:
        pages = list(index.match_prefix(prompt.prefix_hashes, exact=not rules.segments))
    num_prefix = min(sum(page.num_tokens for page in pages), length - 1)
    num_exact = min(exact_length(pages), num_prefix)

    segments = [
        (start, segment)
        for start, segment in prompt.shared_segments()
        if start + len(segment) > num_prefix
    ]
    chosen: dict[int, CachedSegment] = {}
    if rules.segments:
        chosen = choose_sources(prompt, segments, index, round_id, owns_order=rules.owns_order)
    # The end of a beginning that all have fills no page. It is computed, or all behind it would
    # pass for KV of another context. (Where pages are larger, that takes longer than it is worth.)
    anew = [
        at
        for at in in_place(prompt, segments, chosen)
        if segments[at][0] + len(segments[at][1]) - num_prefix < _MOST_ANEW
    ]
    for at in anew:
        del chosen[at]
    reads_inexact_prefix = rules.segments and num_exact < num_prefix
    masks: dict[int, Mask] = {}
    if chosen or reads_inexact_prefix:
        reuse = describe_reuse(prompt, num_exact, num_prefix, chosen, isolated=rules.guarded)
        num_read = read_before([segments[at] for at in chosen], num_prefix)
        wanted = {
            at: policy.choose(reuse, segments[at][1], num)
            for at, num in zip(chosen, num_read, strict=True)
        }
        if not chosen:  # its beginning is all that it reuses
            wanted[-1] = policy.choose(reuse, _segment_at(prompt, num_exact), NO_OPENING)
        if any(mask is None for mask in wanted.values()):
            exact = replace(rules, segments=False)
            return plan_request(prompt, max_new_tokens, index, policy, exact, round_id)
        masks = {at: mask for at, mask in wanted.items() if mask is not None}

    roles = np.full(length + max_new_tokens, Role.ANSWER, np.int8)
    roles[:length] = Role.OWN
    roles[:num_prefix] = Role.PREFIX
    publishes_runs = rules.publish and rules.segments
    num_public = prompt.num_public if rules.guarded else length
    owned: list[tuple[int, Segment]] = []
    uses: list[SegmentUse] = []
    for at, (start, segment) in enumerate(segments):
        if at in anew:
            continue
        first, stop = max(start, num_prefix), start + len(segment)
        source = chosen.get(at)
        if source is None:
            if publishes_runs and stop <= num_public:
                owned.append((start, segment))
                roles[first:stop] = Role.OWNED
            continue
        fresh_end = 1 if source.round_id == round_id else rules.fresh_end
        afresh = masks[at].copy()
        afresh[max(0, length - fresh_end - start) :] = True  # as far as it is in this segment
        roles[first:stop] = np.where(afresh[first - start :], Role.CORRECTED, Role.REUSED)
        if not afresh[first - start :].all():
            uses.append(SegmentUse(start, source))
    counts = np.bincount(roles, minlength=len(Role))
    runs = _owned_runs(prompt, owned, policy, num_prefix, guarded=rules.guarded)
    lent = _lent(runs, rules.lenders, index, length)
    first_other = int(np.argmax(roles == Role.REUSED)) if uses else len(roles)
    if lent is not None:
        first_other = min(first_other, lent.begin)
    return RequestPlan(
        length,
        roles,
        tuple(pages),
        tuple(uses),
        tuple(runs),
        rules.publish,
        num_reused=int(counts[Role.PREFIX] + counts[Role.REUSED]),
        num_corrected=int(counts[Role.CORRECTED]),
        num_exact=first_other if num_exact == num_prefix else num_exact,
        guarded=rules.guarded,
        lent=lent,
    )


def _segment_at(prompt: EncodedPrompt, position: int) -> Segment:
    return prompt.segments[int(np.searchsorted(prompt.starts, position, side="right")) - 1]


def _owned_runs(
    prompt: EncodedPrompt,
    owned: Sequence[tuple[int, Segment]],
    policy: CorrectionPolicy,
    num_prefix: int,
    *,
    guarded: bool,
) -> list[OwnedRun]:
    """Join segments that follow each other without a gap into runs, and lay them out."""
    runs: list[list[tuple[int, Segment]]] = []
    for start, segment in owned:
        if runs and runs[-1][-1][0] + len(runs[-1][-1][1]) == start:
            runs[-1].append((start, segment))
        else:
            runs.append([(start, segment)])
    if not runs:
        return []
    reuse = reuse_like(prompt, runs)
    return [
        OwnedRun(
            tuple((start, segment.hash, len(segment)) for start, segment in run),
            *_layout(run, policy, reuse, num_prefix),
            _context(prompt, run) if guarded else (),
        )
        for run in runs
    ]


def _context(prompt: EncodedPrompt, run: Sequence[tuple[int, Segment]]) -> tuple[SegmentHash, ...]:
    last, _ = run[-1]
    return tuple(
        segment.hash
        for start, segment in zip(prompt.starts, prompt.segments, strict=True)
        if start <= last
    )


def _layout(
    run: Sequence[tuple[int, Segment]], policy: CorrectionPolicy, reuse: Reuse, num_prefix: int
) -> tuple[Positions, int]:
    """A run's positions as they are stored, and how many of them are common."""
    positions = np.arange(run[0][0], run[-1][0] + len(run[-1][1]))
    corrected = np.concatenate([stored_apart(policy, reuse, segment) for _, segment in run])
    is_new = positions >= num_prefix
    common, apart = positions[is_new & ~corrected], positions[is_new & corrected]
    return np.concatenate([common, apart]), len(common)


def _lent(
    runs: Sequence[OwnedRun], lenders: Lenders | None, index: KVIndex, length: int
) -> LentTexts | None:
    """What co-owners lend; only where a request owns what it was thought to own.

    The last token of its prompt, of `length` tokens, is its own: its logits are wanted.
    """
    if len(runs) != 1 or lenders is None:
        return None
    (run,) = runs
    if tuple(segment for _, segment, _ in run.segments) != lenders.segments:
        return None
    begin, _, _ = run.segments[0]
    if len(run.layout) < sum(num_tokens for _, _, num_tokens in run.segments):
        return None  # its prefix has some of it
    common = run.layout[: run.num_common]
    return find_lent(begin, common[common < length - 1], lenders.texts, index)
