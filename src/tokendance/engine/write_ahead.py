"""KV of rounds that are under way, written while they decode.

A prompt's KV does not change once it is computed, so most of what a round leaves can be on disk
before it ends. Such files have no name in the index until the session is saved: if that does not
happen they are removed, by this process or by the next that opens the store.
"""

import logging
import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tokendance.disk.kv_file import KVRows, WrittenFile, file_bytes
from tokendance.disk.records import FileId, SessionKey
from tokendance.disk.store import DiskStore
from tokendance.store.entries import RoundId, Slots
from tokendance.store.kv_store import KVStore

log = logging.getLogger("tokendance.store")

# Each holds a copy of its rows.
_MOST_AT_A_TIME = 2
# Longer than the time between a round's last token and its save.
_ABANDONED_S = 10.0


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """Slots whose rows make a file, and the stamps that they had."""

    slots: Slots
    stamps: npt.NDArray[np.int64]

    def is_as_it_was(self, store: KVStore) -> bool:
        return bool((store.slot_stamp[self.slots] == self.stamps).all())


@dataclass(slots=True)
class _Round:
    """What of a round goes ahead.

    Attributes:
        round_id: of the round.
        left: groups that are not written yet.
        begun: groups that are, or are being written.
        num_bytes: most bytes of them.
        seen_s: clock time when the round was last seen.
    """

    round_id: RoundId
    left: list[_Group]
    begun: list[tuple[_Group, "Future[tuple[FileId, WrittenFile]]"]] = field(default_factory=list)
    num_bytes: int = 0
    seen_s: float = field(default_factory=time.perf_counter)


class WriteAhead:
    """Writes files on a thread of its own; all methods are called on the engine's."""

    def __init__(self, disk: DiskStore, store: KVStore) -> None:
        """Write what `store` holds to `disk`."""
        self._disk = disk
        self._store = store
        self._thread = ThreadPoolExecutor(1, "store")
        self._rounds: dict[SessionKey, _Round] = {}

    @property
    def num_bytes(self) -> int:
        """Most bytes of files that have no name yet."""
        return sum(one.num_bytes for one in self._rounds.values())

    @property
    def due_s(self) -> float | None:
        """Clock time at which `see` would remove something; None if there is nothing."""
        seen_s = [one.seen_s for one in self._rounds.values()]
        return min(seen_s) + _ABANDONED_S if seen_s else None

    def see(self, keys: Collection[SessionKey]) -> None:
        """Remove what sessions have left that nobody saves; those of `keys` are under way."""
        now = time.perf_counter()
        for key, one in list(self._rounds.items()):
            if key in keys:
                one.seen_s = now
            elif now - one.seen_s > _ABANDONED_S:
                self.drop(key)

    def has_begun(self, key: SessionKey, round_id: RoundId) -> bool:
        """Whether `begin` was called for a round."""
        return key in self._rounds and self._rounds[key].round_id == round_id

    def begin(self, key: SessionKey, round_id: RoundId, groups: Sequence[Slots]) -> None:
        """Plan to write groups of slots, each into a file of its own."""
        self.drop(key)
        stamps = self._store.slot_stamp
        self._rounds[key] = _Round(round_id, [_Group(one, stamps[one]) for one in groups])

    def next_slots(self, key: SessionKey) -> Slots | None:
        """What is to be written next; None for nothing, or not yet."""
        jobs = [job for one in self._rounds.values() for _, job in one.begun]
        if sum(not job.done() for job in jobs) >= _MOST_AT_A_TIME:
            return None
        one = self._rounds[key]
        while one.left and not one.left[0].is_as_it_was(self._store):
            del one.left[0]
        return one.left[0].slots if one.left else None

    def write(self, key: SessionKey, rows: KVRows) -> None:
        """Begin to write the rows of `next_slots`."""
        one = self._rounds[key]
        one.begun.append((one.left.pop(0), self._thread.submit(self._disk.write, rows)))
        one.num_bytes += file_bytes(rows)

    def stop(self, key: SessionKey) -> None:
        """Begin no more of a session's round; what is begun may be collected."""
        self._rounds[key].left.clear()

    def collect(self, key: SessionKey) -> list[tuple[FileId, WrittenFile, Slots]]:
        """Hand over what a session's round has written, with the slots that still hold it.

        What could not be written, or was not begun yet, is left to whoever saves the session.
        """
        if key not in self._rounds:
            return []
        begun = [(group, job) for group, job in self._rounds[key].begun if not job.cancel()]
        wait([job for _, job in begun])
        del self._rounds[key]
        found: list[tuple[FileId, WrittenFile, Slots]] = []
        for group, job in begun:
            if (error := job.exception()) is not None:
                log.warning("KV could not be written ahead: %s", error)
                continue
            file, written = job.result()
            if group.is_as_it_was(self._store):
                found.append((file, written, group.slots))
            else:
                self._disk.discard([written])
        return found

    def drop(self, key: SessionKey) -> None:
        """Remove what a session's round has written."""
        self._disk.discard([written for _, written, _ in self.collect(key)])

    def close(self) -> None:
        """Remove what nobody has collected, and end the thread."""
        try:
            for key in list(self._rounds):
                self.drop(key)
        finally:
            self._thread.shutdown()
