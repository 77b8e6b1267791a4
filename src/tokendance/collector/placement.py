"""Placement: where the KV of each token of a request lies, and which tokens it computes.

A request's prompt falls into stretches:

    positions   0 ......... m ..................................................... n
                [ prefix    ][ private ][ run: c c . . . . c c . . . . ][ task       ]
                known KV      own        c corrected, own    . common    own
                                         (the owner: all in the run's pages)

Own tokens go to pages of their own in the order in which they are computed, with room for the
generated tokens behind them. A run goes to pages of its own too, as [common | corrected], so that
its mirrors read one piece.

Where requests take copies (`ReuseRules.copies`, as CacheBlend does), reused tokens get own slots
like all others, and `sources` says from where each is copied before some of them are recomputed:

    positions   0 ......... m ..................................................... n
                [ prefix    ][ private ][ s s s s s s s s s s s s s s  ][ task       ]
                known KV      own        own, with a source              own
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from tokendance.collector.correction import CorrectionPolicy, Mask, Reuse
from tokendance.rounds.segments import EncodedPrompt, Segment
from tokendance.store.entries import (
    Entry,
    PrefixBlock,
    RoundId,
    RunId,
    SegmentCopy,
    Slots,
    exact_length,
    pages_of,
)
from tokendance.store.kv_store import KVStore
from tokendance.store.pages import Holder, PageIds

Positions = npt.NDArray[np.int64]

UNPLACED = -1
# Tokens at the end of a prompt that are computed, unless another of the round has done so. What is
# asked there may be asked of all, in each round, and to reuse it from a round before means that it
# has been read without what is new; most of what that spoils is in the last tokens (docs/log.md).
FRESH_END = 32
# New words, in tokens, that make what stands behind them stale.
_MANY_WORDS = 32
RECOMPUTED_SHARE = 0.15


@dataclass(frozen=True, slots=True)
class ReuseRules:
    """What a request may take from the store, and leave there.

    Attributes:
        prefix: match the prompt's beginning.
        segments: reuse shared segments wherever they stand.
        leave: list what it computes for others.
        copies: take copies of reused segments, of which the pass recomputes some.
        owns_order: compute segments that the store has in another order only.
    """

    prefix: bool
    segments: bool
    leave: bool
    copies: bool = False
    owns_order: bool = False


@dataclass(slots=True)
class Draft:
    """A placement that was worked out and not carried out; valid until the store changes.

    Attributes:
        slots: int32, (prompt and generated tokens,); UNPLACED where the request computes.
        blocks: of the prefix index, matched.
        copies: of shared segments, reused.
        own: positions that go to own pages, in this order.
        runs: for each run it will own, its segments with their positions.
        run_positions: for each run, its positions in storage order.
        num_pages: new pages that it needs.
        num_corrected: tokens of reused segments that it computes afresh.
        num_exact: length of the prompt's beginning that is exact, generated tokens included.
        sources: int32, as long as `slots`: where the KV lies that is copied to each; UNPLACED
            where none is.
    """

    slots: Slots
    blocks: list[PrefixBlock]
    copies: list[SegmentCopy]
    own: Positions
    runs: list[list[tuple[int, Segment]]]
    run_positions: list[Positions]
    num_pages: int
    num_corrected: int
    num_exact: int
    sources: Slots


@dataclass(slots=True)
class Placement:
    """Where the KV of a request lies. The request holds the pages until it is released.

    Attributes:
        slots: int32, (prompt and generated tokens,).
        compute: prompt positions that the request computes, ascending.
        pages: distinct pages of `slots`.
        copies: of shared segments, reused.
        entries: that the request put into the indexes and has yet to compute.
        num_corrected: see `Draft`.
        num_exact: see `Draft`.
        sources: see `Draft`.
        num_copied: tokens of `compute` whose KV is copied and not recomputed in all layers.
    """

    slots: Slots
    compute: Positions
    pages: PageIds
    copies: list[SegmentCopy]
    sources: Slots
    entries: list[Entry] = field(default_factory=list)
    num_corrected: int = 0
    num_exact: int = 0
    num_copied: int = 0

    def reads(self) -> Slots:
        """Slots whose KV the request reads or copies."""
        return np.concatenate([self.slots, self.sources[self.sources != UNPLACED]])


def draft_placement(
    prompt: EncodedPrompt,
    max_new_tokens: int,
    store: KVStore,
    correction: CorrectionPolicy,
    rules: ReuseRules,
    round_id: RoundId,
) -> Draft:
    """Work out a placement. Changes nothing.

    The last token of a prompt is always computed, since its logits are wanted, and the last few are
    unless another of the round has done so.

    Args:
        prompt: at least one token.
        max_new_tokens: how many tokens may be generated.
        store: where to look for KV.
        correction: which tokens of reused segments to compute afresh.
        rules: what the request may take and leave.
        round_id: the round that it is of.
    """
    length = len(prompt)
    slots = np.full(length + max_new_tokens, UNPLACED, np.int32)
    sources = slots.copy()
    blocks: list[PrefixBlock] = []
    num_prefix = 0
    if rules.prefix:
        blocks, matched = store.match_prefix(
            prompt.token_ids, prompt.salt, exact=not rules.segments
        )
        matched = matched[: length - 1]
        num_prefix = len(matched)
        slots[:num_prefix] = matched
    num_exact = min(exact_length(blocks), num_prefix)

    segments = [
        (start, segment)
        for start, segment in prompt.shared_segments()
        if start + len(segment) > num_prefix
    ]
    chosen = choose_copies(segments, store, rules, round_id) if rules.segments else {}
    masks: dict[int, Mask] = {}
    if rules.segments and (chosen or num_exact < num_prefix):
        reuse = describe_reuse(prompt, num_exact, num_prefix, chosen, store)
        asked = {index: segments[index][1] for index in chosen}
        if num_exact < num_prefix:  # its beginning is reused out of context, too
            inexact = np.searchsorted(prompt.starts, num_exact, side="right") - 1
            asked[UNPLACED] = prompt.segments[inexact]
        for index, segment in asked.items():
            mask = correction.choose(reuse, segment)
            if mask is None:
                exact = replace(rules, segments=False)
                return draft_placement(prompt, max_new_tokens, store, correction, exact, round_id)
            masks[index] = mask
    used: list[SegmentCopy] = []
    owned: list[tuple[int, Segment]] = []
    num_corrected = 0
    first_reused = length + max_new_tokens
    for place, (start, segment) in enumerate(segments):
        copy = chosen.get(place)
        if copy is None:
            owned.append((start, segment))
            continue
        afresh = masks[place].copy()
        # Where copies are taken, what to compute again is chosen in the pass.
        fresh = 1 if copy.round_id == round_id or rules.copies else FRESH_END
        afresh[max(0, length - fresh - start) :] = True  # as far as it is in this segment
        new = np.arange(start, start + len(segment)) >= num_prefix
        reused = start + np.flatnonzero(new & ~afresh)
        (sources if rules.copies else slots)[reused] = copy.slots[reused - start]
        num_corrected += int(np.count_nonzero(new & afresh))
        if len(reused):
            used.append(copy)
            first_reused = min(first_reused, int(reused[0]))
    num_corrected += num_recomputed(sources)
    if num_exact == num_prefix:
        num_exact = first_reused

    runs = join_runs(owned) if rules.leave and rules.segments else []
    unplaced = slots == UNPLACED
    in_run = np.zeros(len(slots), np.bool_)
    run_positions: list[Positions] = []
    for run in runs:
        positions = _storage_order(run, correction)
        positions = positions[unplaced[positions]]
        in_run[positions] = True
        run_positions.append(positions)
    own = np.flatnonzero(unplaced & ~in_run)
    num_pages = store.num_pages([own, *run_positions])
    return Draft(
        slots,
        blocks,
        used,
        own,
        runs,
        run_positions,
        num_pages,
        num_corrected,
        num_exact,
        sources,
    )


def num_recomputed(sources: Slots) -> int:
    """How many of the tokens that have a source are recomputed: 15%, as CacheBlend has it."""
    return math.ceil(RECOMPUTED_SHARE * np.count_nonzero(sources != UNPLACED))


def kept_pages(draft: Draft, store: KVStore) -> PageIds:
    """Pages that a draft reads, runs as a whole; they must not be evicted to make room for it."""
    read = pages_of(draft.slots[draft.slots != UNPLACED], store.pool.page_size)
    pages = np.concatenate([read, *(copy.pages for copy in draft.copies)])
    return np.unique(pages).astype(np.int32)


def place(
    prompt: EncodedPrompt, draft: Draft, store: KVStore, rules: ReuseRules, round_id: RoundId
) -> Placement | None:
    """Carry out a draft: hold what it reads, allocate what it computes, list what it will leave.

    Returns:
        None, and the store as it was but for evicted entries, if there is no room now.
    """
    slots = draft.slots
    length = len(prompt)
    compute = np.flatnonzero(slots[:length] == UNPLACED)
    kept = kept_pages(draft, store)
    if not store.can_make_room(draft.num_pages, kept):
        return None
    store.pool.retain(kept, Holder.REQUEST)
    if not store.make_room(draft.num_pages):
        store.pool.release(kept, Holder.REQUEST)
        return None
    parts = [*draft.run_positions, draft.own]
    taken, pages = store.take_slots(parts)
    for positions, fresh in zip(parts, taken, strict=True):
        slots[positions] = fresh

    placement = Placement(
        slots,
        compute,
        np.union1d(kept, pages).astype(np.int32),
        draft.copies,
        draft.sources,
        num_corrected=draft.num_corrected,
        num_exact=draft.num_exact,
        num_copied=int(np.count_nonzero(draft.sources != UNPLACED)) - num_recomputed(draft.sources),
    )
    store.count_reuse(draft.copies, round_id)
    store.touch(draft.copies)
    if rules.leave:
        for run in draft.runs:
            placement.entries += store.put_run(
                [(segment.hash, slots[start : start + len(segment)]) for start, segment in run],
                round_id,
            )
        placement.entries += store.put_prefix(
            prompt.token_ids, slots[:length], prompt.salt, draft.num_exact
        )
    return placement


def choose_copies(
    segments: Sequence[tuple[int, Segment]], store: KVStore, rules: ReuseRules, round_id: RoundId
) -> dict[int, SegmentCopy]:
    """Choose a copy for each segment that has one, by its place in `segments`.

    A run whose segments stand in the request's order comes first, and of those the one that
    covers most tokens: inside one run all distances are the owner's, and one offset serves all
    of it. What is left takes the newest copy, unless the request is to own its order.
    """
    by_run: dict[RunId, dict[int, list[SegmentCopy]]] = {}
    for place_, usable in usable_copies(segments, store, round_id):
        for copy in usable:
            by_run.setdefault(copy.run, {}).setdefault(place_, []).append(copy)

    ranked: list[tuple[bool, int, RunId, dict[int, SegmentCopy]]] = []
    for run, found in by_run.items():
        in_order: dict[int, SegmentCopy] = {}
        last = -1
        for place_, copies in found.items():
            following = [copy for copy in copies if copy.index > last]
            if following:
                in_order[place_] = min(following, key=lambda copy: copy.index)
                last = in_order[place_].index
        covered = sum(len(segments[place_][1]) for place_ in in_order)
        ranked.append((len(in_order) == len(found), covered, run, in_order))
    ranked.sort(key=lambda item: item[:3], reverse=True)

    chosen: dict[int, SegmentCopy] = {}
    for whole, _, _, in_order in ranked:
        if whole or not rules.owns_order:
            for place_, copy in in_order.items():
                chosen.setdefault(place_, copy)
    if not rules.owns_order:
        for _, found in sorted(by_run.items(), reverse=True):
            for place_, copies in found.items():
                chosen.setdefault(place_, copies[-1])
    return dict(sorted(chosen.items()))


def usable_copies(
    segments: Sequence[tuple[int, Segment]], store: KVStore, round_id: RoundId
) -> Iterator[tuple[int, Sequence[SegmentCopy]]]:
    """Copies that a request may take, by the places of their segments.

    Behind segments that are new in this round, copies of earlier rounds are stale: who computed
    them had not read these. What a host asks in the same words in each round, behind what was said
    in it, would be asked by one who has heard nothing of that. A few new words, as those that say
    what time it is, matter little to all that follows.
    """
    num_new = 0
    for place_, (_, segment) in enumerate(segments):
        copies = store.copies(segment.hash, round_id)
        if all(copy.round_id == round_id for copy in copies):
            num_new += len(segment)
        if num_new >= _MANY_WORDS:
            copies = [copy for copy in copies if copy.round_id == round_id]
        yield place_, copies


def describe_reuse(
    prompt: EncodedPrompt,
    num_exact: int,
    num_prefix: int,
    chosen: Mapping[int, SegmentCopy],
    store: KVStore,
) -> Reuse:
    """Say what is known of a reuse before the pass.

    Args:
        prompt: that reuses.
        num_exact: length of its matched beginning that is exact.
        num_prefix: length of its matched beginning.
        chosen: copies of shared segments after it, by their place among those.
        store: where they lie.
    """
    shared = prompt.shared_segments()
    inherited = [start for start, part in shared if num_exact < start + len(part) <= num_prefix]
    later = [start for start, part in shared if start + len(part) > num_prefix]
    places = sorted(chosen)
    copies = [chosen[place_] for place_ in places]
    in_order = len({copy.run for copy in copies}) <= 1 and all(
        one.index < other.index for one, other in itertools.pairwise(copies)
    )
    starts = inherited + [later[place_] for place_ in places]
    first = starts[0] if starts else num_exact
    num_private = first - sum(len(part) for start, part in shared if start < first)
    if copies:
        # Whatever shifts the owner's copy against this one is private text of one of them.
        shift = int(store.slot_position[copies[0].slots[0]]) - later[places[0]]
        num_private += max(0, shift)
    return Reuse(in_order, num_private, len(starts))


def join_runs(owned: Sequence[tuple[int, Segment]]) -> list[list[tuple[int, Segment]]]:
    """Join segments that follow each other without a gap into runs."""
    runs: list[list[tuple[int, Segment]]] = []
    for start, segment in owned:
        if runs and runs[-1][-1][0] + len(runs[-1][-1][1]) == start:
            runs[-1].append((start, segment))
        else:
            runs.append([(start, segment)])
    return runs


def _storage_order(run: Sequence[tuple[int, Segment]], correction: CorrectionPolicy) -> Positions:
    """Positions of a run as they are stored: common tokens, then corrected ones."""
    positions = np.concatenate([np.arange(start, start + len(segment)) for start, segment in run])
    corrected = np.concatenate([correction.layout(segment) for _, segment in run])
    return np.concatenate([positions[~corrected], positions[corrected]])
