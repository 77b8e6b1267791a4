"""KV memory: keys and values of all layers, by slot."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokendance.errors import ConfigError, StoreError
from tokendance.memory import empty_in_huge_pages
from tokendance.models.loader import LoadedModel
from tokendance.store.kv_rows import KVRows
from tokendance.units import format_bytes


class KVPool:
    """Room for keys and values; the system maps it when it is written.

    Executors that are never used at the same time may take turns on one pool.

    Attributes:
        keys: (L, KVH, S, D).
        values: likewise.
        slot_position: int32 (S,), position at which the key of each slot was rotated.
    """

    def __init__(self, model: LoadedModel, num_slots: int) -> None:
        """Reserve room for `num_slots` tokens of a model.

        Raises:
            ConfigError: if there is not so much.
        """
        shape = model.shape
        size = (shape.num_layers, shape.num_kv_heads, num_slots, shape.head_dim)
        try:
            self.keys, self.values = (
                empty_in_huge_pages(size, model.dtype, model.device) for _ in range(2)
            )
            self.slot_position = np.zeros(num_slots, np.int32)
        except (RuntimeError, OSError, OverflowError) as error:
            needed = format_bytes(num_slots * shape.kv_bytes_per_token(model.dtype))
            raise ConfigError(
                f"{needed} of KV memory cannot be allocated on {model.device}: "
                f"{str(error).splitlines()[0]} Lower kv_budget (--kv-budget)."
            ) from error

    def read(self, slots: npt.NDArray[np.int32]) -> KVRows:
        """Copy the KV of some slots, int32 (n,), out of this memory, with its keys' positions."""
        index = torch.as_tensor(slots, dtype=torch.int64, device=self.keys.device)
        keys, values = (
            _as_numpy(memory.index_select(2, index)) for memory in (self.keys, self.values)
        )
        return KVRows(self.slot_position[slots], keys, values)

    def write(self, slots: npt.NDArray[np.int32], rows: KVRows) -> None:
        """Copy n rows into slots, int32 (n,).

        Raises:
            StoreError: if they are of another shape or dtype than this memory.
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
        self.slot_position[slots] = rows.positions


def _as_numpy(tensor: Tensor) -> npt.NDArray[Any]:
    """The same numbers for numpy, which has no bfloat16: its bits as uint16."""
    tensor = tensor.cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    array: npt.NDArray[Any] = tensor.numpy()
    return array


def _as_tensor(array: npt.NDArray[Any], like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).view(like.dtype).to(like.device)
