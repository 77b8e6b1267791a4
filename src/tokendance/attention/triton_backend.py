"""Shared-in-place attention in Triton, for GPUs.

One program takes a tile of a unit's queries with one key head, and walks over the keys of the
unit's pieces in blocks, in an online softmax (FlashAttention, arXiv 2205.14135, algorithm 1). Both
products are for tensor cores. Units of few rows are cut along their keys by the planner, so that a
long context is read by many programs. Each program leaves its normalized result and log-sum-exp; a
second kernel merges those of a row.

A head's components are taken as pairs that turn together, (a, b): queries are rotated pair by pair
in registers, and a score is the sum of two products over half a head each. What does not turn is
paired up anyway, at an angle of zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from tokendance.attention.interface import IntArray, LayerKind, PackedBatch, windows_of
from tokendance.attention.plan import Plan, make_plan
from tokendance.attention.rope import Rope, RopeLayout

_BLOCK_QUERIES = 64  # rows of the batch times the G queries of a key head
_BLOCK_KEYS = 64


@triton.jit
def _attend_kernel(
    query,
    keys,
    values,
    parts,
    part_lse,
    tasks,
    rows,
    starts,
    turns,
    firsts,
    lasts,
    cosines,
    sines,
    pair_a,
    pair_b,
    query_head_stride,
    query_group_stride,
    query_row_stride,
    memory_head_stride,
    num_heads,
    scale,
    group: tl.constexpr,
    size: tl.constexpr,
    has_firsts: tl.constexpr,
    block_queries: tl.constexpr,
    block_keys: tl.constexpr,
):
    """One tile of queries of one unit with one key head."""
    task = tasks + tl.program_id(0) * 6
    kv_head = tl.program_id(1)
    first_row = tl.load(task)  # of the plan's `rows`
    num_rows = tl.load(task + 1)
    first_piece = tl.load(task + 2)
    last_piece = tl.load(task + 3)
    read = tl.load(task + 4)  # of the first piece, at the first row
    reads_per_piece = tl.load(task + 5)

    half: tl.constexpr = size // 2
    index = tl.arange(0, block_queries)
    row = index // group
    there = row < num_rows
    batch_row = tl.load(rows + first_row + row, mask=there, other=0)
    pair = tl.arange(0, half)
    a = tl.load(pair_a + pair)
    b = tl.load(pair_b + pair)
    query_at = (
        query
        + kv_head.to(tl.int64) * query_head_stride
        + (index % group) * query_group_stride
        + batch_row * query_row_stride
    )
    query_a = tl.load(query_at[:, None] + a[None, :], mask=there[:, None], other=0.0)
    query_b = tl.load(query_at[:, None] + b[None, :], mask=there[:, None], other=0.0)
    wide_a, wide_b = query_a.to(tl.float32), query_b.to(tl.float32)
    component = tl.arange(0, size)
    memory = kv_head.to(tl.int64) * memory_head_stride

    largest = tl.full([block_queries], float("-inf"), tl.float32)
    total = tl.zeros([block_queries], tl.float32)
    output = tl.zeros([block_queries, size], tl.float32)
    for piece in range(first_piece, last_piece):
        start = tl.load(starts + piece)
        last = tl.load(lasts + read + row, mask=there, other=0)
        if has_firsts:
            first = tl.load(firsts + read + row, mask=there, other=0)
        else:
            first = tl.zeros([block_queries], tl.int32)
        seen = first < last
        begin = tl.min(tl.where(seen, first, 2147483647))
        end = tl.max(tl.where(seen, last, 0))
        if begin < end:
            turn = tl.load(turns + read + row, mask=there, other=0)
            cos = tl.load(cosines + turn[:, None] * half + pair[None, :])
            sin = tl.load(sines + turn[:, None] * half + pair[None, :])
            turned_a = (wide_a * cos - wide_b * sin).to(query_a.dtype)
            turned_b = (wide_b * cos + wide_a * sin).to(query_a.dtype)
            for block in range(begin, end, block_keys):
                key = block + tl.arange(0, block_keys)
                inside = key < end
                key_at = memory + (start + key).to(tl.int64) * size
                key_a = tl.load(keys + key_at[None, :] + a[:, None], mask=inside[None, :], other=0.0)
                key_b = tl.load(keys + key_at[None, :] + b[:, None], mask=inside[None, :], other=0.0)
                scores = tl.dot(turned_a, key_a, input_precision="ieee")
                scores += tl.dot(turned_b, key_b, input_precision="ieee")
                visible = (key[None, :] >= first[:, None]) & (key[None, :] < last[:, None])
                scores = tl.where(visible, scores * scale, float("-inf"))
                now = tl.maximum(largest, tl.max(scores, axis=1))
                # Where nothing is seen yet, all scores are -inf, and any finite number serves.
                shift = tl.where(now == float("-inf"), 0.0, now)
                weights = tl.exp(scores - shift[:, None])
                keep = tl.exp(largest - shift)
                total = total * keep + tl.sum(weights, axis=1)
                value = tl.load(
                    values + key_at[:, None] + component[None, :], mask=inside[:, None], other=0.0
                )
                output = output * keep[:, None] + tl.dot(
                    weights.to(value.dtype), value, input_precision="ieee"
                )
                largest = now
        read += reads_per_piece
    head = kv_head * group + index % group
    part = (first_row + row).to(tl.int64) * num_heads + head
    # A row that sees nothing here weighs nothing in the sum: its log-sum-exp is -inf.
    safe = tl.where(total == 0.0, 1.0, total)
    tl.store(
        parts + part[:, None] * size + component[None, :], output / safe[:, None], mask=there[:, None]
    )
    tl.store(part_lse + part, largest + tl.log(total), mask=there)


@triton.jit
def _merge_kernel(
    output,
    parts,
    part_lse,
    part_start,
    part_index,
    num_heads,
    size: tl.constexpr,
):
    """Sum the results of one row and head, weighted by their log-sum-exps."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    component = tl.arange(0, size)
    first = tl.load(part_start + row)
    last = tl.load(part_start + row + 1)
    largest = tl.full([1], float("-inf"), tl.float32)
    for i in range(first, last):
        part = tl.load(part_index + i).to(tl.int64) * num_heads + head
        largest = tl.maximum(largest, tl.load(part_lse + part))
    total = tl.zeros([1], tl.float32)
    result = tl.zeros([size], tl.float32)
    for i in range(first, last):
        part = tl.load(part_index + i).to(tl.int64) * num_heads + head
        weight = tl.exp(tl.load(part_lse + part) - largest)
        total += weight
        result += weight * tl.load(parts + part * size + component)
    at = (row.to(tl.int64) * num_heads + head) * size
    tl.store(output + at + component, (result / total).to(output.dtype.element_ty))


