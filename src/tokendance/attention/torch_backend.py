"""Shared-in-place attention in plain torch.

Each unit of the plan is a few calls of a fused attention that also returns the log-sum-exp, and
the results of a row are merged by it. A call has no mask where all its rows see all its keys;
where rows see different numbers of keys, those that see about as many form a tier, with a mask.
On a CPU the fused call is torch's own flash attention; elsewhere it is written out in matrix
products.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokendance.attention.interface import IntArray, LayerKind, PackedBatch, windows_of
from tokendance.attention.merge import merge_rows
from tokendance.attention.plan import Plan, Unit, make_plan
from tokendance.attention.rope import OffsetTables

# Fewer rows than this in a call cost as much as this many, and tiers are not worth more calls.
_MIN_TIER_ROWS = 32
_MAX_TIERS = 64


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """One call of the fused attention.

    Attributes:
        rows: int64 (R,), distinct.
        turns: int64 (R,), which offset each of them is at; None where all are at 0.
        ranges: of slots, (start, stop).
        mask: additive (R, n), or None where all rows see all keys.
    """

    rows: Tensor
    turns: Tensor | None
    ranges: tuple[tuple[int, int], ...]
    mask: Tensor | None


class TorchBackend:
    """Attention over the units of a plan, each shared key read once for all its readers."""

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
    ) -> Tensor:
        """See `Backend.attend`."""
        kind = self._layers[layer]
        if kind.window not in self._calls:
            self._calls[kind.window] = list(self._calls_of(kind.window))
        keys.index_copy_(1, self._write, key)
        values.index_copy_(1, self._write, value)
        kv_heads, group, rows, size = query.shape
        # Laid out as the model wants it back; summed in float32.
        result = torch.zeros(rows, kv_heads, group, size, dtype=torch.float32, device=query.device)
        output = result.permute(1, 2, 0, 3)
        lse = torch.full((kv_heads, group, rows), -math.inf, device=query.device)
        cos, sin = self._tables.of(kind.rope)
        for call in self._calls[kind.window]:
            stacked = query.index_select(2, call.rows)  # (KVH, G, R, D)
            if call.turns is not None:
                stacked = kind.rope.rotate(stacked, (cos[call.turns], sin[call.turns]))
            part, part_lse = _attention(
                stacked, _take(keys, call.ranges), _take(values, call.ranges), scale, call.mask
            )
            merge_rows(output, lse, part, part_lse, call.rows)
        return result.to(query.dtype).view(rows, kv_heads * group, size)

    def _calls_of(self, window: int | None) -> Iterator[_Call]:
        assert self._plan is not None, "attend() before prepare()"
        for unit in self._plan.units():
            firsts = np.zeros_like(unit.lasts) if window is None else unit.firsts[window]
            lengths = unit.stops - unit.starts
            whole = (firsts == 0).all(axis=1) & (unit.lasts == lengths[:, None]).all(axis=1)
            # Pieces that all rows see whole, at the same offsets, are one.
            by_turns: dict[bytes, list[int]] = {}
            for piece in np.flatnonzero(whole).tolist():
                by_turns.setdefault(unit.turns[piece].tobytes(), []).append(piece)
            for pieces in by_turns.values():
                ranges = zip(unit.starts[pieces].tolist(), unit.stops[pieces].tolist(), strict=True)
                yield self._call(unit, pieces[0], slice(None), tuple(ranges), None)
            for piece in np.flatnonzero(~whole).tolist():
                yield from self._tiers(unit, piece, firsts[piece], unit.lasts[piece])

    def _tiers(self, unit: Unit, piece: int, firsts: IntArray, lasts: IntArray) -> Iterator[_Call]:
        """Cut rows into tiers; those that see nothing of the piece are left out."""
        seeing = np.flatnonzero(firsts < lasts)
        if len(seeing) == 0:
            return
        order = seeing[np.lexsort((firsts[seeing], lasts[seeing]))]
        cuts = np.flatnonzero(np.diff(firsts[order]) | np.diff(lasts[order])) + 1
        most = min(_MAX_TIERS, max(1, len(order) // _MIN_TIER_ROWS))
        if len(cuts) >= most:
            cuts = np.linspace(0, len(order), most + 1).astype(np.int64)[1:-1]
        for start, stop in itertools.pairwise([0, *cuts.tolist(), len(order)]):
            tier = order[start:stop]
            first, last = int(firsts[tier].min()), int(lasts[tier].max())
            key = np.arange(first, last)
            visible = (key >= firsts[tier, None]) & (key < lasts[tier, None])
            at = int(unit.starts[piece])
            yield self._call(unit, piece, tier, ((at + first, at + last),), self._additive(visible))

    def _call(
        self,
        unit: Unit,
        piece: int,
        chosen: IntArray | slice,
        ranges: tuple[tuple[int, int], ...],
        mask: Tensor | None,
    ) -> _Call:
        turns = unit.turns[piece, chosen]
        return _Call(
            self._index(unit.rows[chosen]),
            self._index(turns) if turns.any() else None,
            ranges,
            mask,
        )

    def _additive(self, visible: np.ndarray) -> Tensor | None:
        if visible.all():
            return None
        mask = torch.zeros(visible.shape, dtype=self._dtype, device=self._device)
        return mask.masked_fill_(torch.as_tensor(~visible, device=self._device), -math.inf)


def _take(memory: Tensor, ranges: tuple[tuple[int, int], ...]) -> Tensor:
    """Slots of memory (KVH, S, D): a view where they are one range, else a copy."""
    pieces = [memory[:, start:stop] for start, stop in ranges]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _attention(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention of (KVH, G, R, D) queries over (KVH, n, D) keys and values.

    Args:
        query: rows to attend.
        keys: their keys; each of the G queries of a key head reads the same.
        values: their values.
        scale: of the scores.
        mask: (R, n), added to the scores.

    Returns:
        The result (KVH, G, R, D) and its natural log-sum-exp (KVH, G, R), float32.
    """
    if query.device.type != "cpu":
        return _written_out(query, keys, values, scale, mask)
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


def _written_out(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same as `_attention`, in matrix products that any device has."""
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
