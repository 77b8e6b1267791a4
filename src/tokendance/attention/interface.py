"""The interface of attention over shared KV, and the legend of its shapes.

    T   rows of the packed batch: one new token each, of any request
    H   query heads        KVH  key/value heads        G = H / KVH  queries per key head: query head
                                                       h reads key head h // G
    D   head size          S    slots of KV memory     L  layers
    R   rows of a read group, stacked    n   keys that they read

    query          (T, H, D), as a model's projection leaves it
    new key/value  (T, KVH, D), likewise
    memory         (KVH, S, D) per layer, keys and values apart; heads or slots may be outermost
    output         (T, H, D)

A key is stored once, rotated to the position at which its owner has it (`slot_position`). A
request that has the same token at position p reads it with offset d = p - slot_position, by
rotating its query by -d:  q . R(d) k = (R(-d) q) . k. So no key is ever copied or rotated again.
To that request the key lies at position slot_position + d, and a sliding window is a bound on that.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokendance.attention.rope import Rope

IntArray = npt.NDArray[np.integer]


def _no_ranges() -> IntArray:
    return np.empty(0, np.int64)


@dataclass(slots=True, eq=False)
class SlotRanges:
    """The ranges of slots that a request reads at its positions `start` to `end` - 1.

    What lies there does not change, so whoever keeps a request over many steps keeps these for it:
    `make_plan` adds the ranges of new positions, and so looks at these alone. A step that goes back
    behind `end`, as after drafts that were refused, begins anew. A request whose context comes to
    lie elsewhere has other ranges: a backend knows it again by this very object.

    Attributes:
        start: the context begins at this position; keys before it are nobody's.
        end: what is known ends before this position.
        offset: int64, of each range.
        first: int64, lowest position of each.
        slot_begin: int64, its first slot.
        slot_end: int64, the slot after its last.
    """

    start: int = 0
    end: int = field(init=False)
    offset: IntArray = field(default_factory=_no_ranges, init=False)
    first: IntArray = field(default_factory=_no_ranges, init=False)
    slot_begin: IntArray = field(default_factory=_no_ranges, init=False)
    slot_end: IntArray = field(default_factory=_no_ranges, init=False)

    def __post_init__(self) -> None:
        self.end = self.start

    def forget(self) -> None:
        """Begin anew."""
        self.end = self.start
        self.offset = self.first = self.slot_begin = self.slot_end = _no_ranges()


@dataclass(frozen=True, slots=True, eq=False)
class PackedRequest:
    """One request's rows in a packed batch.

    Attributes:
        first_row: its rows are `first_row ... first_row + len(positions) - 1`.
        positions: int, of its new tokens, ascending.
        slots: int, of its tokens at positions 0 ... positions[-1], new ones included. Every slot
            is either filled, or written by some request of the same batch.
        ranges: of these slots, as far as earlier steps have found them; `make_plan` goes on there.
        reads_others: whether KV of others is among them.
    """

    first_row: int
    positions: IntArray
    slots: IntArray
    ranges: SlotRanges = field(default_factory=SlotRanges)
    reads_others: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """A packed batch as attention sees it."""

    requests: Sequence[PackedRequest]  # their rows are 0 ... T - 1, in order
    slot_position: IntArray  # int32 (S,), position at which each slot's key was rotated

    @property
    def alone(self) -> PackedRequest | None:
        """The only request, if it reads nothing of others; no reader has to be found then."""
        if len(self.requests) == 1 and not self.requests[0].reads_others:
            return self.requests[0]
        return None

    @property
    def num_rows(self) -> int:
        """T."""
        return sum(len(request.positions) for request in self.requests)

    def write_slots(self) -> npt.NDArray[np.int64]:
        """Slot that each row writes, int64 (T,)."""
        slots = [request.slots[request.positions] for request in self.requests]
        return np.concatenate(slots).astype(np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class LayerKind:
    """What layers may have of their own.

    Attributes:
        rope: the rotation of its heads.
        window: a row sees keys at most this many positions back, its own included; None: all.
    """

    rope: Rope
    window: int | None = None


def windows_of(layers: Sequence[LayerKind]) -> list[int]:
    """The distinct windows that layers have."""
    return sorted({layer.window for layer in layers if layer.window is not None})


class Backend(Protocol):
    """Computes attention of a packed batch; `prepare` once a step, `attend` once a layer."""

    def prepare(self, batch: PackedBatch) -> None:
        """Take the batch that the next calls of `attend` are about."""
        ...

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        output: Tensor | None = None,
    ) -> Tensor:
        """Write the new keys and values into memory, then attend.

        Args:
            layer: index of the layer.
            query: (T, H, D), rotated to each row's position.
            key: (T, KVH, D), rotated likewise.
            value: (T, KVH, D).
            keys: (KVH, S, D), the layer's memory; written at `write_slots`.
            values: (KVH, S, D), likewise.
            scale: of the scores.
            output: contiguous (T, H, D), in the query's dtype; the result is written there.

        Returns:
            `output`, or a new tensor like it.
        """
        ...


class BackendFactory(Protocol):
    """Makes a backend for a model on a device."""

    def __call__(
        self, layers: Sequence[LayerKind], head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> Backend:
        """Make a backend for a model's layers.

        Args:
            layers: rotation and window of each.
            head_dim: D.
            device: where memory lies.
            dtype: of queries and memory.
        """
        ...
