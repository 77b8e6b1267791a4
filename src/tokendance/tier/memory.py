"""What the tier needs of the memory that holds keys and values."""

from typing import Protocol

from tokendance.store.entries import Slots
from tokendance.store.kv_rows import KVRows


class RowMemory(Protocol):
    """Memory whose slots can be copied out and in; every executor is one."""

    def read_kv(self, slots: Slots) -> KVRows:
        """Copy the KV of slots out of memory, with the positions of its keys."""
        ...

    def write_kv(self, slots: Slots, rows: KVRows) -> None:
        """Copy rows into slots.

        Raises:
            StoreError: if they are of another shape or dtype.
        """
        ...
