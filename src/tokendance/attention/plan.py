"""The plan of a step: which rows read which pieces of KV memory.

The contexts of all requests are cut wherever some request begins or ends to read consecutive
slots, or its offset changes, so that a piece of memory is read whole or not at all:

    slots      0        40       70            120       200   230
    agent A    [---- d=0 --------------------- ]          [own]
    agent B    [---- d=7 -------]                               [own]
    agent C             [- d=-3 --------------]
    pieces     [  A, B  ][A,B,C ][    A, C     ]          [ A ] [ B ]

Pieces with the same readers make a unit, whose rows are stacked: each key is read once for all of
them. A row sees only keys at or before its own position, and within the window of the layer.
Inside a piece positions ascend, so what a row sees there is a range of keys.

This file deals in numpy integers; what is done with them is up to the backend.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokendance.attention.interface import IntArray, PackedBatch

Int64Array = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]

# A unit of fewer rows than this is cut at multiples of so many positions, so that threads share a
# long context. Pieces are cut there, too. Neither depends on the number of threads, nor on which
# pages a request that runs alone happens to have, and so its sums do not, either.
_FEW_ROWS = 64
_SPAN = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """Rows that read the same pieces of memory.

    Attributes:
        rows: int64 (R,), of the batch, distinct.
        starts: int64 (P,), first slot of each piece.
        stops: int64 (P,), slot after its last.
        turns: int32 (P, R), index of the offset at which a row reads a piece.
        firsts: int32 (P, R), by window: of the piece's keys, a row sees those from here on ...
        lasts: int32 (P, R), ... and before this.
    """

    rows: IntArray
    starts: IntArray
    stops: IntArray
    turns: IntArray
    firsts: dict[int, IntArray]
    lasts: IntArray


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """All units of a step, one after the other. A row's result is the sum of its units'.

    A read is a row of a unit at one of its pieces; reads are ordered unit by unit, piece by piece,
    row by row. `Unit` says what its arrays mean.

    Attributes:
        offsets: int64, distinct; [0] is 0. Turn i is offset i.
        unit_rows: int64 (units + 1,), where each unit's rows begin in `rows`.
        unit_pieces: int64 (units + 1,), where its pieces begin in `starts` and `stops`.
        rows: int64, unit by unit.
        starts: int64, unit by unit, as `stops`.
        stops: int64.
        turns: int32 (reads,), as `lasts` and `firsts`.
        lasts: int32 (reads,).
        firsts: int32 (reads,), by window.
    """

    offsets: Int64Array
    unit_rows: Int64Array
    unit_pieces: Int64Array
    rows: Int64Array
    starts: Int64Array
    stops: Int64Array
    turns: Int32Array
    lasts: Int32Array
    firsts: dict[int, Int32Array]

    def units(self) -> Iterator[Unit]:
        """Units as objects, for those who take them one by one."""
        read = 0
        bounds = np.stack((self.unit_rows, self.unit_pieces), axis=1).tolist()
        for (row, piece), (next_row, next_piece) in itertools.pairwise(bounds):
            shape = (next_piece - piece, next_row - row)
            reads = slice(read, read + shape[0] * shape[1])
            read = reads.stop
            yield Unit(
                self.rows[row:next_row],
                self.starts[piece:next_piece],
                self.stops[piece:next_piece],
                self.turns[reads].reshape(shape),
                {window: firsts[reads].reshape(shape) for window, firsts in self.firsts.items()},
                self.lasts[reads].reshape(shape),
            )


def make_plan(batch: PackedBatch, windows: Iterable[int] = ()) -> Plan:
    """Cut the contexts of a batch into pieces, and stack their readers.

    Args:
        batch: the step.
        windows: of the model's layers that have one, in tokens.
    """
    entries = _pieces(_readings(batch))
    offsets, turns = _numbered(entries.offset)
    num_rows = np.array([len(request.positions) for request in batch.requests])
    first_rows = np.array([request.first_row for request in batch.requests])
    positions = np.concatenate([request.positions for request in batch.requests]).astype(np.int64)

    # One line per piece: the first of its readers stands for it.
    groups = _same_readers(entries)
    group = np.repeat(np.arange(len(groups)), [len(pieces) for pieces in groups])
    num_readers = np.array([pieces.shape[1] for pieces in groups])[group]
    by_piece = np.concatenate([pieces.ravel() for pieces in groups])
    first_reader = np.cumsum(num_readers) - num_readers
    leader = by_piece[first_reader]
    group_rows = np.array([num_rows[entries.request[pieces[0]]].sum() for pieces in groups])
    position = batch.slot_position[entries.start[leader]]
    span = np.where(group_rows[group] < _FEW_ROWS, position // _SPAN, 0)
    # By offset first, so that a rotation serves many pieces; then as the owner counts.
    order = np.lexsort((position, turns[leader], span, group))
    leader, num_readers = leader[order], num_readers[order]
    new_unit = (np.diff(group[order]) != 0) | (np.diff(span[order]) != 0)
    unit_pieces = np.concatenate(([0], np.flatnonzero(new_unit) + 1, [len(order)]))

    # One line per piece and request that reads it ...
    reader = by_piece[np.repeat(first_reader[order], num_readers) + _counted(num_readers)]
    counts = num_rows[entries.request[reader]]
    # ... and one per read.
    rows = np.repeat(first_rows[entries.request[reader]], counts) + _counted(counts)
    piece = np.repeat(np.repeat(np.arange(len(order)), num_readers), counts)
    entry = np.repeat(reader, counts)
    at = positions[rows] - entries.offset[entry]  # a row's position as the piece's owner counts
    starts, stops = entries.start[leader], entries.stop[leader]

    # A unit's rows are those that read its first piece.
    reads = np.bincount(piece, minlength=len(order))
    num_unit_rows = reads[unit_pieces[:-1]]
    first_read = (np.cumsum(reads) - reads)[unit_pieces[:-1]]
    return Plan(
        offsets.astype(np.int64, copy=False),
        np.concatenate(([0], np.cumsum(num_unit_rows))),
        unit_pieces,
        rows[np.repeat(first_read, num_unit_rows) + _counted(num_unit_rows)].astype(
            np.int64, copy=False
        ),
        starts,
        stops,
        turns[entry].astype(np.int32),
        _num_until(at, piece, starts, stops, batch.slot_position),
        {w: _num_until(at - w, piece, starts, stops, batch.slot_position) for w in windows},
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Readings:
    """Columns of one length: `request` reads slots `start` to `stop` - 1 at `offset`."""

    request: IntArray
    offset: IntArray
    start: IntArray
    stop: IntArray


def _readings(batch: PackedBatch) -> _Readings:
    """Maximal ranges of slots that a request reads at one offset, their positions ascending.

    A request may have one shared segment twice, and so read a slot at two offsets.
    """
    lengths = np.array([int(request.positions[-1]) + 1 for request in batch.requests])
    slots = np.concatenate(
        [request.slots[:length] for request, length in zip(batch.requests, lengths, strict=True)]
    ).astype(np.int64)
    owner_position = batch.slot_position[slots].astype(np.int64)
    offset = _counted(lengths) - owner_position
    # First what is consecutive in the prompt and in memory ...
    span = owner_position // _SPAN
    breaks = (np.diff(slots) != 1) | (np.diff(offset) != 0) | (np.diff(span) != 0)
    breaks[np.cumsum(lengths)[:-1] - 1] = True
    first = np.concatenate(([0], np.flatnonzero(breaks) + 1))
    last = np.concatenate((first[1:], [len(slots)])) - 1
    request = np.searchsorted(np.cumsum(lengths), first, side="right")
    # ... then what is so in memory alone: the tokens of a run that are read as they are lie side by
    # side there, and so do a request's corrected ones.
    order = np.lexsort((first, offset[first], request))
    request, first, last = request[order], first[order], last[order]
    here, before = slice(1, None), slice(None, -1)
    goes_on = (
        (request[here] == request[before])
        & (offset[first[here]] == offset[first[before]])
        & (slots[first[here]] == slots[last[before]] + 1)
        & (span[first[here]] == span[last[before]])
    )
    begins = np.flatnonzero(np.concatenate(([True], ~goes_on)))
    ends = np.concatenate((begins[1:], [len(request)])) - 1
    return _Readings(
        request[begins], offset[first[begins]], slots[first[begins]], slots[last[ends]] + 1
    )


def _pieces(readings: _Readings) -> _Readings:
    """Cut readings at each other's ends: what is left is equal or apart."""
    edges = np.unique(np.concatenate((readings.start, readings.stop)))
    first = np.searchsorted(edges, readings.start)
    counts = np.searchsorted(edges, readings.stop) - first
    edge = np.repeat(first, counts) + _counted(counts)
    return _Readings(
        np.repeat(readings.request, counts),
        np.repeat(readings.offset, counts),
        edges[edge],
        edges[edge + 1],
    )


