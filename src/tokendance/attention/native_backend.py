"""Shared-in-place attention by the native kernel (`native/kernel.cpp`), on a CPU."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokendance.attention import _native
from tokendance.attention.interface import LayerKind, PackedBatch, SlotRanges, windows_of
from tokendance.attention.plan import SPAN, Int32Array, make_plan
from tokendance.attention.rope import Rope, RopeLayout

Table = npt.NDArray[np.float32]


class _Alone(NamedTuple):
    """The one new token of a request that ran alone, and read nothing of others.

    Attributes:
        ranges: the request's, by which it is known again.
        position: of the token.
        slot: likewise.
    """

    ranges: SlotRanges
    position: int
    slot: int


class Place(NamedTuple):
    """What a layer attends to in a step, as native code takes it.

    Attributes:
        step: the plan.
        keys: (KVH, S, D), memory of the layer.
        values: likewise.
        key_begin: keys before these are not seen; None: all are.
        cosines: (rotations, rotary_dim / 2), of the step's offsets.
        sines: likewise.
        interleaved: which components of a head form a pair.
    """

    step: _native.Step
    keys: Tensor
    values: Tensor
    key_begin: Int32Array | None
    cosines: Table
    sines: Table
    interleaved: bool


def can_serve(head_dim: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel was made for such heads."""
    has_dtype = dtype in (torch.float32, torch.bfloat16)
    return device.type == "cpu" and has_dtype and head_dim % 16 == 0 and head_dim <= 256


class NativeBackend:
    """Hands the plan to the kernel, which does a layer in one call.

    Attributes:
        kernel: name of the instruction set that is used.
    """

    def __init__(
        self,
        layers: Sequence[LayerKind],
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
        kernel: str | None = None,
    ) -> None:
        """See `BackendFactory`; `kernel` is one of `_native.kernels()`, or None: the fastest."""
        assert can_serve(head_dim, device, dtype)
        self.kernel = kernel or _native.kernels()[0]
        self._layers = layers
        self._windows = windows_of(layers)
        self._step: _native.Step | None = None
        self._key_begin: dict[int, Int32Array] = {}
        self._offsets = np.zeros(1, np.int64)
        self._tables: dict[Rope, tuple[Table, Table]] = {}
        self._alone: _Alone | None = None  # if the last step was like that

    def prepare(self, batch: PackedBatch) -> None:
        """Plan the step; what layers have in common is made by the first of them.

        Who decodes alone has the last step's plan with one key more, in a tenth of the time.
        """
        before, now = self._alone, _alone(batch)
        self._alone = None
        if before is not None and now is not None and self._goes_on(before, now):
            assert self._step is not None
            self._step.extend()
        else:
            self._plan(batch)
        self._alone = now

    def _plan(self, batch: PackedBatch) -> None:
        plan = make_plan(batch, self._windows)
        self._key_begin = plan.key_begin
        self._offsets, self._tables = -plan.offsets, {}
        self._step = _native.Step(
            self.kernel,
            len(batch.slot_position),
            batch.write_slots(),
            plan.row_indptr,
            plan.range_indptr,
            plan.rows,
            plan.slot_begin,
            plan.slot_end,
            plan.rotations,
            plan.key_end,
        )

    def _goes_on(self, before: _Alone, now: _Alone) -> bool:
        """Whether a step's plan is that of the one before, with one key more in its last range."""
        return (
            now.ranges is before.ranges
            and now.slot == before.slot + 1
            and now.position == before.position + 1
            and now.position % SPAN != 0
            and not self._windows
        )

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
        """See `Backend.attend`."""
        if output is None:
            output = query.new_empty(query.shape)
        place = self.place(layer, keys, values)
        place.step.attend(
            query,
            key,
            value,
            keys,
            values,
            output,
            place.key_begin,
            place.cosines,
            place.sines,
            place.interleaved,
            scale,
            torch.get_num_threads(),
        )
        return output

    def place(self, layer: int, keys: Tensor, values: Tensor) -> Place:
        """What a layer attends to in the step that was prepared.

        Args:
            layer: index of the layer.
            keys: (KVH, S, D), its memory.
            values: likewise.
        """
        assert self._step is not None, "place() before prepare()"
        kind = self._layers[layer]
        cos, sin = self._tables_of(kind.rope)
        key_begin = None if kind.window is None else self._key_begin[kind.window]
        interleaved = kind.rope.layout is RopeLayout.INTERLEAVED
        return Place(self._step, keys, values, key_begin, cos, sin, interleaved)

    def _tables_of(self, rope: Rope) -> tuple[Table, Table]:
        """Cosines and sines of the step's offsets, made by the first layer that needs them."""
        if rope not in self._tables:
            cos, sin = rope.tables(self._offsets, torch.device("cpu"))
            self._tables[rope] = cos.numpy(), sin.numpy()
        return self._tables[rope]


def _alone(batch: PackedBatch) -> _Alone | None:
    """What a step is if one request decodes, which reads nothing of others; None if it is not."""
    request = batch.alone
    if request is None or len(request.positions) != 1:
        return None
    position = int(request.positions[0])
    return _Alone(request.ranges, position, int(request.slots[position]))
