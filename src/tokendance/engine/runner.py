"""The runner: packs a step, runs the model, and lets attention read and write KV memory."""

import contextlib
import math
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokendance.attention.interface import BackendFactory, PackedBatch, PackedRequest
from tokendance.config import format_bytes
from tokendance.disk.kv_file import KVRows
from tokendance.engine.blend import CHECK_LAYER, BlendPass
from tokendance.engine.scheduler import Scheduled
from tokendance.errors import ConfigError, StoreError
from tokendance.models import hook
from tokendance.models.loader import LoadedModel


@dataclass(frozen=True, slots=True, eq=False)
class KVMemory:
    """Room for keys and values; the system maps it when it is written.

    Engines that are never used at the same time may take turns on one memory.

    Attributes:
        keys: (L, KVH, S, D).
        values: likewise.
    """

    keys: Tensor
    values: Tensor

    @classmethod
    def allocate(cls, model: LoadedModel, num_slots: int) -> "KVMemory":
        """Reserve room for `num_slots` tokens of a model.

        Raises:
            ConfigError: if there is not so much.
        """
        shape = model.shape
        size = (shape.num_layers, shape.num_kv_heads, num_slots, shape.head_dim)
        try:
            return cls(*(_empty(size, model.dtype, model.device) for _ in range(2)))
        except (RuntimeError, OSError, OverflowError) as error:
            needed = format_bytes(num_slots * shape.kv_bytes_per_token(model.dtype))
            raise ConfigError(
                f"{needed} of KV memory cannot be allocated on {model.device}: "
                f"{str(error).splitlines()[0]} Lower kv_budget (--kv-budget)."
            ) from error

    def read(self, slots: npt.NDArray[np.int32], positions: npt.NDArray[np.int32]) -> KVRows:
        """Copy the KV of some slots out of this memory.

        Args:
            slots: int32 (n,).
            positions: int32 (n,), at which their keys were rotated.
        """
        index = torch.as_tensor(slots, dtype=torch.int64, device=self.keys.device)
        keys, values = (
            _as_numpy(memory.index_select(2, index)) for memory in (self.keys, self.values)
        )
        return KVRows(positions, keys, values)

    def write(self, slots: npt.NDArray[np.int32], rows: KVRows) -> None:
        """Copy KV into slots.

        Args:
            slots: int32 (n,).
            rows: n of them, of this memory's shape and dtype.

        Raises:
            StoreError: if they are of another shape or dtype.
        """
        kind = str(_as_numpy(self.keys[:0]).dtype)
        layers, heads, _, size = self.keys.shape
        wanted = (layers, heads, len(slots), size)
        if rows.keys.shape != wanted or rows.values.shape != wanted or rows.keys.dtype != kind:
            raise StoreError(
                f"Stored KV of shape {rows.keys.shape} and kind {rows.keys.dtype} does not fit "
                f"{wanted} and {kind}. It is of another model."
            )
        index = torch.as_tensor(slots, dtype=torch.int64, device=self.keys.device)
        for memory, new in ((self.keys, rows.keys), (self.values, rows.values)):
            memory.index_copy_(2, index, _as_tensor(new, memory))


def _as_numpy(tensor: Tensor) -> npt.NDArray[Any]:
    """The same numbers for numpy, which has no bfloat16: its bits as uint16."""
    tensor = tensor.cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    found: npt.NDArray[Any] = tensor.numpy()
    return found


def _as_tensor(array: npt.NDArray[Any], like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).view(like.dtype).to(like.device)


def _empty(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that is not mapped before it is written; in huge pages where the system has them.

    A step reads a little of everything, in each layer and head apart: with pages of 4 KB, looking
    up where they are takes longer than reading them.
    """
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=dtype, device=device)
    # Private: what is shared with child processes follows another setting of the system.
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, math.prod(size) * dtype.itemsize, flags=private)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(size)


class Runner:
    """Runs packed batches through the model, over KV memory.

    Attributes:
        memory: holds the KV of all slots.
        on_logits: replaces the logits of each step before anything is chosen from them; for tests
            that want to see or spoil them.
    """

    def __init__(self, model: LoadedModel, memory: KVMemory, backend: BackendFactory) -> None:
        """Run `model` over `memory`, with the attention that `backend` makes."""
        self._model = model
        self.memory = memory
        self._backend = backend(model.layers, model.shape.head_dim, model.device, model.dtype)
        self._blend: BlendPass | None = None  # while a pass runs in which requests copy KV
        self.on_logits: Callable[[Sequence[Scheduled], Tensor], Tensor] | None = None

    def run(self, step: Sequence[Scheduled], slot_position: np.ndarray) -> Tensor:
        """Run one packed forward pass.

        Args:
            step: what to compute; its requests' rows lie in this order.
            slot_position: int32 (S,), of the store.

        Returns:
            float32 (R, vocabulary): logits of the last token of each item that wants them.
        """
        requests: list[PackedRequest] = []
        tokens: list[np.ndarray] = []
        logit_rows: list[int] = []
        first_row = 0
        for item in step:
            assert item.request.placement is not None
            requests.append(PackedRequest(first_row, item.positions, item.request.placement.slots))
            tokens.append(item.request.tokens_at(item.positions))
            first_row += len(item.positions)
            if item.wants_logits:
                logit_rows.append(first_row - 1)
        batch = PackedBatch(requests, slot_position)
        self._backend.prepare(batch)
        device = self._model.device
        inputs = (
            torch.as_tensor(np.concatenate(tokens).astype(np.int64), device=device),
            torch.as_tensor(np.concatenate([item.positions for item in step]), device=device),
        )
        module = self._model.module
        if BlendPass.is_needed(step):
            self._blend = blend = BlendPass(step, batch, self._model.layers, device)
            try:
                with hook.rows_dropped(module, CHECK_LAYER, lambda: blend.kept):
                    logits = hook.forward(module, *inputs, blend.logit_rows, self).float()
            finally:
                self._blend = None
        else:
            rows = torch.as_tensor(logit_rows, dtype=torch.int64, device=device)
            logits = hook.forward(module, *inputs, rows, self).float()
        if self.on_logits is not None:
            logits = self.on_logits(step, logits)
        return logits

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
        kv_heads, (_, _, rows, size) = key.shape[1], query.shape
        stacked = query[0].reshape(kv_heads, -1, rows, size)  # (KVH, G, T, D)
        tensors = (
            layer,
            stacked,
            key[0],
            value[0],
            self.memory.keys[layer],
            self.memory.values[layer],
            scale,
        )
        if self._blend is not None:
            return self._blend.attend(*tensors, self._backend)
        return self._backend.attend(*tensors)
