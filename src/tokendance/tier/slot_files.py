"""Which rows of which files the slots of memory hold, and the other way round.

A slot that was given away and taken again has another stamp (`KVStore.slot_stamp`), so what is
noted of it says by itself when it is no longer true: nobody has to be told of evictions.
"""

from collections.abc import Collection, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from tokendance.disk.records import Extents, FileId
from tokendance.store.entries import Slots, StoredPage
from tokendance.store.kv_store import KVStore
from tokendance.store.pages import Holder

_NO_FILE = -1
# What would make a larger file is cut: the engine's thread copies a file's KV in one go, and nobody
# should have to wait for that longer than about 10 ms.
_MAX_FILE_BYTES = 32 * 2**20


class SlotFiles:
    """What of a store's memory is on disk, and where."""

    def __init__(self, store: KVStore, row_bytes: int) -> None:
        """Know nothing yet; a slot makes so many bytes of a file."""
        self._store = store
        self._max_rows = max(1, _MAX_FILE_BYTES // row_bytes)
        num_slots = len(store.slot_stamp)
        # By slot: the file and the row that it holds, and the stamp that it had then.
        self._file = np.full(num_slots, _NO_FILE, np.int64)
        self._row = np.zeros(num_slots, np.int64)
        self._stamp = np.full(num_slots, -1, np.int64)
        # By file: the slots that its rows were put into last.
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
        """Note that files are gone; nothing happens for those of which nothing is known."""
        gone = [file for file in files if self._slots.pop(file, None) is not None]
        if gone:  # by slot, since a file that was read again has slots of the first time, too
            self._stamp[np.isin(self._file, gone)] = -1

    def forget_all_but(self, files: Collection[FileId]) -> None:
        """Note that of all files only these are there."""
        self.forget(self._slots.keys() - files)

    # -- from slots to files ------------------------------------------------------------------

    def is_written(self, slots: Slots | slice = slice(None)) -> npt.NDArray[np.bool_]:
        """By slot, whether what it holds is on disk."""
        is_same: npt.NDArray[np.bool_] = self._stamp[slots] == self._store.slot_stamp[slots]
        return is_same

    def extents_of(self, slots: Slots) -> Extents:
        """Where slots are on disk, in their order, up to the first that is not."""
        is_written = self.is_written(slots)
        length = len(slots) if is_written.all() else int(np.argmin(is_written))
        if length == 0:
            return np.empty((0, 3), np.int64)
        files, rows = self._file[slots[:length]], self._row[slots[:length]]
        goes_on = (np.diff(files) == 0) & (np.diff(rows) == 1)
        begins = np.flatnonzero(np.concatenate(([True], ~goes_on)))
        counts = np.diff(np.append(begins, length))
        return np.stack([files[begins], rows[begins], counts], axis=1)

    def unwritten(self, caches: Sequence[Slots], segments: Sequence[Slots]) -> list[Slots]:
        """Slots that are not on disk, in groups each of which makes a file.

        What several caches have comes first, then each cache's own tokens. Slots of segments that
        no cache has go with what is shared.
        """
        num_readers = np.zeros(len(self._stamp), np.int64)
        for slots in caches:
            num_readers[np.unique(slots)] += 1
        for slots in segments:
            num_readers[slots[num_readers[slots] == 0]] = 2
        num_readers[self.is_written()] = 0
        groups = [np.flatnonzero(num_readers > 1)]
        for slots in caches:
            own = np.unique(slots)
            groups.append(own[num_readers[own] == 1])
        return [
            group[first : first + self._max_rows].astype(np.int32)
            for group in groups
            for first in range(0, len(group), self._max_rows)
        ]

    def sparse(self, needed: Iterable[Slots], least_share: float) -> list[FileId]:
        """Files of whose rows some are needed, and less than a share.

        A slot may be needed more than once.
        """
        is_needed = np.zeros(len(self._stamp), np.bool_)
        for slots in needed:
            is_needed[slots] = True
        needed_slots = np.flatnonzero(is_needed & self.is_written())
        files, file_index = np.unique(self._file[needed_slots], return_inverse=True)
        # Each row counts once: of a file that was read again, several slots may hold it.
        stride = 1 + self._row.max()
        rows = np.unique(file_index * stride + self._row[needed_slots])
        counts = np.bincount(rows // stride, minlength=len(files))
        return [
            file
            for file, count in zip(map(FileId, files.tolist()), counts.tolist(), strict=True)
            if count < least_share * len(self._slots[file])
        ]

    def mark_on_disk(self, pages: Sequence[StoredPage]) -> None:
        """Tell the order of eviction which pages of a prompt could be read again."""
        for page in reversed(pages):
            if self.is_written(page.slots).all():
                self._store.order.mark_on_disk(page)

    # -- from files to slots ------------------------------------------------------------------

    def slots_of(self, extents: Extents, skip: int = 0) -> Slots:
        """Slots of a cache's tokens from number `skip` on, up to the first that memory lacks."""
        slots = [np.empty(0, np.int32)]
        first_token = 0
        for file, first_row, count in extents.tolist():
            num_skipped = max(0, min(count, skip - first_token))
            first_token += count
            in_file = self._slots.get(FileId(file), slots[0])
            in_file = in_file[first_row + num_skipped : first_row + count]
            holds_row = self._holds(FileId(file), in_file)
            slots.append(in_file if holds_row.all() else in_file[: int(np.argmin(holds_row))])
            if len(slots[-1]) < count - num_skipped:
                break
        return np.concatenate(slots)

    def in_memory(self, file: FileId, extents: Extents) -> bool:
        """Whether memory has all rows of a file that these extents of it name."""
        slots = self._slots.get(file)
        if slots is None:
            return False
        rows = np.concatenate([np.arange(first, first + count) for _, first, count in extents])
        return bool(rows.max() < len(slots) and self._holds(file, slots[rows]).all())

    def _holds(self, file: FileId, slots: Slots) -> npt.NDArray[np.bool_]:
        """Whether slots still hold the rows of a file that they were noted with."""
        pool = self._store.pool
        pages = slots // pool.page_size
        is_held = sum(pool.num_refs(pages, holder) for holder in Holder) > 0
        holds: npt.NDArray[np.bool_] = is_held & (self._file[slots] == file)
        return holds & self.is_written(slots)
