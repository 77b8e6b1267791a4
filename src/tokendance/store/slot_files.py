"""Which rows of which files the slots of memory hold, and the other way round.

A slot that was given away and taken again has another stamp, so what is known of it says when it is
no longer true: nobody has to be told of evictions.
"""

from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from tokendance.disk.records import Extents, FileId
from tokendance.store.entries import Slots
from tokendance.store.kv_store import KVStore
from tokendance.store.pages import Holder

_NO_FILE = -1


class SlotFiles:
    """What of a store's memory is on disk, and where."""

    def __init__(self, store: KVStore) -> None:
        """Begin with nothing on disk."""
        self._store = store
        count = len(store.slot_position)
        self._file = np.full(count, _NO_FILE, np.int64)
        self._row = np.zeros(count, np.int64)
        self._stamp = np.full(count, -1, np.int64)
        self._slots: dict[FileId, Slots] = {}

    def __len__(self) -> int:
        """Files of which something may be in memory."""
        return len(self._slots)

    def note(self, file: FileId, slots: Slots) -> None:
        """Note that these slots hold the rows of a file, in order."""
        self._file[slots] = file
        self._row[slots] = np.arange(len(slots))
        self._stamp[slots] = self._store.slot_stamp[slots]
        self._slots[file] = slots

    def forget(self, files: Collection[FileId]) -> None:
        """Note that files are not there; nothing happens for those of which nothing is known."""
        known = [file for file in files if self._slots.pop(file, None) is not None]
        if known:  # a file that was read again has slots of the first time, too
            self._stamp[np.isin(self._file, known)] = -1

    def forget_all_but(self, files: Collection[FileId]) -> None:
        """Note that of all files only these are there."""
        self.forget(self._slots.keys() - files)

    def written(self, slots: Slots | slice = slice(None)) -> npt.NDArray[np.bool_]:
        """Whether what slots hold is on disk."""
        same: npt.NDArray[np.bool_] = self._stamp[slots] == self._store.slot_stamp[slots]
        return same

    def extents_of(self, slots: Slots) -> Extents:
        """Where slots are on disk, in their order, up to the first that is not."""
        missing = np.flatnonzero(~self.written(slots))
        length = int(missing[0]) if len(missing) else len(slots)
        files, rows = self._file[slots[:length]], self._row[slots[:length]]
        goes_on = (np.diff(files) == 0) & (np.diff(rows) == 1)
        firsts = np.flatnonzero(np.concatenate(([True], ~goes_on))) if length else np.empty(0, int)
        counts = np.diff(np.append(firsts, length))
        return np.stack([files[firsts], rows[firsts], counts], axis=1).astype(np.int64)

    def slots_of(self, extents: Extents, skip: int = 0) -> Slots:
        """Slots of a cache's tokens from number `skip` on, up to the first that memory lacks."""
        slots = [np.empty(0, np.int32)]
        done = 0
        for file, first, count in extents.tolist():
            past = max(0, min(count, skip - done))
            known = self._slots.get(FileId(file), slots[0])
            rows = known[first + past : first + count]
            alive = self._alive(FileId(file), rows)
            slots.append(rows[: int(np.argmin(alive)) if not alive.all() else len(rows)])
            done += count
            if len(slots[-1]) < count - past:
                break
        return np.concatenate(slots)

    def in_memory(self, file: FileId, extents: Extents) -> bool:
        """Whether memory has all rows of a file that these extents of it name."""
        slots = self._slots.get(file)
        if slots is None:
            return False
        rows = np.concatenate([np.arange(first, first + count) for _, first, count in extents])
        return bool(rows.max() < len(slots) and self._alive(file, slots[rows]).all())

    def sparse(self, needed: npt.NDArray[np.bool_], least_share: float) -> list[FileId]:
        """Files of whose rows some are needed, and less than a share.

        Args:
            needed: by slot.
            least_share: of the rows of a file.
        """
        slots = np.flatnonzero(needed & self.written())
        files, place = np.unique(self._file[slots], return_inverse=True)
        # A row may be in several slots.
        stride = 1 + self._row.max()
        rows = np.unique(place * stride + self._row[slots])
        counts = np.bincount(rows // stride, minlength=len(files))
        return [
            FileId(file)
            for file, count in zip(files.tolist(), counts.tolist(), strict=True)
            if count < least_share * len(self._slots[FileId(file)])
        ]

    def _alive(self, file: FileId, slots: Slots) -> npt.NDArray[np.bool_]:
        """Whether slots still hold the rows of a file that they were noted with."""
        pool = self._store.pool
        pages = slots // pool.page_size
        held = sum(pool.num_refs(pages, holder) for holder in Holder) > 0
        alive: npt.NDArray[np.bool_] = held & (self._file[slots] == file) & self.written(slots)
        return alive
