"""Memory and disk, between which KV moves, and what is known of both."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from tokendance.disk.kv_file import WrittenFile
from tokendance.disk.records import FileId
from tokendance.disk.store import DiskStore
from tokendance.errors import StoreError
from tokendance.executor.step import RowMemory
from tokendance.rounds.segments import PrefixHashes, Salt
from tokendance.store.entries import Slots, StoredPage
from tokendance.store.eviction import EvictionOrder
from tokendance.store.kv_store import KVStore, slots_of
from tokendance.tier.slot_files import SlotFiles
from tokendance.tier.steps import Result, Steps, awaited

NUM_READERS = 2
Written = Future[tuple[FileId, WrittenFile]]
"""A file that is being written."""

# Assumed until files have been read here.
_FIRST_BYTES_PER_S = 500e6


class ReadCost:
    """Compares the speed at which files were read last with that of the last large prefill."""

    def __init__(self, bytes_per_token: int, seconds_per_token: Callable[[], float | None]) -> None:
        """For the arguments see `DiskTier`."""
        self._bytes_per_token = bytes_per_token
        self._seconds_per_token = seconds_per_token
        self._bytes_per_s = _FIRST_BYTES_PER_S

    def note_read(self, num_bytes: int, seconds: float) -> None:
        """Take the speed of what has just been read."""
        self._bytes_per_s = num_bytes / seconds

    def pays(self, files: Collection[WrittenFile]) -> bool:
        """Whether reading files takes less time than computing what they hold. Changes nothing."""
        compute_s = self._seconds_per_token()
        if compute_s is None:
            return True
        read_s = sum(file.num_bytes for file in files) / self._bytes_per_s
        return read_s < compute_s * sum(file.num_rows for file in files)

    def tell(self, order: EvictionOrder) -> None:
        """Tell the order of eviction what an entry on disk costs, as a share of computing it."""
        compute_s = self._seconds_per_token()
        if compute_s is not None:
            order.disk_cost = self._bytes_per_token / self._bytes_per_s / compute_s


class Threads:
    """Where a tier's jobs run.

    Attributes:
        index: the one thread that uses the index; a change takes some 50 ms.
        writer: writes files.
        readers: read files.
    """

    def __init__(self) -> None:
        """Begin; each thread is started when it is needed."""
        self.index = ThreadPoolExecutor(1, "store-index")
        self.writer = ThreadPoolExecutor(1, "store")
        self.readers = ThreadPoolExecutor(NUM_READERS, "store-reader")

    def close(self) -> None:
        """Wait for what they have begun to do; take no other job."""
        for threads in (self.readers, self.writer, self.index):
            threads.shutdown(cancel_futures=threads is self.readers)


class Turn:
    """Saves take turns: what one has found in the index has to be there until it commits."""

    def __init__(self) -> None:
        self._under_way: Future[None] | None = None

    @property
    def is_taken(self) -> bool:
        """Whether a session is being saved."""
        return self._under_way is not None

    def free(self) -> Steps[None]:
        """Wait until no session is being saved."""
        while self._under_way is not None:
            yield from awaited(self._under_way)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Take the turn, which is free, for as long as a session is being saved."""
        under_way = self._under_way = Future[None]()
        try:
            yield
        finally:
            self._under_way = None
            under_way.set_result(None)


@dataclass(frozen=True, slots=True, eq=False)
class Levels:
    """What saving and loading work on."""

    store: KVStore  # the index of what `memory` holds
    memory: RowMemory  # holds keys and values
    disk: DiskStore  # the store on disk
    files: SlotFiles  # what of memory is on disk
    cost: ReadCost  # of reading files
    row_bytes: int  # of a token in a file that is not compressed
    num_kept: Callable[[Salt], int]  # pages that a tenant's KV must not take when it is read
    threads: Threads  # of the disk
    turn: Turn  # of saves

    def on_index(self, work: Callable[[], Result]) -> Steps[Result]:
        """Have something done that uses the index, on its thread; what it raises is raised here.

        Raises:
            StoreError: if the store is closed.
        """
        try:
            job = self.threads.index.submit(work)
        except RuntimeError as error:
            raise StoreError("The store is closed. Open it again.") from error
        return (yield from awaited(job))

    def discard_written(self, job: Written) -> None:
        """Remove a file that nobody will name, when it is there."""
        if not job.cancel():
            job.add_done_callback(self._discard)

    def _discard(self, job: Written) -> None:
        if job.exception() is None:
            self.disk.discard([job.result()[1]])

    def match_computed(self, text: PrefixHashes) -> tuple[list[StoredPage], Slots]:
        """What memory has of a text, up to the first token whose KV is still to be computed."""
        pages = self.store.match_prefix(text, exact=False)
        slots = slots_of(pages)
        is_ready = self.store.slot_ready[slots]
        if is_ready.all():
            return pages, slots
        slots = slots[: int(np.argmin(is_ready))]
        ends = np.cumsum([page.num_tokens for page in pages])
        return pages[: int(np.searchsorted(ends, len(slots), side="right"))], slots

    def unwritten(
        self, caches: Sequence[Slots], segments: Sequence[Slots], unnamed: Iterable[FileId]
    ) -> list[Slots]:
        """See `SlotFiles.unwritten`; files count that the index names, or that are `unnamed`."""
        self.files.forget_all_but(self.disk.index.file_ids().union(unnamed))
        return self.files.unwritten(caches, segments)
