"""Shared-in-place attention in plain torch.

Each piece of the plan is one call of a fused attention that also returns the log-sum-exp, and the
pieces of a row are merged by it. On a CPU the fused call is torch's own flash attention; elsewhere
it is written out in matrix products.
"""

import math

import numpy as np
import torch
from torch import Tensor

from tokendance.attention.interface import PackedBatch
from tokendance.attention.merge import merge_rows
from tokendance.attention.plan import AttentionPlan, OwnPart, SharedPart, Tier, make_plan
from tokendance.attention.rope import Rope


class TorchBackend:
    """Attention over the pieces of a plan, each shared key read once for all its readers."""

    def __init__(self, rope: Rope, device: torch.device, dtype: torch.dtype) -> None:
        """Keep the model's rotation; `dtype` is that of queries and memory."""
        self._rope = rope
        self._device = device
        self._dtype = dtype
        self._plan = AttentionPlan((), ())
        self._write = torch.empty(0, dtype=torch.int64)
        self._shared: list[_SharedTensors] = []
        self._merges = False

    def prepare(self, batch: PackedBatch) -> None:
        """Plan the step and make the tensors that all its layers need."""
        self._plan = make_plan(batch)
        self._write = self._index(batch.write_slots())
        self._shared = [_SharedTensors(part, self) for part in self._plan.shared]
        self._merges = bool(self._shared) or any(
            part.attend_new and part.ranges for part in self._plan.own
        )

    def _index(self, values: np.ndarray) -> Tensor:
        return torch.as_tensor(values.astype(np.int64), device=self._device)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> Tensor:
        """See `Backend.attend`."""
        keys.index_copy_(1, self._write, key)
        values.index_copy_(1, self._write, value)
        kv_heads, group, rows, size = query.shape
        # Laid out as the model wants it back; summed in float32 where there is anything to sum.
        dtype = torch.float32 if self._merges else query.dtype
        result = torch.empty(rows, kv_heads, group, size, dtype=dtype, device=query.device)
        output = result.permute(1, 2, 0, 3)
        lse = torch.empty(kv_heads, group, rows, dtype=torch.float32, device=query.device)
        for own in self._plan.own:
            self._attend_own(own, query, key, value, keys, values, scale, output, lse)
        for shared in self._shared:
            self._attend_shared(shared, query, keys, values, scale, output, lse)
        return result.to(query.dtype).view(rows, kv_heads * group, size)

    def _attend_own(
        self,
        part: OwnPart,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        output: Tensor,
        lse: Tensor,
    ) -> None:
        """Write the result of a request's own part into `output` and `lse`."""
        mine = slice(part.first_row, part.first_row + part.num_rows)
        mine_query = query[:, :, mine]
        if part.attend_new:
            output[:, :, mine], lse[:, :, mine] = _attention(
                mine_query, key[:, mine], value[:, mine], scale, causal=True
            )
        elif not part.ranges:
            output[:, :, mine], lse[:, :, mine] = 0, -math.inf  # all it reads is in shared parts
        if part.ranges:
            own_keys, own_values = _take(keys, part.ranges), _take(values, part.ranges)
            result, result_lse = _attention(mine_query, own_keys, own_values, scale)
            if part.attend_new:
                merge_rows(output, lse, result, result_lse, mine)
            else:
                output[:, :, mine], lse[:, :, mine] = result, result_lse

    def _attend_shared(
        self,
        part: "_SharedTensors",
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        output: Tensor,
        lse: Tensor,
    ) -> None:
        """Merge the result of stacked rows over a piece of memory into `output` and `lse`."""
        stacked = query.index_select(2, part.rows)  # (KVH, G, R, D)
        if part.tables is not None:
            stacked = self._rope.rotate(stacked, part.tables)
        results: list[tuple[Tensor, Tensor]] = []
        for tier, mask in zip(part.tiers, part.masks, strict=True):
            seen = slice(part.start, part.start + tier.num_keys)
            results.append(
                _attention(
                    stacked[:, :, tier.start : tier.stop],
                    keys[:, seen],
                    values[:, seen],
                    scale,
                    mask=mask,
                )
            )
        result = torch.cat([out for out, _ in results], dim=2)
        result_lse = torch.cat([part_lse for _, part_lse in results], dim=2)
        merge_rows(output, lse, result, result_lse, part.rows)


class _SharedTensors:
    """A shared part with its tensors: rows, tables of -d, and additive masks."""

    def __init__(self, part: SharedPart, backend: TorchBackend) -> None:
        self.start = part.start
        self.tiers = part.tiers
        self.rows = backend._index(part.rows)
        self.tables = (
            backend._rope.tables(-part.offsets, backend._device) if part.offsets.any() else None
        )
        self.masks = [_additive(tier, backend) for tier in part.tiers]


def _additive(tier: Tier, backend: TorchBackend) -> Tensor | None:
    if tier.visible is None:
        return None
    visible = torch.as_tensor(tier.visible, device=backend._device)
    mask = torch.zeros(visible.shape, dtype=backend._dtype, device=backend._device)
    return mask.masked_fill_(~visible, -math.inf)


def _take(memory: Tensor, ranges: tuple[tuple[int, int], ...]) -> Tensor:
    """Slots of memory (KVH, S, D): a view where they are one range, else a copy."""
    pieces = [memory[:, start:stop] for start, stop in ranges]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of (KVH, G, R, D) queries over (KVH, n, D) keys and values.

    Args:
        query: rows to attend.
        keys: their keys; each of the G queries of a key head reads the same.
        values: their values.
        scale: of the scores.
        causal: row i sees keys 0 ... i; R and n are equal then.
        mask: (R, n), added to the scores.

    Returns:
        The result (KVH, G, R, D) and its natural log-sum-exp (KVH, G, R), float32.
    """
    if query.device.type != "cpu":
        return _written_out(query, keys, values, scale, causal=causal, mask=mask)
    kv_heads, group, rows, size = query.shape
    if causal or mask is not None:
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
        causal,
        attn_mask=None if mask is None else mask[None, None],
        scale=scale,
    )
    return result.reshape(query.shape), lse.reshape(query.shape[:-1])


def _written_out(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same as `_attention`, in matrix products that any device has."""
    kv_heads, group, rows, size = query.shape
    scores = query.reshape(kv_heads, group * rows, size) @ keys.transpose(-1, -2)
    scores = scores.float().mul_(scale).view(kv_heads, group, rows, -1)
    if causal:
        future = torch.ones(rows, rows, dtype=torch.bool, device=query.device).triu_(1)
        scores = scores.masked_fill(future, -math.inf)
    if mask is not None:
        scores = scores + mask
    lse = scores.logsumexp(dim=-1)
    weights = (scores - lse.unsqueeze(-1)).exp_().to(values.dtype)
    result = weights.view(kv_heads, group * rows, -1) @ values
    return result.view(query.shape), lse
