"""Selective recomputation as CacheBlend does it (arXiv 2405.16444, section 4): the baseline `pic`.

A request takes its own copy of the shared tokens' KV, with keys rotated to its own positions, and
finds out while it is computed which of them to recompute:

    layer 0     all new tokens are computed, copied ones included
    layer 1     queries, keys and values of all of them; the copied tokens are ranked by how far
                their new keys are from the copied ones (squared distance, over all heads)
    from there  only tokens without a source, and the 15% that deviate most; the others keep the
                copy

So it costs a layer of everything, 15% of the rest, and a rotated copy per request. LMCache, where
CacheBlend lives on, drops rows at the same place, before the attention of layer 1. Requests that
copy nothing pass through whole, an owner in the same pass among them: its keys of a layer are
written before anybody copies them.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tokendance.attention.interface import (
    Backend,
    BackendFactory,
    LayerKind,
    PackedBatch,
    PackedRequest,
)
from tokendance.attention.rope import OffsetTables
from tokendance.bench.pic.planner import num_recomputed
from tokendance.bench.pic.rows import rows_dropped
from tokendance.errors import ConfigError
from tokendance.executor.kv_pool import KVPool
from tokendance.executor.step import StepInput
from tokendance.executor.torch_executor import TorchExecutor
from tokendance.models.loader import LoadedModel

if TYPE_CHECKING:  # it may not be built
    from tokendance.attention.native_backend import Place

CHECK_LAYER = 1
MIN_LAYERS = CHECK_LAYER + 2  # rows are dropped between layers, so there has to be another one


class PicExecutor(TorchExecutor):
    """Runs steps in which some requests copy KV and recompute a part of it; see the module."""

    def __init__(self, model: LoadedModel, pool: KVPool, backend: BackendFactory) -> None:
        """See `TorchExecutor`.

        Raises:
            ConfigError: if the model has too few layers to drop rows after the second.
        """
        if model.shape.num_layers < MIN_LAYERS:
            raise ConfigError(
                "reuse 'pic' and 'pic-batched' compare keys of the second layer and drop rows "
                f"after it, and {model.name} has {model.shape.num_layers} layers. "
                "Use another reuse."
            )
        super().__init__(model, pool, backend)
        self._blend: BlendPass | None = None  # while a pass runs in which requests copy KV

    def _forward(self, step: StepInput, batch: PackedBatch) -> Tensor:
        if not any((request.copied_from >= 0).any() for request in step.requests):
            return super()._forward(step, batch)
        self._backend.prepare(batch)
        blend = BlendPass(step, batch, self._model.layers, self.pool, self._backend)
        self._blend = blend
        try:
            module, num_rows = self._model.module, batch.num_rows
            with rows_dropped(module, CHECK_LAYER, num_rows, lambda: blend.kept):
                return self._call_model(step, blend.logit_rows)
        finally:
            self._blend = None

    def place(self, layer: int) -> "Place | None":
        """See `LayerHook`; layers of a blend are attended to by it."""
        return None if self._blend is not None else super().place(layer)

    def _attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        if self._blend is None:
            return super()._attend(layer, query, key, value, scale)
        return self._blend.attend(layer, query, key, value, scale)


class BlendPass:
    """One forward pass in which some requests copy KV and recompute a part of it.

    Attributes:
        kept: int64, rows that go on; known when `CHECK_LAYER` has keys.
        logit_rows: int64, for each item that wants logits its last row among the kept ones.
    """

    def __init__(
        self,
        step: StepInput,
        batch: PackedBatch,
        layers: Sequence[LayerKind],
        pool: KVPool,
        backend: Backend,
    ) -> None:
        """Note which rows of a batch are copied, and from where; `batch` has the rows of `step`."""
        self._batch = batch
        self._layers = layers
        self._pool = pool
        self._backend = backend
        self._device = pool.keys.device
        self._num_chosen: list[int] = []
        rows, sources, slots, offsets = [], [], [], []
        logit_rows: list[int] = []
        num_kept = 0
        for request, packed in zip(step.requests, batch.requests, strict=True):
            copied = np.flatnonzero(request.copied_from >= 0)
            copied_from = request.copied_from[copied]
            num_chosen = num_recomputed(len(copied))
            positions = packed.positions[copied]
            rows.append(packed.first_row + copied)
            sources.append(copied_from)
            slots.append(packed.slots[positions])
            offsets.append(positions - batch.slot_position[copied_from])
            self._num_chosen.append(num_chosen)
            num_kept += len(packed.positions) - len(copied) + num_chosen
            if request.sampling is not None:
                logit_rows.append(num_kept - 1)
        self._num_copied = [len(of_request) for of_request in rows]
        self._rows = np.concatenate(rows)
        self._sources = self._index(np.concatenate(sources))
        self._slots = self._index(np.concatenate(slots))
        self._offsets = np.concatenate(offsets)
        self._tables = OffsetTables(self._offsets, self._device)
        self.logit_rows = self._index(np.array(logit_rows, np.int64))
        self.kept = torch.empty(0, dtype=torch.int64)
        self._write = torch.empty(0, dtype=torch.int64)

    def _index(self, values: np.ndarray) -> Tensor:
        return torch.as_tensor(values.astype(np.int64), device=self._device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attend in one layer; see `Backend.attend`.

        All rows come in up to `CHECK_LAYER`, and the kept ones after it.

        Returns:
            (rows, H, D) as many rows as came in; in `CHECK_LAYER` those that go no further are 0.
        """
        keys, values = self._pool.keys[layer], self._pool.values[layer]
        num_rows = len(query)
        if layer == CHECK_LAYER:
            # Rows of this very pass may be what others copy from.
            keys.index_copy_(1, self._index(self._batch.write_slots()), key.transpose(0, 1))
            self._choose(key.transpose(0, 1), self._rotated(layer, keys))
            narrow = self._narrow_batch()
            self._write = self._index(narrow.write_slots())
            self._backend.prepare(narrow)
            query, key, value = query[self.kept], key[self.kept], value[self.kept]
        if layer >= CHECK_LAYER:
            keys.index_copy_(1, self._write, key.transpose(0, 1))
            values.index_copy_(1, self._write, value.transpose(0, 1))
            keys.index_copy_(1, self._slots, self._rotated(layer, keys))
            values.index_copy_(1, self._slots, values.index_select(1, self._sources))
        result = self._backend.attend(layer, query, key, value, keys, values, scale)
        if layer != CHECK_LAYER:
            return result
        whole = result.new_zeros(num_rows, *result.shape[1:])
        whole[self.kept] = result
        return whole

    def _rotated(self, layer: int, keys: Tensor) -> Tensor:
        """The sources' keys of a layer, at the positions that they are copied to."""
        rope = self._layers[layer].rope
        return rope.rotate(keys.index_select(1, self._sources), self._tables.of(rope))

    def _choose(self, key: Tensor, copies: Tensor) -> None:
        """Choose each request's copied tokens to recompute; the others are left to be copied."""
        new = key.index_select(1, self._index(self._rows)).float()
        deviation = (new - copies.float()).square_().sum(dim=(0, 2))  # (copied tokens,)
        is_copied = np.ones(len(self._rows), np.bool_)
        first = 0
        of_requests = torch.split(deviation, self._num_copied)
        for of_request, num_chosen in zip(of_requests, self._num_chosen, strict=True):
            chosen = of_request.topk(num_chosen).indices.cpu().numpy()
            is_copied[first + chosen] = False
            first += len(of_request)
        is_kept = np.ones(self._batch.num_rows, np.bool_)
        is_kept[self._rows[is_copied]] = False
        self.kept = self._index(np.flatnonzero(is_kept))
        left = self._index(np.flatnonzero(is_copied))
        self._sources, self._slots = self._sources[left], self._slots[left]
        self._tables = OffsetTables(self._offsets[is_copied], self._device)

    def _narrow_batch(self) -> PackedBatch:
        """The batch with the kept rows only."""
        kept = self.kept.cpu().numpy()
        requests: list[PackedRequest] = []
        first_row = 0
        for request in self._batch.requests:
            first, last = np.searchsorted(
                kept, (request.first_row, request.first_row + len(request.positions))
            )
            positions = request.positions[kept[first:last] - request.first_row]
            requests.append(replace(request, first_row=first_row, positions=positions))
            first_row += len(positions)
        return PackedBatch(requests, self._batch.slot_position)
