"""The plain reference: gathers and rotates each request's own dense KV, then attends.

This is what engines do that restore a dense cache. It copies everything and is slow on purpose:
the backends are tested against it.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tokendance.attention.interface import LayerKind, PackedBatch


class ReferenceBackend:
    """Attention request by request, over a dense copy of its keys, in one softmax."""

    def __init__(
        self, layers: Sequence[LayerKind], head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """See `BackendFactory`."""
        del head_dim, dtype
        self._layers = layers
        self._device = device
        self._batch: PackedBatch | None = None

    def prepare(self, batch: PackedBatch) -> None:
        """Take the batch that the next calls of `attend` are about."""
        self._batch = batch

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
        rope, window = self._layers[layer].rope, self._layers[layer].window
        assert self._batch is not None, "attend() before prepare()"
        write = torch.as_tensor(self._batch.write_slots(), device=self._device)
        keys[:, write] = key.transpose(0, 1)
        values[:, write] = value.transpose(0, 1)
        by_head = query.view(len(query), key.shape[1], -1, query.shape[2])
        by_head = by_head.permute(1, 2, 0, 3)  # (KVH, G, T, D)
        if output is None:
            output = query.new_empty(query.shape)
        for request in self._batch.requests:
            # What stands before the beginning of its context is nobody's.
            read = np.arange(request.ranges.start, int(request.positions[-1]) + 1)
            slots = torch.as_tensor(request.slots[read].astype(np.int64), device=self._device)
            offsets = read - self._batch.slot_position[request.slots[read]]
            tables = rope.tables(offsets, self._device)
            dense_keys = rope.rotate(keys[:, slots].float(), tables).double()
            dense_values = values[:, slots].double()

            mine = slice(request.first_row, request.first_row + len(request.positions))
            positions = torch.as_tensor(request.positions.astype(np.int64), device=self._device)
            distance = positions[:, None] - torch.as_tensor(read, device=self._device)
            hidden = distance < 0
            if window is not None:
                hidden |= distance >= window
            scores = by_head[:, :, mine].double() @ dense_keys[:, None].transpose(-1, -2) * scale
            weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
            result = weights @ dense_values[:, None]  # (KVH, G, rows, D)
            output[mine] = result.flatten(0, 1).transpose(0, 1).to(output.dtype)
        return output
