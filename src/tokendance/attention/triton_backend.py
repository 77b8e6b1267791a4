"""Shared-in-place attention in Triton, for GPUs.

One program takes a tile of a read group's queries with one key head, and walks over the keys of the
group's slot ranges in blocks, in an online softmax (FlashAttention, arXiv 2205.14135, algorithm 1).
Both products are for tensor cores, other than in float32. Groups of few rows are cut along their
keys by the planner, so that a long context is read by many programs. Each program leaves its
normalized result and log-sum-exp; a second kernel merges those of a row.

A head's components are taken as pairs that are rotated together, (a, b): queries are rotated pair
by pair in registers, and joined to whole heads again. Components that the model does not rotate are
paired up anyway, at an angle of zero.

`tests/compile_triton.py` compiles the kernels without a GPU, and prints what they take of one.
"""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokendance.attention.interface import LayerKind, PackedBatch
from tokendance.attention.rope import RopeLayout
from tokendance.attention.triton_plan import DevicePlan, PlanSender

# Triton's interpreter multiplies the bits of bfloat16 as if they were integers.
_WIDEN = os.environ.get("TRITON_INTERPRET") == "1"


class _Tiling(NamedTuple):
    """How the work is cut for some heads."""

    block_queries: int  # queries of one program: rows of the batch times the G of a key head
    block_keys: int  # keys that its loop takes at once
    num_warps: int  # of 32 threads each, at most 255 registers a thread
    num_stages: int  # blocks of keys in shared memory: one is used while the next arrives


