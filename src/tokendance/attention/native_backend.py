"""Shared-in-place attention by the native kernel (`native/kernel.cpp`), on a CPU."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokendance.attention import _native
from tokendance.attention.interface import LayerKind, PackedBatch, windows_of
from tokendance.attention.plan import Int32Array, make_plan
from tokendance.attention.rope import Rope, RopeLayout

Table = npt.NDArray[np.float32]


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

    def prepare(self, batch: PackedBatch) -> None:
        """Plan the step; what layers have in common is made by the first of them."""
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
        assert self._step is not None, "attend() before prepare()"
        kind = self._layers[layer]
        cos, sin = self._tables_of(kind.rope)
        if output is None:
            output = query.new_empty(query.shape)
        self._step.attend(
            query,
            key,
            value,
            keys,
            values,
            output,
            None if kind.window is None else self._key_begin[kind.window],
            cos,
            sin,
            kind.rope.layout is RopeLayout.INTERLEAVED,
            scale,
            torch.get_num_threads(),
        )
        return output

    def _tables_of(self, rope: Rope) -> tuple[Table, Table]:
        """Cosines and sines of the step's offsets, made by the first layer that needs them."""
        if rope not in self._tables:
            cos, sin = rope.tables(self._offsets, torch.device("cpu"))
            self._tables[rope] = cos.numpy(), sin.numpy()
        return self._tables[rope]
