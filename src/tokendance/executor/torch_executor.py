"""The executor on torch: a model of transformers, KV memory, attention, and sampling."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokendance.attention.backends import as_native
from tokendance.attention.interface import (
    BackendFactory,
    PackedBatch,
    PackedRequest,
    SlotRanges,
)
from tokendance.executor.kv_pool import KVPool
from tokendance.executor.sampler import sample, score
from tokendance.executor.step import SlotArray, StepInput, StepOutput
from tokendance.models import hook
from tokendance.models.loader import LoadedModel
from tokendance.store.kv_rows import KVRows

if TYPE_CHECKING:  # it may not be built
    from tokendance.attention.native_backend import Place


class TorchExecutor:
    """Packs a step into one row of tokens, and lets attention read and write KV memory.

    Attributes:
        pool: holds the KV of all slots.
        on_logits: replaces the logits of each step before anything is chosen from them; for tests
            that want to see or spoil them.
    """

    def __init__(self, model: LoadedModel, pool: KVPool, backend: BackendFactory) -> None:
        self._model = model
        self.pool = pool
        self._backend = backend(model.layers, model.shape.head_dim, model.device, model.dtype)
        self._native = as_native(self._backend)
        self._memory = list(zip(pool.keys, pool.values, strict=True))  # to cut it takes 2 us
        self.on_logits: Callable[[StepInput, Tensor], Tensor] | None = None
        # Of the last step's requests, by the id of their slots, which are kept so that no other
        # array has that id.
        self._ranges: dict[int, tuple[SlotArray, SlotRanges]] = {}

    def execute(self, step: StepInput) -> StepOutput:
        """Run one forward pass, and choose the next tokens; see `Executor`."""
        logits = self._forward(step, self._pack(step))
        num_targets = sum(len(request.targets) for request in step.requests)
        targets = score(logits[:num_targets], step) if num_targets else ()
        logits = logits[num_targets:]
        if self.on_logits is not None:
            logits = self.on_logits(step, logits)
        return replace(sample(logits, step.sampling), targets=targets)

    def read_kv(self, slots: SlotArray) -> KVRows:
        """Copy KV out of memory; see `Executor`."""
        return self.pool.read(slots)

    def positions_of(self, slots: SlotArray) -> npt.NDArray[np.int32]:
        """Positions of keys; see `Executor`."""
        return self.pool.slot_position[slots]

    def write_kv(self, slots: SlotArray, rows: KVRows) -> None:
        """Copy KV into memory; see `Executor`."""
        self.pool.write(slots, rows)

    def _pack(self, step: StepInput) -> PackedBatch:
        """Lay the requests' tokens side by side, and note at which positions their keys will be."""
        slot_position = self.pool.slot_position
        known, self._ranges = self._ranges, {}
        requests: list[PackedRequest] = []
        first_row = 0
        for request in step.requests:
            positions, slots = request.positions, request.slots
            slot_position[slots[positions]] = positions
            # The same array as in the last step: the same request, whose context has grown.
            _, ranges = self._ranges[id(slots)] = known.get(
                id(slots), (slots, SlotRanges(request.begin))
            )
            requests.append(PackedRequest(first_row, positions, slots, ranges))
            first_row += len(positions)
        if len(requests) == 1:  # no reader has to be found if it reads all where it stands
            length = int(positions[-1]) + 1
            in_place = step.requests[0].begin == 0 and np.array_equal(
                slot_position[slots[:length]], np.arange(length)
            )
            requests = [replace(requests[0], reads_others=not in_place)]
        return PackedBatch(requests, slot_position)

    def _forward(self, step: StepInput, batch: PackedBatch) -> Tensor:
        """Logits before all targets, then of the last token of each request that wants one.

        They are float32 (targets + R, vocabulary).
        """
        self._backend.prepare(batch)
        ends = np.cumsum([len(request.positions) for request in step.requests])
        wanting = [request.sampling is not None for request in step.requests]
        scored = [
            np.arange(len(request.targets)) + packed.first_row
            for request, packed in zip(step.requests, batch.requests, strict=True)
        ]
        rows = np.concatenate([*scored, ends[wanting] - 1])
        return self._call_model(step, torch.as_tensor(rows, device=self._model.device))

    def _call_model(self, step: StepInput, logit_rows: Tensor) -> Tensor:
        """Run the model on a step's tokens; logits of some rows, float32 (R, vocabulary)."""
        device = self._model.device
        token_ids = np.concatenate([request.token_ids for request in step.requests])
        positions = np.concatenate([request.positions for request in step.requests])
        inputs = (
            torch.as_tensor(token_ids.astype(np.int64), device=device),
            torch.as_tensor(positions, device=device),
        )
        return hook.forward(self._model.module, *inputs, logit_rows, self).float()

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        extra: dict[str, Any],
    ) -> Tensor:
        """Attend in one layer; see `models.hook.LayerHook`."""
        del extra  # what it says was found at load time
        return self._attend(layer, query, key, value, scale)

    def place(self, layer: int) -> "Place | None":
        """Where native code finds what a layer attends to; see `models.hook.LayerHook`."""
        return None if self._native is None else self._native.place(layer, *self._memory[layer])

    def _attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """Attend in one layer; query (T, H, D), key and value (T, KVH, D)."""
        return self._backend.attend(layer, query, key, value, *self._memory[layer], scale)