def _tiling(head_dim: int, dtype: torch.dtype) -> _Tiling:
    """Large tiles that fit: nothing is spilled in loops over keys, nor above 99 KiB shared."""
    if dtype == torch.float32:  # no tensor cores: threads hold rows and columns of both factors
        return _Tiling(32, 32 if head_dim <= 128 else 16, num_warps=8, num_stages=2)
    return _Tiling(
        64, 64 if head_dim <= 64 else 32, num_warps=4 if head_dim <= 128 else 8, num_stages=2
    )


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
    partials,
    partial_lse,
    tasks,
    rows,
    slot_begin,
    rotations,
    key_begin,
    key_end,
    cosines,
    sines,
    query_head_stride,
    query_group_stride,
    query_row_stride,
    memory_head_stride,
    memory_page_stride,
    memory_slot_stride,
    num_heads,
    scale,
    page_size: tl.constexpr,
    group: tl.constexpr,
    size: tl.constexpr,
    rotary_dim: tl.constexpr,
    interleaved: tl.constexpr,
    has_window: tl.constexpr,
    block_queries: tl.constexpr,
    block_keys: tl.constexpr,
    widen: tl.constexpr,
):
    """One tile of queries of one read group with one key head."""
    task = tasks + tl.program_id(0) * 6
    kv_head = tl.program_id(1)
    first_row = tl.load(task)  # of the plan's `rows`
    num_rows = tl.load(task + 1)
    range_begin = tl.load(task + 2)
    range_end = tl.load(task + 3)
    read = tl.load(task + 4)  # of the first range, at the first row
    reads_per_range = tl.load(task + 5)

    half: tl.constexpr = size // 2
    index = tl.arange(0, block_queries)
    row = index // group
    there = row < num_rows
    batch_row = tl.load(rows + first_row + row, mask=there, other=0)
    pair = tl.arange(0, half)
    component = tl.arange(0, size)
    # Components a and b are a pair; `order` is how they come out of joining all a with all b.
    if interleaved:
        a, b = 2 * pair, 2 * pair + 1
        order = component
    elif rotary_dim == size:
        a, b = pair, half + pair
        order = component
    else:
        a = tl.where(pair < rotary_dim // 2, pair, rotary_dim // 2 + pair)
        b = tl.where(pair < rotary_dim // 2, rotary_dim // 2 + pair, half + pair)
        of_pair = component % half
        shift_a = tl.where(of_pair < rotary_dim // 2, 0, rotary_dim // 2)
        shift_b = tl.where(of_pair < rotary_dim // 2, rotary_dim // 2, half)
        order = of_pair + tl.where(component < half, shift_a, shift_b)
    query_at = (
        query
        + kv_head.to(tl.int64) * query_head_stride
        + (index % group) * query_group_stride
        + batch_row * query_row_stride
    )
    memory = kv_head.to(tl.int64) * memory_head_stride
    in_block = tl.arange(0, block_keys)
    if page_size == 0:  # all slots have one stride
        key_tile = in_block[None, :] * memory_slot_stride + order[:, None]
        value_tile = in_block[:, None] * memory_slot_stride + component[None, :]

    largest = tl.full([block_queries], float("-inf"), tl.float32)
    total = tl.zeros([block_queries], tl.float32)
    output = tl.zeros([block_queries, size], tl.float32)
    for slot_range in range(range_begin, range_end):
        slot = tl.load(slot_begin + slot_range)
        last = tl.load(key_end + read + row, mask=there, other=0)
        if has_window:
            first = tl.load(key_begin + read + row, mask=there, other=0)
        else:
            first = tl.zeros([block_queries], tl.int32)
        seen = first < last
        begin = tl.min(tl.where(seen, first, 2147483647))
        end = tl.max(tl.where(seen, last, 0))
        if begin < end:
            rotation = tl.load(rotations + read + row, mask=there, other=0)
            # Pairs that are not rotated have no entry: an angle of zero.
            has_entry = (pair < rotary_dim // 2)[None, :]
            entry = rotation[:, None] * (rotary_dim // 2) + pair[None, :]
            cos = tl.load(cosines + entry, mask=has_entry, other=1.0)
            sin = tl.load(sines + entry, mask=has_entry, other=0.0)
            # Loaded for each range: kept, they would take registers that the loop below needs.
            query_a = tl.load(query_at[:, None] + a[None, :], mask=there[:, None], other=0.0)
            query_b = tl.load(query_at[:, None] + b[None, :], mask=there[:, None], other=0.0)
            wide_a, wide_b = query_a.to(tl.float32), query_b.to(tl.float32)
            rotated_a = (wide_a * cos - wide_b * sin).to(query_a.dtype)
            rotated_b = (wide_b * cos + wide_a * sin).to(query_a.dtype)
            rotated = tl.join(rotated_a, rotated_b)  # (block_queries, half, 2)
            if not interleaved:
                rotated = tl.permute(rotated, (0, 2, 1))
            rotated = tl.reshape(rotated, (block_queries, size))
            for block in range(begin, end, block_keys):
                key = block + in_block
                inside = key < end
                if page_size == 0:
                    at = memory + (slot + block) * memory_slot_stride
                else:
                    slots = slot + key
                    at = memory
                    start = (slots // page_size) * memory_page_stride
                    start += (slots % page_size) * memory_slot_stride
                    key_tile = start[None, :] + order[:, None]
                    value_tile = start[:, None] + component[None, :]
                transposed = tl.load(keys + at + key_tile, mask=inside[None, :], other=0.0)
                scores = _dot(rotated, transposed, widen)
                visible = (key[None, :] >= first[:, None]) & (key[None, :] < last[:, None])
                scores = tl.where(visible, scores * scale, float("-inf"))
                now = tl.maximum(largest, tl.max(scores, axis=1))
                # Where nothing is seen yet, all scores are -inf, and any finite number serves.
                shift = tl.where(now == float("-inf"), 0.0, now)
                weights = tl.exp(scores - shift[:, None])
                keep = tl.exp(largest - shift)
                total = total * keep + tl.sum(weights, axis=1)
                value = tl.load(values + at + value_tile, mask=inside[:, None], other=0.0)
                weights = weights.to(value.dtype)
                output = output * keep[:, None] + _dot(weights, value, widen)
                largest = now
        read += reads_per_range
    head = kv_head * group + index % group
    partial = (first_row + row).to(tl.int64) * num_heads + head
    # A row that sees nothing here weighs nothing in the sum: its log-sum-exp is -inf.
    safe = tl.where(total == 0.0, 1.0, total)
    tl.store(
        partials + partial[:, None] * size + component[None, :],
        output / safe[:, None],
        mask=there[:, None],
    )
    tl.store(partial_lse + partial, largest + tl.log(safe), mask=there)


@triton.jit
def _merge_kernel(
    output,
    partials,
    partial_lse,
    partial_indptr,
    partial_index,
    num_heads,
    size: tl.constexpr,
):
    """Sum the results of one row and head, weighted by their log-sum-exps."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    component = tl.arange(0, size)
    begin = tl.load(partial_indptr + row)
    end = tl.load(partial_indptr + row + 1)
    largest = tl.full([1], float("-inf"), tl.float32)
    for i in range(begin, end):
        partial = tl.load(partial_index + i).to(tl.int64) * num_heads + head
        largest = tl.maximum(largest, tl.load(partial_lse + partial))
    total = tl.zeros([1], tl.float32)
    result = tl.zeros([size], tl.float32)
    for i in range(begin, end):
        partial = tl.load(partial_index + i).to(tl.int64) * num_heads + head
        weight = tl.exp(tl.load(partial_lse + partial) - largest)
        total += weight
        result += weight * tl.load(partials + partial * size + component)
    at = (row.to(tl.int64) * num_heads + head) * size
    tl.store(output + at + component, (result / total).to(output.dtype.element_ty))


class TritonBackend:
    """Attention by the kernels of this file."""

    def __init__(
        self, layers: Sequence[LayerKind], head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """See `BackendFactory`."""
        assert can_serve(head_dim, dtype)
        self._layers = layers
        self._device = device
        self._sender = PlanSender(layers, device)
        self._batch: PackedBatch | None = None
        self._plan: DevicePlan | None = None
        self._tiling = _tiling(head_dim, dtype)
        self._partials: tuple[Tensor, Tensor] | None = None

    def prepare(self, batch: PackedBatch) -> None:
        """Take the step; it is planned with the first layer, which knows G."""
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
        output: Tensor | None = None,
    ) -> Tensor:
        """See `Backend.attend`."""
        write = self._planned(query.shape[1] // key.shape[1]).write
        keys.index_copy_(1, write, key.transpose(0, 1))
        values.index_copy_(1, write, value.transpose(0, 1))
        if output is None:
            output = query.new_empty(query.shape)
        self.read(layer, query, keys[:, None], values[:, None], scale, output)
        return output

    def read(
        self,
        layer: int,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        output: Tensor,
    ) -> None:
        """Attend to what is written, in whatever pages.

        Args:
            layer: index of the layer.
            query: (T, H, D), rotated to each row's position.
            keys: (KVH, pages, page size, D), the layer's memory; slots are numbered page by page.
                Heads, pages and slots may lie in any order, D is contiguous.
            values: (KVH, pages, page size, D), laid out likewise.
            scale: of the scores.
            output: contiguous (T, H, D), written.
        """
        (rows, heads, size), kv_heads = query.shape, len(keys)
        group = heads // kv_heads
        assert keys.stride() == values.stride(), "keys and values are laid out alike"
        _, num_pages, page_size, _ = keys.shape
        head_stride, page_stride, slot_stride, _ = keys.stride()
        if num_pages == 1 or page_stride == page_size * slot_stride:
            page_size = 0
        plan, kind, tiling = self._planned(group), self._layers[layer], self._tiling
        block_queries = self._block_queries(group)
        partials, partial_lse = self._room(len(plan.rows) * heads, size)
        with _current(self._device):
            _attend_kernel[(len(plan.tasks), kv_heads)](
                query,
                keys,
                values,
                partials,
                partial_lse,
                plan.tasks,
                plan.rows,
                plan.slot_begin,
                plan.rotations,
                plan.key_end if kind.window is None else plan.key_begin[kind.window],
                plan.key_end,
                *plan.tables[kind.rope],
                group * query.stride(1),
                query.stride(1),
                query.stride(0),
                head_stride,
                page_stride,
                slot_stride,
                heads,
                scale,
                page_size=page_size,
                group=group,
                size=size,
                rotary_dim=2 * len(kind.rope.inv_freq),
                interleaved=kind.rope.layout is RopeLayout.INTERLEAVED,
                has_window=kind.window is not None,
                block_queries=block_queries,
                block_keys=tiling.block_keys,
                widen=_WIDEN,
                num_stages=tiling.num_stages,
                num_warps=tiling.num_warps * (block_queries // tiling.block_queries),
            )
            _merge_kernel[(rows, heads)](
                output,
                partials,
                partial_lse,
                plan.partial_indptr,
                plan.partial_index,
                heads,
                size=size,
            )

    def _room(self, num_partials: int, size: int) -> tuple[Tensor, Tensor]:
        """Room for results that are merged, and their log-sum-exps; layers use it in turn."""
        if self._partials is None or num_partials > len(self._partials[1]):
            num_partials += num_partials // 4  # as contexts grow
            lse = torch.empty(num_partials, dtype=torch.float32, device=self._device)
            self._partials = lse.new_empty(num_partials * size), lse
        return self._partials

    def _block_queries(self, group: int) -> int:
        return max(self._tiling.block_queries, 1 << (group - 1).bit_length())

    def _planned(self, group: int) -> DevicePlan:
        assert self._batch is not None, "attend() before prepare()"
        if self._plan is None:
            self._plan = self._sender.send(self._batch, self._block_queries(group) // group)
        return self._plan


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the one that kernels are launched on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def can_serve(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether the kernels were made for such heads: tensor cores want powers of two."""
    has_dtype = dtype in (torch.float32, torch.bfloat16, torch.float16)
    return has_dtype and head_dim in (32, 64, 128, 256)
