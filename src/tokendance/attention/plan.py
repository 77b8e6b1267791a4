"""The plan of a step: which rows read which pieces of KV memory.

Every request's context is cut into three kinds of pieces:

    new      the tokens that it computes in this step: causal, read from the batch itself
    own      filled slots that only this request reads, at their own position
    shared   filled slots that several requests read, or one at an offset

The shared slots are cut wherever some request begins or ends to read, or its offset changes:

    slots      0        40       70            120
    agent A    [---- d=0 --------------------- ]
    agent B    [---- d=7 -------]
    agent C             [- d=-3 --------------]
    pieces     [  A, B  ][A,B,C ][    A, C     ]

so that each key is read once for all its readers, whose rows are stacked. A row sees only keys
before its own position. Inside a piece positions ascend, so what a row sees is the first so many
keys: rows that see equally many form a tier, and no tier needs a mask. Where rows see too many
different numbers, rows are taken together and masked.

This file deals in numpy integers; tensors are made by the backend.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokendance.attention.interface import IntArray, PackedBatch, PackedRequest

MAX_TIERS = 64
# Fewer rows than this in a call of attention cost as much as this many; a mask is cheaper.
_MIN_TIER_ROWS = 32


@dataclass(frozen=True, slots=True, eq=False)
class OwnPart:
    """What one request reads alone.

    Attributes:
        first_row: its first row.
        num_rows: how many it has.
        ranges: of slots, (start, stop), which all its rows see.
        attend_new: whether its rows attend to each other causally, straight from the batch.
            Others read their own new tokens from memory, like any filled slot.
    """

    first_row: int
    num_rows: int
    ranges: tuple[tuple[int, int], ...]
    attend_new: bool


@dataclass(frozen=True, slots=True, eq=False)
class Tier:
    """Rows that see the first `num_keys` keys of a piece.

    Attributes:
        start: of the piece's rows, inclusive.
        stop: of the piece's rows, exclusive.
        num_keys: that any of them sees.
        visible: bool (rows, num_keys), or None where all of them see all.
    """

    start: int
    stop: int
    num_keys: int
    visible: npt.NDArray[np.bool_] | None


@dataclass(frozen=True, slots=True, eq=False)
class SharedPart:
    """A piece of memory that stacked rows of several requests read.

    Attributes:
        start: first slot.
        stop: slot after the last.
        rows: int64 (R,), distinct rows of the batch.
        offsets: int64 (R,), offset d of each row's request.
        tiers: ranges of `rows` that together are all of them.
    """

    start: int
    stop: int
    rows: IntArray
    offsets: IntArray
    tiers: tuple[Tier, ...]


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPlan:
    """All pieces of a step. Every row has its own part; shared parts are merged into it."""

    own: tuple[OwnPart, ...]
    shared: tuple[SharedPart, ...]


@dataclass(frozen=True, slots=True)
class _Reading:
    """One request reads slots start ... stop - 1 at one offset."""

    start: int
    stop: int
    request: int
    offset: int


def make_plan(batch: PackedBatch) -> AttentionPlan:
    """Cut the contexts of a batch into pieces."""
    contexts = [_context(index, batch) for index in range(len(batch.requests))]
    num_readers = np.bincount(
        np.concatenate([slots for slots, _ in contexts]), minlength=len(batch.slot_position)
    )
    own: list[OwnPart] = []
    readings: list[_Reading] = []
    for index, (slots, offsets) in enumerate(contexts):
        request = batch.requests[index]
        # All rows must see what is read alone. A single row sees its own slot too.
        before = batch.slot_position[slots] <= request.positions[0]
        alone = (num_readers[slots] == 1) & (offsets == 0) & before
        if len(request.positions) == 1:
            alone[-1] = True  # the row's own slot, also where others read it
        own.append(
            OwnPart(
                request.first_row,
                len(request.positions),
                tuple(_ranges(np.sort(slots[alone]))),
                attend_new=_attends_new(request),
            )
        )
        readings.extend(_readings(slots[~alone], offsets[~alone], index, batch.slot_position))
    return AttentionPlan(tuple(own), tuple(_shared_parts(readings, batch)))


def _attends_new(request: PackedRequest) -> bool:
    """Whether a request's rows attend to each other straight from the batch."""
    return len(request.positions) > 1 and not request.scattered


