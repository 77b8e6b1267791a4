"""From memory to disk: a session is made durable as it is at the end of a round."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tokendance.disk.kv_file import WrittenFile, file_bytes
from tokendance.disk.records import (
    CacheRecord,
    FileId,
    SegmentRecord,
    SessionKey,
    StoredSession,
)
from tokendance.disk.store import DiskStore
from tokendance.errors import CorruptFileError
from tokendance.rounds.segments import PrefixHashes, TokenIds, hash_segment
from tokendance.store.entries import Slots, StoredPage, StoredSegment, exact_length
from tokendance.store.kv_store import KVStore
from tokendance.tier.background import BackgroundWriter
from tokendance.tier.caches import SessionSnapshot, SpokenCache, match_computed
from tokendance.tier.cost import ReadCost
from tokendance.tier.memory import RowMemory
from tokendance.tier.slot_files import SlotFiles

# Of a file's rows: where fewer are needed, they are written anew, and the file goes.
_LEAST_SHARE = 0.5


@dataclass(frozen=True, slots=True, eq=False)
class Saver:
    """Writes what is not on disk yet, and refers to what is.

    Attributes:
        store: the index of what `memory` holds.
        memory: to read rows from.
        disk: to write to.
        files: what of memory is on disk.
        background: what it has written of a session's round is taken over.
        cost: of reading it again.
        row_bytes: of a token in a file that is not compressed.
    """

    store: KVStore
    memory: RowMemory
    disk: DiskStore
    files: SlotFiles
    background: BackgroundWriter
    cost: ReadCost
    row_bytes: int

    def save(self, snapshot: SessionSnapshot, stored: StoredSession | None) -> None:
        """See `DiskTier.save`."""
        key = snapshot.key
        in_memory = {
            agent: match_computed(self.store, PrefixHashes(cache.token_ids, snapshot.salt))
            for agent, cache in snapshot.caches.items()
        }
        evicted = self._evicted(snapshot, stored, in_memory)
        for agent in evicted:
            del in_memory[agent]
        caches = [slots for _, slots in in_memory.values()]
        segments = self._choose_segments(snapshot, caches)
        written: dict[FileId, WrittenFile] = {}
        for file, written_file, slots in self.background.collect(key):
            written[file] = written_file
            self.files.note(file, slots)
        try:
            needed_files = {
                FileId(file) for record in evicted.values() for file in record.extents[:, 0]
            }
            self._write(key, caches, [copy.slots for _, copy in segments], needed_files, written)
            records = evicted | {
                agent: self._record(snapshot.caches[agent], slots, exact_length(pages))
                for agent, (pages, slots) in in_memory.items()
            }
            self.disk.commit(
                key,
                round_number=snapshot.round,
                state=snapshot.state,
                caches={agent: records[agent] for agent in snapshot.caches},
                segments=self._segment_records(segments),
                files=written,
                ttl_s=snapshot.ttl_s,
            )
        except BaseException:
            self.files.forget(written)
            self.disk.discard(written.values())
            raise
        for pages, _ in in_memory.values():
            self.files.mark_on_disk(pages)
        self.cost.tell(self.store.order)

    def _evicted(
        self,
        snapshot: SessionSnapshot,
        stored: StoredSession | None,
        in_memory: Mapping[str, tuple[Sequence[StoredPage], Slots]],
    ) -> dict[str, CacheRecord]:
        """Records of caches of which disk has more than memory: of agents not in the round."""
        if stored is None:
            try:
                stored = self.disk.session(snapshot.key)
            except CorruptFileError:
                stored = None
        records = stored.caches if stored is not None else {}
        return {
            agent: record
            for agent, record in records.items()
            if agent in in_memory
            and len(record.token_ids) > len(in_memory[agent][1])
            and np.array_equal(
                record.token_ids, snapshot.caches[agent].token_ids[: len(record.token_ids)]
            )
        }

    def _choose_segments(
        self, snapshot: SessionSnapshot, caches: Iterable[Slots]
    ) -> list[tuple[TokenIds, StoredSegment]]:
        """One copy of each shared segment: that of which caches read most, else the newest."""
        is_read = np.zeros(len(self.store.slot_ready), np.bool_)
        for slots in caches:
            is_read[slots] = True
        chosen: list[tuple[TokenIds, StoredSegment]] = []
        for token_ids in snapshot.shared_segments:
            copies = [
                copy
                for copy in reversed(self.store.all_cached(hash_segment(token_ids, snapshot.salt)))
                if self.store.slot_ready[copy.slots].all()
            ]
            if copies:
                best = max(copies, key=lambda copy: np.count_nonzero(is_read[copy.slots]))
                chosen.append((token_ids, best))
        return chosen

    # -- files --------------------------------------------------------------------------------

    def _write(
        self,
        key: SessionKey,
        caches: Sequence[Slots],
        segments: Sequence[Slots],
        needed_files: Collection[FileId],
        written: dict[FileId, WrittenFile],
    ) -> None:
        """Write what is not on disk, as far as the budget has room for it.

        Args:
            key: of the session.
            caches: slots of what agents have read and said.
            segments: slots of shared segments.
            needed_files: files that hold what memory lacks.
            written: files that have no name in the index yet; those written here are added.
        """
        new_rows = sum(map(len, self._unwritten(caches, segments, written)))
        new_bytes = new_rows * self.row_bytes
        unnamed_bytes = self.background.num_bytes
        unnamed_bytes += sum(file.num_bytes for file in written.values())
        self.disk.make_room(new_bytes + unnamed_bytes, key)
        room = self.disk.budget - self.disk.num_bytes - unnamed_bytes
        self._forget_sparse(key, [*caches, *segments], needed_files, room - new_bytes)
        # Asked anew: the files that made room may have held something of it.
        for slots in self._unwritten(caches, segments, written):
            rows = self.memory.read_kv(slots)
            if file_bytes(rows) > room:
                continue  # and is computed again
            file, written_file = self.disk.write(rows)
            written[file] = written_file
            room -= written_file.num_bytes
            self.files.note(file, slots)

    def _unwritten(
        self, caches: Sequence[Slots], segments: Sequence[Slots], written: Collection[FileId]
    ) -> list[Slots]:
        self.files.forget_all_but(self.disk.index.file_ids().union(written))
        return self.files.unwritten(caches, segments)

    def _forget_sparse(
        self,
        key: SessionKey,
        needed: Sequence[Slots],
        needed_files: Collection[FileId],
        room: int,
    ) -> None:
        """Forget a session's files most of which nobody needs: what is needed is written again.

        Rows lose their last reader where histories are cut and where agents leave, and a file goes
        with its last row. Writing what is left of it elsewhere costs at most half of what it frees.
        """
        forgotten: list[FileId] = []
        own = self.disk.index.own_files(key).difference(needed_files)
        for file in own.intersection(self.files.sparse(needed, _LEAST_SHARE)):
            # Until the old file is gone there are both, and the new one is at most half as large.
            room -= self.disk.index.file(file).num_bytes
            if room < 0:
                break
            forgotten.append(file)
        self.files.forget(forgotten)

    # -- records ------------------------------------------------------------------------------

    def _record(self, cache: SpokenCache, slots: Slots, num_exact: int) -> CacheRecord:
        """Where a cache is on disk, up to the first token that is not."""
        extents = self.files.extents_of(slots)
        length = int(extents[:, 2].sum())
        return CacheRecord(
            cache.token_ids[:length],
            min(num_exact, length),
            min(cache.num_prompt, length),
            extents,
        )

    def _segment_records(
        self, segments: Sequence[tuple[TokenIds, StoredSegment]]
    ) -> tuple[SegmentRecord, ...]:
        records = []
        for token_ids, copy in segments:
            cache = self._record(SpokenCache(token_ids, 0), copy.slots, 0)
            if len(cache.token_ids) == len(token_ids):  # else the budget has cut it
                records.append(SegmentRecord(cache, copy.run, copy.index, len(copy.rounds)))
        return tuple(records)