@dataclass(frozen=True, slots=True, eq=False)
class _DevicePlan:
    """The plan's arrays on the device; see `_attend_kernel` and `_merge_kernel`."""

    tasks: Tensor
    rows: Tensor
    starts: Tensor
    turns: Tensor
    lasts: Tensor
    firsts: dict[int, Tensor]
    part_start: Tensor
    part_index: Tensor
    write: Tensor


class TritonBackend:
    """Attention by the kernels of this file."""

    def __init__(
        self, layers: Sequence[LayerKind], head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """See `BackendFactory`."""
        assert can_serve(head_dim)
        del dtype
        self._layers = layers
        self._head_dim = head_dim
        self._device = device
        self._plan: _DevicePlan | None = None
        self._group = 0
        self._batch: PackedBatch | None = None
        self._offsets: IntArray = np.zeros(1, np.int64)
        self._tables: dict[LayerKind, tuple[Tensor, Tensor]] = {}
        self._pairs = {kind: self._pairs_of(kind.rope) for kind in set(layers)}

    def prepare(self, batch: PackedBatch) -> None:
        """Plan the step; the plan goes to the device with the first layer."""
        self._batch, self._plan, self._tables = batch, None, {}

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
    ) -> Tensor:
        """See `Backend.attend`."""
        assert self._batch is not None, "attend() before prepare()"
        kv_heads, group, rows, size = query.shape
        if self._plan is None or self._group != group:
            self._group = group
            self._plan = self._to_device(self._batch, group)
        plan, kind = self._plan, self._layers[layer]
        if kind not in self._tables:
            self._tables[kind] = self._tables_of(kind.rope)
        keys.index_copy_(1, plan.write, key)
        values.index_copy_(1, plan.write, value)
        heads = kv_heads * group
        parts = query.new_empty(len(plan.rows), heads, size, dtype=torch.float32)
        part_lse = query.new_empty(len(plan.rows), heads, dtype=torch.float32)
        _attend_kernel[(len(plan.tasks), kv_heads)](
            query,
            keys,
            values,
            parts,
            part_lse,
            plan.tasks,
            plan.rows,
            plan.starts,
            plan.turns,
            plan.lasts if kind.window is None else plan.firsts[kind.window],
            plan.lasts,
            *self._tables[kind],
            *self._pairs[kind],
            query.stride(0),
            query.stride(1),
            query.stride(2),
            keys.stride(0),
            heads,
            scale,
            group=group,
            size=size,
            has_firsts=kind.window is not None,
            block_queries=max(_BLOCK_QUERIES, triton.next_power_of_2(group)),
            block_keys=_BLOCK_KEYS,
        )
        output = query.new_empty(rows, heads, size)
        _merge_kernel[(rows, heads)](
            output, parts, part_lse, plan.part_start, plan.part_index, heads, size=size
        )
        return output

    def _to_device(self, batch: PackedBatch, group: int) -> _DevicePlan:
        plan = make_plan(batch, windows_of(self._layers))
        self._offsets = plan.offsets
        units = plan.units
        rows = np.concatenate([unit.rows for unit in units])
        order = np.argsort(rows, kind="stable")
        starts = np.searchsorted(rows[order], np.arange(batch.num_rows + 1))
        return _DevicePlan(
            self._tensor(_tasks(plan, max(1, _BLOCK_QUERIES // group)), torch.int64),
            self._tensor(rows, torch.int64),
            self._tensor(np.concatenate([unit.starts for unit in units]), torch.int64),
            self._tensor(np.concatenate([unit.turns.ravel() for unit in units]), torch.int32),
            self._tensor(np.concatenate([unit.lasts.ravel() for unit in units]), torch.int32),
            {
                window: self._tensor(
                    np.concatenate([unit.firsts[window].ravel() for unit in units]), torch.int32
                )
                for window in windows_of(self._layers)
            },
            self._tensor(starts, torch.int64),
            self._tensor(order, torch.int64),
            self._tensor(batch.write_slots(), torch.int64),
        )

    def _tensor(self, values: IntArray, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(values, dtype=dtype, device=self._device)

    def _tables_of(self, rope: Rope) -> tuple[Tensor, Tensor]:
        """Cosines and sines (turns, D / 2); pairs beyond those that turn stay as they are."""
        cos, sin = rope.tables(-self._offsets, self._device)
        still = self._head_dim // 2 - cos.shape[1]
        pad = torch.nn.functional.pad
        return pad(cos, (0, still), value=1.0).contiguous(), pad(sin, (0, still)).contiguous()

    def _pairs_of(self, rope: Rope) -> tuple[Tensor, Tensor]:
        """Components of a head that form pairs, int32 (D / 2,) each."""
        rotated = 2 * len(rope.inv_freq)
        half, rest = rotated // 2, np.arange(rotated, self._head_dim)
        if rope.layout is RopeLayout.HALVES:
            a, b = np.arange(half), half + np.arange(half)
        else:
            a, b = 2 * np.arange(half), 2 * np.arange(half) + 1
        still_a, still_b = np.split(rest, 2)
        return (
            self._tensor(np.concatenate((a, still_a)), torch.int32),
            self._tensor(np.concatenate((b, still_b)), torch.int32),
        )


def _tasks(plan: Plan, rows_per_task: int) -> IntArray:
    """Tiles of units, (tasks, 6): see the beginning of `_attend_kernel`."""
    found: list[tuple[int, ...]] = []
    first_row = first_piece = first_read = 0
    for unit in plan.units:
        num_rows, num_pieces = len(unit.rows), len(unit.starts)
        found.extend(
            (
                first_row + row,
                min(rows_per_task, num_rows - row),
                first_piece,
                first_piece + num_pieces,
                first_read + row,
                num_rows,
            )
            for row in range(0, num_rows, rows_per_task)
        )
        first_row += num_rows
        first_piece += num_pieces
        first_read += num_rows * num_pieces
    return np.array(found, np.int64)


def can_serve(head_dim: int) -> bool:
    """Whether the kernels were made for such heads: tensor cores want powers of two."""
    return head_dim in (32, 64, 128, 256)
