"""What the tier needs of the memory that holds keys and values."""

from typing import Protocol

import numpy as np
import numpy.typing as npt

from tokendance.disk.kv_file import KVRows
from tokendance.store.entries import Slots


class RowMemory(Protocol):
    """Memory whose slots can be copied out and in; `engine.runner.KVMemory` is one."""

    def read(self, slots: Slots, positions: npt.NDArray[np.int32]) -> KVRows:
        """Copy the KV of slots, whose keys were rotated at these positions, out of memory."""

    def write(self, slots: Slots, rows: KVRows) -> None:
        """Copy rows into slots.

        Raises:
            StoreError: if they are of another shape or dtype.
        """
