"""The tier as sessions and the engine's loop see it."""

from collections.abc import Callable, Collection

from tokendance.disk.records import SessionKey, StoredSession
from tokendance.disk.store import DiskStore
from tokendance.engine.request import Request
from tokendance.executor.step import RowMemory
from tokendance.rounds.segments import Salt
from tokendance.store.kv_store import KVStore
from tokendance.tier.background import BackgroundWriter
from tokendance.tier.caches import SessionSnapshot
from tokendance.tier.levels import Levels, ReadCost, Threads, Turn
from tokendance.tier.loader import Restored, restoring
from tokendance.tier.saver import saving
from tokendance.tier.slot_files import SlotFiles
from tokendance.tier.steps import Result, Steps, finish

_POSITION_BYTES = 4  # which a file has for each row, besides its KV


class DiskTier:
    """Moves KV of sessions between memory and a disk store.

    It hangs on the engine's loop, which calls `after_step` and `due_s`. Every method is called on
    the engine's thread, between two steps, and so are the steps that some of them return
    (`tier/steps.py`).

    Attributes:
        disk: the store.
        is_closed: whether `close` was called; all that reads or writes fails then.
    """

    def __init__(
        self,
        store: KVStore,
        memory: RowMemory,
        disk: DiskStore,
        *,
        bytes_per_token: int,
        seconds_per_token: Callable[[], float | None],
        num_kept: Callable[[Salt], int] = lambda _: 0,
    ) -> None:
        """Write what is computed to `disk`, which `close` closes.

        Args:
            store: index of the KV in memory.
            memory: that KV.
            disk: store on disk.
            bytes_per_token: of KV in memory.
            seconds_per_token: that computing takes now; None while nobody knows.
            num_kept: pages that are kept for others when KV of a tenant is read.
        """
        self.disk = disk
        self.is_closed = False
        cost = ReadCost(bytes_per_token, seconds_per_token)
        row_bytes = bytes_per_token + _POSITION_BYTES
        files = SlotFiles(store, row_bytes)
        self._levels = Levels(
            store, memory, disk, files, cost, row_bytes, num_kept, Threads(), Turn()
        )
        self._background = BackgroundWriter(self._levels)

    @property
    def bytes_on_disk(self) -> int:
        """Of KV; may be read on any thread."""
        return self.disk.num_bytes

    def job(self, work: Callable[[], Result]) -> Steps[Result]:
        """Have something done that reads or changes the store's index, on the thread for that.

        Raises:
            StoreError: if the store is closed.
        """
        return self._levels.on_index(work)

    def save(self, snapshot: SessionSnapshot, stored: StoredSession | None = None) -> None:
        """Do what `saving` does, and wait for the disk."""
        finish(self.saving(snapshot, stored))

    def saving(self, snapshot: SessionSnapshot, stored: StoredSession | None = None) -> Steps[None]:
        """Make a session durable as it is now; KV that does not fit the budget is left out.

        It is on disk when the last step is done. What is on disk of it is read here, unless the
        caller has just read it (`stored`).

        Raises:
            StoreError: if the disk cannot be written; what was durable before still is.
        """
        return saving(self._levels, self._background, snapshot, stored)

    def restore(self, session: StoredSession, salt: Salt, *, always: bool = False) -> Restored:
        """Do what `restoring` does, and wait for the disk."""
        return finish(self.restoring(session, salt, always=always))

    def restoring(
        self, session: StoredSession, salt: Salt, *, always: bool = False
    ) -> Steps[Restored]:
        """Read what memory lacks of a session's KV, as far as there is room, and if it pays.

        With `always` it is read even if computing it would be quicker. A file that is damaged is
        taken out of the store, and what it held is computed again.
        """
        return restoring(self._levels, session, salt, always=always)

    def after_step(self, now: float, requests: Collection[Request]) -> None:
        """Begin to write what rounds of sessions have read, while they decode.

        The engine's loop calls it after each step, and at `due_s`; a call hands at most one file of
        each round to another thread. What is written has no name until `save` gives it one, and is
        gone if nobody does.

        Args:
            now: seconds, on the loop's clock.
            requests: of rounds that are under way; those without a session are passed over.
        """
        self._background.after_step(now, requests)

    def due_s(self) -> float | None:
        """When, on the clock of `after_step`, it has something to remove; None for never."""
        return self._background.due_s()

    def go_on_writing(self, key: SessionKey) -> bool:
        """Go on with what `after_step` has begun to write of a round that has ended.

        Returns:
            Whether anything of it is still being written: `save` would wait for that.
        """
        return self._background.go_on(key)

    def give_up(self, key: SessionKey) -> None:
        """Remove what `after_step` has written of a session whose round will not be saved."""
        self._background.give_up(key)

    def close(self) -> None:
        """Close the store; files that have no name in it are removed."""
        self.is_closed = True
        try:
            self._background.close()
        finally:
            self._levels.threads.close()
            self.disk.close()