def _numbered(offsets: IntArray) -> tuple[IntArray, IntArray]:
    """Distinct offsets, 0 before all others, and for each given one its number among them."""
    others = np.unique(offsets[offsets != 0])
    numbers = np.where(offsets == 0, 0, np.searchsorted(others, offsets) + 1)
    return np.concatenate(([0], others)), numbers


def _same_readers(entries: _Readings) -> list[IntArray]:
    """Group pieces by who reads them.

    Returns:
        For each set of readers, indices into `entries` (P, readers); readers ascend.
    """
    order = np.lexsort((entries.offset, entries.request, entries.start))
    start, request = entries.start[order], entries.request[order]
    # Where a request reads a piece again, at another offset, that is another piece: rows of a unit
    # are distinct.
    index = np.arange(len(order))
    again = np.concatenate(([False], (np.diff(start) == 0) & (np.diff(request) == 0)))
    time = index - np.maximum.accumulate(np.where(again, 0, index))
    by_time = np.lexsort((request, time, start))
    order, start, time = order[by_time], start[by_time], time[by_time]
    cuts = np.flatnonzero((np.diff(start) != 0) | (np.diff(time) != 0)) + 1
    groups: dict[bytes, list[IntArray]] = {}
    for piece in np.split(order, cuts):
        groups.setdefault(entries.request[piece].tobytes(), []).append(piece)
    return [np.stack(pieces) for pieces in groups.values()]


def _num_until(
    at: IntArray, piece: IntArray, starts: IntArray, stops: IntArray, slot_position: IntArray
) -> Int32Array:
    """For each read, how many keys of its piece are at the position `at` or before it."""
    first, last = slot_position[starts], slot_position[stops - 1]
    ends = np.where(at >= last[piece], (stops - starts)[piece], 0).astype(np.int32)
    inside = np.flatnonzero((at >= first[piece]) & (at < last[piece]))
    for reads in np.split(inside, np.flatnonzero(np.diff(piece[inside])) + 1):
        if len(reads) == 0:
            continue
        here = piece[reads[0]]
        positions = slot_position[starts[here] : stops[here]]
        ends[reads] = np.searchsorted(positions, at[reads], side="right")
    return ends


def _counted(counts: IntArray) -> IntArray:
    """0 ... n - 1 for each n of `counts`, one after the other."""
    ends = np.cumsum(counts)
    return np.arange(int(ends[-1])) - np.repeat(ends - counts, counts)
