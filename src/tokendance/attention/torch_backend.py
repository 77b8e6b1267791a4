"""Shared-in-place attention in plain torch.

Each read group of the plan is a few calls of a fused attention that also returns the log-sum-exp,
and the results of a row are merged by it. A call has no mask where all its rows see all its keys;
where rows see different numbers of keys, those that see about as many form a bucket, with a mask.
On a CPU the fused call is torch's own flash attention; elsewhere it is two matrix products.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokendance.attention.interface import IntArray, LayerKind, PackedBatch, windows_of
from tokendance.attention.merge import merge_rows
from tokendance.attention.plan import Plan, ReadGroup, make_plan
from tokendance.attention.rope import OffsetTables

# Fewer rows than this in a call cost as much as this many, and buckets are not worth more calls.
_MIN_BUCKET_ROWS = 32
_MAX_BUCKETS = 64


class SlotRange(NamedTuple):
    """Slots `begin` to `end` - 1 of memory."""

    begin: int
    end: int


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """One call of the fused attention."""

    rows: Tensor  # int64 (R,), distinct
    rotations: Tensor | None  # int64 (R,), index of the offset of each; None where all are 0
    ranges: tuple[SlotRange, ...]  # whose keys they see, in this order
    mask: Tensor | None  # additive (R, n), or None where all rows see all keys


class TorchBackend:
    """Attention over the read groups of a plan, each key read once for all its readers."""

    def __init__(
        self, layers: Sequence[LayerKind], head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """See `BackendFactory`."""
        del head_dim
        self._layers = layers
        self._device = device
        self._dtype = dtype
        self._plan: Plan | None = None
        self._write = torch.empty(0, dtype=torch.int64)
        self._calls: dict[int | None, list[_Call]] = {}
        self._tables = OffsetTables(np.zeros(1, np.int64), device)

    def prepare(self, batch: PackedBatch) -> None:
        """Plan the step; tensors that layers have in common are made by the first of them."""
        self._plan = make_plan(batch, windows_of(self._layers))
        self._write = self._index(batch.write_slots())
        self._calls = {}
        self._tables = OffsetTables(-self._plan.offsets, self._device)

    def _index(self, values: IntArray) -> Tensor:
        return torch.as_tensor(values.astype(np.int64), device=self._device)

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
        kind = self._layers[layer]
        if kind.window not in self._calls:
            self._calls[kind.window] = list(self._calls_of(kind.window))
        keys.index_copy_(1, self._write, key.transpose(0, 1))
        values.index_copy_(1, self._write, value.transpose(0, 1))
        (rows, heads, size), kv_heads = query.shape, key.shape[1]
        group = heads // kv_heads
        query = query.view(rows, kv_heads, group, size).permute(1, 2, 0, 3)  # (KVH, G, T, D)
        # Laid out as the model wants it back; summed in float32.
        result = torch.zeros(rows, kv_heads, group, size, dtype=torch.float32, device=query.device)
        by_head = result.permute(1, 2, 0, 3)
        lse = torch.full((kv_heads, group, rows), -math.inf, device=query.device)
        cos, sin = self._tables.of(kind.rope)
        for call in self._calls[kind.window]:
            stacked = query.index_select(2, call.rows)  # (KVH, G, R, D)
            if call.rotations is not None:
                tables = (cos[call.rotations], sin[call.rotations])
                stacked = kind.rope.rotate(stacked, tables)
            partial, partial_lse = _attention(
                stacked, _take(keys, call.ranges), _take(values, call.ranges), scale, call.mask
            )
            merge_rows(by_head, lse, partial, partial_lse, call.rows)
        result = result.view(rows, heads, size)
        return result.to(query.dtype) if output is None else output.copy_(result)

    def _calls_of(self, window: int | None) -> Iterator[_Call]:
        assert self._plan is not None, "attend() before prepare()"
        for readers in self._plan.read_groups():
            key_end = readers.key_end
            key_begin = np.zeros_like(key_end) if window is None else readers.key_begin[window]
            lengths = readers.slot_end - readers.slot_begin
            is_whole = (key_begin == 0).all(axis=1) & (key_end == lengths[:, None]).all(axis=1)
            # Ranges that all rows see whole, at the same offsets, are one call.
            by_rotations: dict[bytes, list[int]] = {}
            for index in np.flatnonzero(is_whole).tolist():
                by_rotations.setdefault(readers.rotations[index].tobytes(), []).append(index)
            for indices in by_rotations.values():
                begins, ends = (
                    readers.slot_begin[indices].tolist(),
                    readers.slot_end[indices].tolist(),
                )
                ranges = tuple(map(SlotRange, begins, ends))
                yield self._call(readers, indices[0], slice(None), ranges, None)
            for index in np.flatnonzero(~is_whole).tolist():
                yield from self._bucket_calls(readers, index, key_begin[index], key_end[index])

    def _bucket_calls(
        self, readers: ReadGroup, index: int, key_begin: IntArray, key_end: IntArray
    ) -> Iterator[_Call]:
        """Calls for range `index` where rows see different keys; who sees none is left out."""
        seeing = np.flatnonzero(key_begin < key_end)
        if len(seeing) == 0:
            return
        order = seeing[np.lexsort((key_begin[seeing], key_end[seeing]))]
        cuts = np.flatnonzero(np.diff(key_begin[order]) | np.diff(key_end[order])) + 1
        max_buckets = min(_MAX_BUCKETS, max(1, len(order) // _MIN_BUCKET_ROWS))
        if len(cuts) >= max_buckets:
            cuts = np.linspace(0, len(order), max_buckets + 1).astype(np.int64)[1:-1]
        slot = int(readers.slot_begin[index])
        for start, stop in itertools.pairwise([0, *cuts.tolist(), len(order)]):
            bucket = order[start:stop]
            begin, end = int(key_begin[bucket].min()), int(key_end[bucket].max())
            key = np.arange(begin, end)
            visible = (key >= key_begin[bucket, None]) & (key < key_end[bucket, None])
            ranges = (SlotRange(slot + begin, slot + end),)
            yield self._call(readers, index, bucket, ranges, self._additive(visible))

    def _call(
        self,
        readers: ReadGroup,
        index: int,
        chosen: IntArray | slice,
        ranges: tuple[SlotRange, ...],
        mask: Tensor | None,
    ) -> _Call:
        """A call for some rows of a group, at the offsets at which they read range `index`."""
        rotations = readers.rotations[index, chosen]
        return _Call(
            self._index(readers.rows[chosen]),
            self._index(rotations) if rotations.any() else None,
            ranges,
            mask,
        )

    def _additive(self, visible: np.ndarray) -> Tensor | None:
        if visible.all():
            return None
        mask = torch.zeros(visible.shape, dtype=self._dtype, device=self._device)
        return mask.masked_fill_(torch.as_tensor(~visible, device=self._device), -math.inf)


def _take(memory: Tensor, ranges: tuple[SlotRange, ...]) -> Tensor:
    """Slots of memory (KVH, S, D): a view where they are one range, else a copy."""
    views = [memory[:, begin:end] for begin, end in ranges]
    return views[0] if len(views) == 1 else torch.cat(views, dim=1)


def _attention(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention of (KVH, G, R, D) queries over (KVH, n, D) keys and values.

    Each of the G queries of a key head reads the same keys. The mask (R, n) is added to the scores.

    Returns:
        The result (KVH, G, R, D) and its natural log-sum-exp (KVH, G, R), float32.
    """
    if query.device.type != "cpu":
        return _matmul_attention(query, keys, values, scale, mask)
    kv_heads, group, rows, size = query.shape
    if mask is not None:
        stacked = query
        wide_keys = keys[:, None].expand(-1, group, -1, -1)
        wide_values = values[:, None].expand(-1, group, -1, -1)
    else:
        # Without a mask the G queries of a key head are just more rows.
        stacked = query.reshape(1, kv_heads, group * rows, size)
        wide_keys, wide_values = keys[None], values[None]
    result, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        stacked,
        wide_keys,
        wide_values,
        0.0,
        False,
        attn_mask=None if mask is None else mask[None, None],
        scale=scale,
    )
    return result.reshape(query.shape), lse.reshape(query.shape[:-1])


def _matmul_attention(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same as `_attention`, in matrix products, for any device."""
    kv_heads, group, rows, size = query.shape
    # In float32: a score of 40 in bfloat16 is wrong by a tenth, and so is its weight.
    scores = query.reshape(kv_heads, group * rows, size).float() @ keys.float().transpose(-1, -2)
    scores = scores.mul_(scale).view(kv_heads, group, rows, -1)
    if mask is not None:
        scores = scores + mask
    lse = scores.logsumexp(dim=-1)
    weights = (scores - lse.unsqueeze(-1)).exp_().to(values.dtype)
    result = weights.view(kv_heads, group * rows, -1) @ values
    return result.view(query.shape), lse
