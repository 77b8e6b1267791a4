"""The plan of a step: which rows read which ranges of slots.

The contexts of all requests are cut into slot ranges, wherever some request begins or ends to read
consecutive slots, or its offset changes. So a request reads a range whole or not at all:

    slots      0        40       70             120       200   230   250
    agent A    [----- d=0 -----------------------]         [own]
    agent B    [----- d=7 ------]                                [own]
    agent C             [----- d=-3 -------------]                     [own]
    ranges     [  A, B  ][A,B,C ][     A, C      ]         [ A ] [ B ] [ C ]

Ranges with the same readers form a read group, and the rows of its readers are stacked: each key
is read once for all of them. A row sees only keys at or before its own position, and within the
window of the layer. Positions ascend inside a range, so the keys that a row sees there are
`key_begin` to `key_end` - 1 of the range.

This file deals in numpy integers; what is done with them is up to the backend.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokendance.attention.interface import IntArray, PackedBatch, PackedRequest

Int64Array = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]

# A group of fewer rows than this is cut at multiples of so many positions, so that threads share a
# long context. Ranges are cut there, too. Neither depends on the number of threads, nor on which
# pages a request that runs alone happens to have, and so its sums do not, either.
_FEW_ROWS = 64
SPAN = 1024


@dataclass(frozen=True, slots=True, eq=False)
class ReadGroup:
    """R rows that read the same P ranges of slots.

    Attributes:
        rows: int64 (R,), of the batch, distinct.
        slot_begin: int64 (P,), first slot of each range.
        slot_end: int64 (P,), slot after its last.
        rotations: int32 (P, R), index of the offset at which a row reads a range.
        key_begin: int32 (P, R), by window: of a range's keys, a row sees those from here on ...
        key_end: int32 (P, R), ... and before this.
    """

    rows: IntArray
    slot_begin: IntArray
    slot_end: IntArray
    rotations: IntArray
    key_begin: dict[int, IntArray]
    key_end: IntArray


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """All read groups of a step, one after the other. A row's result is the sum of its groups'.

    A read is a row of a group at one of its ranges; reads are ordered group by group, range by
    range, row by row. `ReadGroup` says what the arrays mean.

    Attributes:
        offsets: int64, distinct; [0] is 0. Rotation i is by offset i.
        row_indptr: int64 (groups + 1,), where each group's rows begin in `rows`.
        range_indptr: int64 (groups + 1,), where its ranges begin in `slot_begin` and `slot_end`.
        rows: int64, group by group.
        slot_begin: int64, group by group.
        slot_end: int64, likewise.
        rotations: int32 (reads,).
        key_end: int32 (reads,).
        key_begin: int32 (reads,), by window.
    """

    offsets: Int64Array
    row_indptr: Int64Array
    range_indptr: Int64Array
    rows: Int64Array
    slot_begin: Int64Array
    slot_end: Int64Array
    rotations: Int32Array
    key_end: Int32Array
    key_begin: dict[int, Int32Array]

    def read_groups(self) -> Iterator[ReadGroup]:
        """The groups as objects, for those who take them one by one."""
        first_read = 0
        indptr = np.stack((self.row_indptr, self.range_indptr), axis=1).tolist()
        for (row, slot_range), (next_row, next_range) in itertools.pairwise(indptr):
            shape = (next_range - slot_range, next_row - row)
            reads = slice(first_read, first_read + shape[0] * shape[1])
            first_read = reads.stop
            yield ReadGroup(
                self.rows[row:next_row],
                self.slot_begin[slot_range:next_range],
                self.slot_end[slot_range:next_range],
                self.rotations[reads].reshape(shape),
                {window: begin[reads].reshape(shape) for window, begin in self.key_begin.items()},
                self.key_end[reads].reshape(shape),
            )


def make_plan(batch: PackedBatch, windows: Iterable[int] = ()) -> Plan:
    """Cut the contexts of a batch into slot ranges, and stack their readers.

    `windows` are those of the model's layers that have one, in tokens.
    """
    if batch.alone is not None:
        return _plan_alone(batch.alone, windows)
    entries = _cut_at_each_other(_readings(batch))
    offsets, rotations = _number_offsets(entries.offset)
    num_rows = np.array([len(request.positions) for request in batch.requests])
    first_rows = np.array([request.first_row for request in batch.requests])
    positions = np.concatenate([request.positions for request in batch.requests]).astype(np.int64)

    # One line per slot range: the entry of the first of its readers stands for it.
    by_readers = _group_by_readers(entries)
    readers = np.repeat(np.arange(len(by_readers)), [len(ranges) for ranges in by_readers])
    num_readers = np.array([ranges.shape[1] for ranges in by_readers])[readers]
    by_range = np.concatenate([ranges.ravel() for ranges in by_readers])
    first_reader = np.cumsum(num_readers) - num_readers
    leader = by_range[first_reader]
    rows_of_readers = np.array(
        [num_rows[entries.request[ranges[0]]].sum() for ranges in by_readers]
    )
    position = batch.slot_position[entries.begin[leader]]
    span = np.where(rows_of_readers[readers] < _FEW_ROWS, position // SPAN, 0)
    # By offset first, so that a rotation serves many ranges; then as the owner counts.
    order = np.lexsort((position, rotations[leader], span, readers))
    leader, num_readers = leader[order], num_readers[order]
    new_group = (np.diff(readers[order]) != 0) | (np.diff(span[order]) != 0)
    range_indptr = np.concatenate(([0], np.flatnonzero(new_group) + 1, [len(order)]))
    slot_begin, slot_end = entries.begin[leader], entries.end[leader]

    # One line per range and request that reads it ...
    reader = by_range[np.repeat(first_reader[order], num_readers) + aranges(num_readers)]
    counts = num_rows[entries.request[reader]]
    # ... and one per read.
    rows = np.repeat(first_rows[entries.request[reader]], counts) + aranges(counts)
    slot_range = np.repeat(np.repeat(np.arange(len(order)), num_readers), counts)
    entry = np.repeat(reader, counts)
    at = positions[rows] - entries.offset[entry]  # a row's position as the range's owner counts

    # A group's rows are those that read its first range.
    num_reads = np.bincount(slot_range, minlength=len(order))
    num_group_rows = num_reads[range_indptr[:-1]]
    first_read = (np.cumsum(num_reads) - num_reads)[range_indptr[:-1]]
    group_rows = rows[np.repeat(first_read, num_group_rows) + aranges(num_group_rows)]

    def num_keys_until(at: IntArray) -> Int32Array:
        return _num_keys_until(at, slot_range, slot_begin, slot_end, batch.slot_position)

    return Plan(
        offsets=offsets.astype(np.int64, copy=False),
        row_indptr=np.concatenate(([0], np.cumsum(num_group_rows))),
        range_indptr=range_indptr,
        rows=group_rows.astype(np.int64, copy=False),
        slot_begin=slot_begin,
        slot_end=slot_end,
        rotations=rotations[entry].astype(np.int32),
        key_end=num_keys_until(at),
        key_begin={window: num_keys_until(at - window) for window in windows},
    )


def _plan_alone(request: PackedRequest, windows: Iterable[int]) -> Plan:
    """The same plan in a sixth of the time, for who runs alone and reads nothing of others.

    It reads each slot once, where it stood when it was written, so a range begins where slots are
    not consecutive, and no reader has to be found.
    """
    num_rows, num_keys = len(request.positions), int(request.positions[-1]) + 1
    slots = request.slots[:num_keys]
    positions = request.positions.astype(np.int64)
    spans = np.arange(0, num_keys, SPAN)
    jumps = np.flatnonzero(slots[1:] != slots[:-1] + 1) + 1
    first = np.union1d(spans, jumps) if len(jumps) else spans  # position of each range's first key
    lengths = np.diff(first, append=num_keys)
    begin = slots[first].astype(np.int64)
    is_few = num_rows < _FEW_ROWS
    range_indptr = np.append(np.searchsorted(first, spans) if is_few else 0, len(first))
    num_groups = len(range_indptr) - 1

    def num_keys_until(at: IntArray) -> Int32Array:
        counts = np.clip(at + 1 - first[:, None], 0, lengths[:, None])
        return np.asarray(counts, np.int32).ravel()

    return Plan(
        offsets=np.zeros(1, np.int64),
        row_indptr=num_rows * np.arange(num_groups + 1),
        range_indptr=range_indptr,
        rows=np.tile(np.arange(request.first_row, request.first_row + num_rows), num_groups),
        slot_begin=begin,
        slot_end=begin + lengths,
        rotations=np.zeros(len(first) * num_rows, np.int32),
        key_end=num_keys_until(positions),
        key_begin={window: num_keys_until(positions - window) for window in windows},
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Readings:
    """Columns of one length: `request` reads slots `begin` to `end` - 1 at `offset`."""

    request: IntArray
    offset: IntArray
    begin: IntArray
    end: IntArray


def _readings(batch: PackedBatch) -> _Readings:
    """Maximal ranges of slots that a request reads at one offset, their positions ascending.

    A request may have one shared segment twice, and so read a slot at two offsets. What earlier
    steps have found is taken from `PackedRequest.ranges`, and what is new is noted there.
    """
    ends = np.array([int(request.positions[-1]) + 1 for request in batch.requests])
    for request, end in zip(batch.requests, ends.tolist(), strict=True):
        if request.ranges.end >= end:
            request.ranges.forget()
    known = [request.ranges for request in batch.requests]
    starts = np.array([ranges.end for ranges in known])
    counts = ends - starts
    slots = np.concatenate(
        [
            request.slots[start:end]
            for request, start, end in zip(
                batch.requests, starts.tolist(), ends.tolist(), strict=True
            )
        ]
    ).astype(np.int64)
    owner_position = batch.slot_position[slots].astype(np.int64)
    position = np.repeat(starts, counts) + aranges(counts)
    offset = position - owner_position
    # First what is consecutive in the prompt and in memory ...
    span = owner_position // SPAN
    breaks = (np.diff(slots) != 1) | (np.diff(offset) != 0) | (np.diff(span) != 0)
    breaks[np.cumsum(counts)[:-1] - 1] = True
    begin = np.concatenate(([0], np.flatnonzero(breaks) + 1))
    end = np.concatenate((begin[1:], [len(slots)])) - 1
    # ... then what is so in memory alone, with what was known: the tokens of a run that are read as
    # they are lie side by side there, and so do a request's corrected ones.
    num_known = [len(ranges.offset) for ranges in known]
    request_of = np.concatenate(
        (
            np.repeat(np.arange(len(known)), num_known),
            np.searchsorted(np.cumsum(counts), begin, side="right"),
        )
    )
    offset = np.concatenate([*(ranges.offset for ranges in known), offset[begin]])
    first = np.concatenate([*(ranges.first for ranges in known), position[begin]])
    slot_begin = np.concatenate([*(ranges.slot_begin for ranges in known), slots[begin]])
    slot_end = np.concatenate([*(ranges.slot_end for ranges in known), slots[end] + 1])
    span = batch.slot_position[slot_begin] // SPAN
    order = np.lexsort((first, offset, request_of))
    here, before = order[1:], order[:-1]
    goes_on = (
        (request_of[here] == request_of[before])
        & (offset[here] == offset[before])
        & (slot_begin[here] == slot_end[before])
        & (span[here] == span[before])
    )
    begins = np.flatnonzero(np.concatenate(([True], ~goes_on)))
    lasts = order[np.concatenate((begins[1:], [len(order)])) - 1]
    firsts = order[begins]
    readings = _Readings(request_of[firsts], offset[firsts], slot_begin[firsts], slot_end[lasts])
    first = first[firsts]
    indptr = np.searchsorted(readings.request, np.arange(len(known) + 1)).tolist()
    for ranges, until, (low, high) in zip(
        known, ends.tolist(), itertools.pairwise(indptr), strict=True
    ):
        ranges.end = until
        ranges.offset, ranges.first = readings.offset[low:high], first[low:high]
        ranges.slot_begin, ranges.slot_end = readings.begin[low:high], readings.end[low:high]
    return readings


def _cut_at_each_other(readings: _Readings) -> _Readings:
    """Cut readings at each other's ends: the ranges of any two are then equal or disjoint."""
    edges = np.unique(np.concatenate((readings.begin, readings.end)))
    first = np.searchsorted(edges, readings.begin)
    counts = np.searchsorted(edges, readings.end) - first
    edge = np.repeat(first, counts) + aranges(counts)
    return _Readings(
        np.repeat(readings.request, counts),
        np.repeat(readings.offset, counts),
        edges[edge],
        edges[edge + 1],
    )