def _context(index: int, batch: PackedBatch) -> tuple[IntArray, IntArray]:
    """Slots that a request reads from memory, and its offset to each."""
    request = batch.requests[index]
    slots = request.slots[: int(request.positions[-1]) + 1]
    positions = np.arange(len(slots))
    if _attends_new(request):
        filled = np.ones(len(slots), np.bool_)
        filled[request.positions] = False
        slots, positions = slots[filled], positions[filled]
    return slots, positions - batch.slot_position[slots]


def _ranges(slots: IntArray) -> Iterator[tuple[int, int]]:
    """Maximal ranges of consecutive numbers in an ascending array."""
    if len(slots) == 0:
        return
    cuts = np.flatnonzero(np.diff(slots) != 1) + 1
    for piece in np.split(slots, cuts):
        yield int(piece[0]), int(piece[-1]) + 1


def _readings(
    slots: IntArray, offsets: IntArray, request: int, slot_position: IntArray
) -> Iterator[_Reading]:
    """Maximal ranges of consecutive slots that a request reads at one offset.

    A request may have one shared segment twice, and so read a slot at two offsets. Ranges end
    where positions fall, as between the common and the corrected tokens of a run.
    """
    order = np.lexsort((slots, offsets))
    slots, offsets = slots[order], offsets[order]
    if len(slots) == 0:
        return
    falls = np.diff(slot_position[slots]) <= 0
    cuts = np.flatnonzero((np.diff(slots) != 1) | (np.diff(offsets) != 0) | falls) + 1
    for piece, piece_offsets in zip(np.split(slots, cuts), np.split(offsets, cuts), strict=True):
        yield _Reading(int(piece[0]), int(piece[-1]) + 1, request, int(piece_offsets[0]))


def _shared_parts(readings: Sequence[_Reading], batch: PackedBatch) -> Iterator[SharedPart]:
    """Cut readings at each other's ends and stack the rows of those that coincide."""
    edges = np.unique([edge for reading in readings for edge in (reading.start, reading.stop)])
    pieces: dict[tuple[int, int], list[_Reading]] = {}
    for reading in readings:
        first, last = np.searchsorted(edges, (reading.start, reading.stop))
        for start, stop in zip(edges[first:last], edges[first + 1 : last + 1], strict=True):
            pieces.setdefault((int(start), int(stop)), []).append(reading)
    for (start, stop), readers in sorted(pieces.items()):
        while readers:
            # Rows of a part are distinct: a second offset of one request makes a second part.
            once = {reading.request: reading for reading in reversed(readers)}
            readers = [reading for reading in readers if once[reading.request] is not reading]
            part = _stack(start, stop, list(once.values()), batch)
            if part is not None:
                yield part


def _stack(
    start: int, stop: int, readers: Sequence[_Reading], batch: PackedBatch
) -> SharedPart | None:
    """Stack the rows of the readers of one piece, by how many of its keys they see."""
    key_positions = batch.slot_position[start:stop]
    rows: list[IntArray] = []
    offsets: list[IntArray] = []
    for reading in readers:
        request = batch.requests[reading.request]
        rows.append(request.first_row + np.arange(len(request.positions)))
        offsets.append(request.positions - reading.offset)
    all_rows = np.concatenate(rows)
    owner_positions = np.concatenate(offsets)  # of the rows, as the keys' owner counts
    all_offsets = np.repeat([reading.offset for reading in readers], [len(piece) for piece in rows])
    num_visible = np.searchsorted(key_positions, owner_positions, side="right")
    seeing = np.flatnonzero(num_visible)
    if len(seeing) == 0:
        return None
    seeing = seeing[np.argsort(num_visible[seeing], kind="stable")]
    num_visible = num_visible[seeing]
    return SharedPart(
        start, stop, all_rows[seeing], all_offsets[seeing], tuple(_tiers(num_visible))
    )


def _tiers(num_visible: IntArray) -> Iterator[Tier]:
    """Cut rows, ascending by the keys that they see, into tiers."""
    cuts = np.flatnonzero(np.diff(num_visible)) + 1
    most = min(MAX_TIERS, max(1, len(num_visible) // _MIN_TIER_ROWS))
    if len(cuts) >= most:
        cuts = np.linspace(0, len(num_visible), most + 1).astype(np.int64)[1:-1]
    bounds = [0, *cuts.tolist(), len(num_visible)]
    for start, stop in itertools.pairwise(bounds):
        seen = num_visible[start:stop]
        num_keys = int(seen[-1])
        visible = np.arange(num_keys) < seen[:, None] if int(seen[0]) < num_keys else None
        yield Tier(start, stop, num_keys, visible)
