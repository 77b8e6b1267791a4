"""The plan of a step on a GPU.

All of its arrays, and the tables of its rotations, are sent in one copy from pinned memory, which
the host does not wait for, into memory that is there from step to step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokendance.attention.interface import IntArray, LayerKind, PackedBatch, windows_of
from tokendance.attention.plan import Plan, make_plan
from tokendance.attention.rope import Rope

_ALIGNMENT = 16  # bytes; Triton's loads are wider where addresses are multiples of it


@dataclass(frozen=True, slots=True, eq=False)
class DevicePlan:
    """The plan's arrays on the device; see `Plan`, `_tasks` and `_merge_kernel`.

    Attributes:
        tasks: int64 (tasks, 6), tiles of read groups.
        rows: int64, of the batch, group by group.
        slot_begin: int64, first slot of each range.
        rotations: int32 (reads,).
        key_end: int32 (reads,).
        partial_indptr: int64 (T + 1,), where each row's results begin in `partial_index`.
        partial_index: int64, indices of `rows`.
        write: int64 (T,), slot that each row writes.
        key_begin: int32 (reads,), by window.
        tables: cosines and sines, float32 (rotations, rotary_dim / 2) each.
    """

    tasks: Tensor
    rows: Tensor
    slot_begin: Tensor
    rotations: Tensor
    key_end: Tensor
    partial_indptr: Tensor
    partial_index: Tensor
    write: Tensor
    key_begin: dict[int, Tensor]
    tables: dict[Rope, tuple[Tensor, Tensor]]


class PlanSender:
    """Makes the plans of steps, and sends them to a device."""

    def __init__(self, layers: Sequence[LayerKind], device: torch.device) -> None:
        """For a model's layers, whose memory is on a device."""
        self._windows = windows_of(layers)
        self._ropes = list(dict.fromkeys(layer.rope for layer in layers))
        self._device = device
        self._memory: Tensor | None = None

    def send(self, batch: PackedBatch, rows_per_task: int) -> DevicePlan:
        """Plan a step. What was sent before is overwritten, when the device is done with it.

        Args:
            batch: the step.
            rows_per_task: rows of one program, each with all its queries of a key head.
        """
        plan = make_plan(batch, self._windows)
        order = np.argsort(plan.rows, kind="stable")
        tables = [rope.tables(-plan.offsets, torch.device("cpu")) for rope in self._ropes]
        arrays: list[npt.NDArray[np.generic]] = [
            _tasks(plan, rows_per_task),
            plan.rows,
            plan.slot_begin,
            plan.rotations,
            plan.key_end,
            np.searchsorted(plan.rows[order], np.arange(batch.num_rows + 1)),
            order,
            batch.write_slots(),
            *(plan.key_begin[window] for window in self._windows),
            *(table.numpy() for pair in tables for table in pair),
        ]
        tasks, rows, slot_begin, rotations, key_end, indptr, index, write, *rest = self._send(
            arrays
        )
        others = iter(rest)
        return DevicePlan(
            tasks,
            rows,
            slot_begin,
            rotations,
            key_end,
            partial_indptr=indptr,
            partial_index=index,
            write=write,
            key_begin={window: next(others) for window in self._windows},
            tables={rope: (next(others), next(others)) for rope in self._ropes},
        )

    def _send(self, arrays: Sequence[npt.NDArray[np.generic]]) -> list[Tensor]:
        ends = np.cumsum([-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays])
        begins = [0, *ends.tolist()]
        num_bytes = begins.pop()
        memory = self._memory
        if memory is None or num_bytes > len(memory):
            memory = torch.empty(2 * num_bytes, dtype=torch.uint8, device=self._device)
            self._memory = memory
        # torch takes pinned memory again only after the copy from it.
        is_gpu = self._device.type == "cuda"
        host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_gpu)
        for array, begin in zip(arrays, begins, strict=True):
            host[begin : begin + array.nbytes].numpy()[:] = array.reshape(-1).view(np.uint8)
        memory[:num_bytes].copy_(host, non_blocking=True)
        return [
            memory[begin : begin + array.nbytes]
            .view(torch.from_numpy(array[:0]).dtype)
            .view(array.shape)
            for array, begin in zip(arrays, begins, strict=True)
        ]


def _tasks(plan: Plan, rows_per_task: int) -> IntArray:
    """Tiles of read groups, int64 (tasks, 6): see the beginning of `_attend_kernel`."""
    num_rows, num_ranges = np.diff(plan.row_indptr), np.diff(plan.range_indptr)
    first_read = np.cumsum(num_rows * num_ranges) - num_rows * num_ranges
    num_tiles = -(-num_rows // rows_per_task)
    group = np.repeat(np.arange(len(num_rows)), num_tiles)
    first_tile = np.cumsum(num_tiles) - num_tiles
    row = (np.arange(len(group)) - first_tile[group]) * rows_per_task
    columns = (
        plan.row_indptr[group] + row,
        np.minimum(rows_per_task, num_rows[group] - row),
        plan.range_indptr[group],
        plan.range_indptr[group + 1],
        first_read[group] + row,
        num_rows[group],
    )
    return np.stack(columns, axis=1).astype(np.int64)