def _number_offsets(offsets: IntArray) -> tuple[IntArray, IntArray]:
    """Distinct offsets, 0 before all others, and for each of `offsets` its index among them."""
    others = np.unique(offsets[offsets != 0])
    indices = np.where(offsets == 0, 0, np.searchsorted(others, offsets) + 1)
    return np.concatenate(([0], others)), indices


def _group_by_readers(entries: _Readings) -> list[IntArray]:
    """Group slot ranges by who reads them.

    Returns:
        For each set of readers, indices into `entries` (ranges, readers); readers ascend.
    """
    order = np.lexsort((entries.offset, entries.request, entries.begin))
    begin, request = entries.begin[order], entries.request[order]
    # Where a request reads a range again, at another offset, that counts as another range, since
    # the rows of a group are distinct.
    index = np.arange(len(order))
    again = np.concatenate(([False], (np.diff(begin) == 0) & (np.diff(request) == 0)))
    time = index - np.maximum.accumulate(np.where(again, 0, index))
    by_time = np.lexsort((request, time, begin))
    order, begin, time = order[by_time], begin[by_time], time[by_time]
    is_new = np.concatenate(([True], (np.diff(begin) != 0) | (np.diff(time) != 0)))
    slot_range = np.cumsum(is_new) - 1
    # A bit for each reader: ranges with the same bits are a group. Groups are in the order of
    # their first ranges.
    bits = np.zeros((slot_range[-1] + 1, entries.request[order].max() + 1), bool)
    bits[slot_range, entries.request[order]] = True
    packed = np.packbits(bits, axis=1)
    _, first, group = np.unique(
        packed.view(f"V{packed.shape[1]}").ravel(), return_index=True, return_inverse=True
    )
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    group = rank[group.ravel()]
    by_group = order[np.argsort(group[slot_range], kind="stable")]
    num_readers = bits.sum(axis=1)[np.sort(first)]
    num_entries = np.bincount(group) * num_readers
    return [
        entries_of_group.reshape(-1, readers)
        for entries_of_group, readers in zip(
            np.split(by_group, np.cumsum(num_entries)[:-1]), num_readers.tolist(), strict=True
        )
    ]


def _num_keys_until(
    at: IntArray,
    slot_range: IntArray,
    slot_begin: IntArray,
    slot_end: IntArray,
    slot_position: IntArray,
) -> Int32Array:
    """For each read, how many keys of its range are at the position `at` or before it."""
    first, last = slot_position[slot_begin], slot_position[slot_end - 1]
    counts = np.where(at >= last[slot_range], (slot_end - slot_begin)[slot_range], 0).astype(
        np.int32
    )
    inside = np.flatnonzero((at >= first[slot_range]) & (at < last[slot_range]))
    for reads in np.split(inside, np.flatnonzero(np.diff(slot_range[inside])) + 1):
        if len(reads) == 0:
            continue
        here = slot_range[reads[0]]
        positions = slot_position[slot_begin[here] : slot_end[here]]
        counts[reads] = np.searchsorted(positions, at[reads], side="right")
    return counts


def aranges(counts: IntArray) -> IntArray:
    """0 ... n - 1 for each n of `counts`, one after the other."""
    ends = np.cumsum(counts, dtype=np.int64)
    return np.arange(int(counts.sum())) - np.repeat(ends - counts, counts)
