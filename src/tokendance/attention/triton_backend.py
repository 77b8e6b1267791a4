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

import itertools
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from tokendance.attention.interface import IntArray, LayerKind, PackedBatch, windows_of
from tokendance.attention.plan import Plan, make_plan
from tokendance.attention.rope import OffsetTables, RopeLayout

_BLOCK_QUERIES = 64  # rows of the batch times the G queries of a key head
# Triton's interpreter multiplies the bits of bfloat16 as if they were integers.
_WIDEN = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _dot(left, right, widen: tl.constexpr):
    """Product with sums in float32."""
    if widen:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")


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
    query_head_stride,
    query_group_stride,
    query_row_stride,
    memory_head_stride,
    num_heads,
    scale,
    group: tl.constexpr,
    size: tl.constexpr,
    rotated: tl.constexpr,
    interleaved: tl.constexpr,
    has_firsts: tl.constexpr,
    block_queries: tl.constexpr,
    block_keys: tl.constexpr,
    widen: tl.constexpr,
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
    # Components a and b of a head are a pair. Known when compiled, so that loads are wide.
    if interleaved:
        a = tl.where(pair < rotated // 2, 2 * pair, rotated // 2 + pair)
        b = tl.where(pair < rotated // 2, 2 * pair + 1, half + pair)
    else:
        a = tl.where(pair < rotated // 2, pair, rotated // 2 + pair)
        b = tl.where(pair < rotated // 2, rotated // 2 + pair, half + pair)
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
            # Pairs beyond those that turn have no entry: an angle of zero.
            turns_too = (pair < rotated // 2)[None, :]
            entry = turn[:, None] * (rotated // 2) + pair[None, :]
            cos = tl.load(cosines + entry, mask=turns_too, other=1.0)
            sin = tl.load(sines + entry, mask=turns_too, other=0.0)
            turned_a = (wide_a * cos - wide_b * sin).to(query_a.dtype)
            turned_b = (wide_b * cos + wide_a * sin).to(query_a.dtype)
            for block in range(begin, end, block_keys):
                key = block + tl.arange(0, block_keys)
                inside = key < end
                key_at = memory + (start + key).to(tl.int64) * size
                key_a = tl.load(
                    keys + key_at[None, :] + a[:, None], mask=inside[None, :], other=0.0
                )
                key_b = tl.load(
                    keys + key_at[None, :] + b[:, None], mask=inside[None, :], other=0.0
                )
                scores = _dot(turned_a, key_a, widen) + _dot(turned_b, key_b, widen)
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
                weights = weights.to(value.dtype)
                output = output * keep[:, None] + _dot(weights, value, widen)
                largest = now
        read += reads_per_piece
    head = kv_head * group + index % group
    part = (first_row + row).to(tl.int64) * num_heads + head
    # A row that sees nothing here weighs nothing in the sum: its log-sum-exp is -inf.
    safe = tl.where(total == 0.0, 1.0, total)
    tl.store(
        parts + part[:, None] * size + component[None, :],
        output / safe[:, None],
        mask=there[:, None],
    )
    tl.store(part_lse + part, largest + tl.log(safe), mask=there)


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
    """The plan's arrays on the device; see `Plan`, `_attend_kernel` and `_merge_kernel`."""

    tasks: Tensor
    rows: Tensor
    starts: Tensor
    turns: Tensor
    lasts: Tensor
    firsts: dict[int, Tensor]
    part_start: Tensor
    part_index: Tensor
    write: Tensor
    tables: OffsetTables


class TritonBackend:
    """Attention by the kernels of this file."""

    def __init__(
        self, layers: Sequence[LayerKind], head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """See `BackendFactory`."""
        assert can_serve(head_dim, dtype)
        self._layers = layers
        self._device = device
        self._batch: PackedBatch | None = None
        self._plan: _DevicePlan | None = None
        # What a block of keys and values takes has to fit beside the next one that is fetched.
        head_bytes = head_dim * dtype.itemsize
        self._block_keys = 64 if head_bytes <= 256 else 32
        self._stages = 2 if head_bytes <= 512 else 1
        self._warps = 4 if head_dim <= 64 else 8

    def prepare(self, batch: PackedBatch) -> None:
        """Plan the step; the plan goes to the device with the first layer, which knows G."""
        self._batch, self._plan = batch, None

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
        heads = kv_heads * group
        block_queries = max(_BLOCK_QUERIES, triton.next_power_of_2(group))
        if self._plan is None:
            self._plan = self._to_device(self._batch, block_queries // group)
        plan, kind = self._plan, self._layers[layer]
        keys.index_copy_(1, plan.write, key)
        values.index_copy_(1, plan.write, value)
        parts = query.new_empty(len(plan.rows), heads, size, dtype=torch.float32)
        part_lse = query.new_empty(len(plan.rows), heads, dtype=torch.float32)
        output = query.new_empty(rows, heads, size)
        with _current(self._device):
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
                *plan.tables.of(kind.rope),
                query.stride(0),
                query.stride(1),
                query.stride(2),
                keys.stride(0),
                heads,
                scale,
                group=group,
                size=size,
                rotated=2 * len(kind.rope.inv_freq),
                interleaved=kind.rope.layout is RopeLayout.INTERLEAVED,
                has_firsts=kind.window is not None,
                block_queries=block_queries,
                block_keys=self._block_keys,
                widen=_WIDEN,
                num_stages=self._stages,
                num_warps=self._warps,
            )
            _merge_kernel[(rows, heads)](
                output, parts, part_lse, plan.part_start, plan.part_index, heads, size=size
            )
        return output

    def _to_device(self, batch: PackedBatch, rows_per_task: int) -> _DevicePlan:
        plan = make_plan(batch, windows_of(self._layers))
        order = np.argsort(plan.rows, kind="stable")
        return _DevicePlan(
            self._tensor(_tasks(plan, rows_per_task)),
            self._tensor(plan.rows),
            self._tensor(plan.starts),
            self._tensor(plan.turns),
            self._tensor(plan.lasts),
            {window: self._tensor(firsts) for window, firsts in plan.firsts.items()},
            self._tensor(np.searchsorted(plan.rows[order], np.arange(batch.num_rows + 1))),
            self._tensor(order),
            self._tensor(batch.write_slots()),
            OffsetTables(-plan.offsets, self._device),
        )

    def _tensor(self, values: IntArray) -> Tensor:
        return torch.as_tensor(values, device=self._device)


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the one that kernels are launched on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _tasks(plan: Plan, rows_per_task: int) -> IntArray:
    """Tiles of units, int64 (tasks, 6): see the beginning of `_attend_kernel`."""
    found: list[tuple[int, ...]] = []
    first_read = 0
    bounds = zip(
        itertools.pairwise(plan.unit_rows.tolist()),
        itertools.pairwise(plan.unit_pieces.tolist()),
        strict=True,
    )
    for (first_row, last_row), (first_piece, last_piece) in bounds:
        num_rows = last_row - first_row
        found.extend(
            (
                first_row + row,
                min(rows_per_task, num_rows - row),
                first_piece,
                last_piece,
                first_read + row,
                num_rows,
            )
            for row in range(0, num_rows, rows_per_task)
        )
        first_read += num_rows * (last_piece - first_piece)
    return np.array(found, np.int64)


def can_serve(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether the kernels were made for such heads: tensor cores want powers of two."""
    has_dtype = dtype in (torch.float32, torch.bfloat16, torch.float16)
    return has_dtype and head_dim in (32, 64, 128, 256)
