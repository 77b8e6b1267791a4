"""From memory to disk: a session is made durable as it is at the end of a round."""

import contextlib
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from tokendance.disk.kv_file import WrittenFile, file_bytes
from tokendance.disk.records import CacheRecord, FileId, SegmentRecord, SessionKey, StoredSession
from tokendance.disk.store import DiskStore
from tokendance.errors import CorruptFileError
from tokendance.rounds.segments import PrefixHashes, TokenIds, hash_segment
from tokendance.store.entries import (
    Slots,
    StoredPage,
    StoredSegment,
    exact_length,
    pages_of,
)
from tokendance.store.kv_store import KVStore
from tokendance.store.pages import Holder, PageIds
from tokendance.tier.background import BackgroundWriter
from tokendance.tier.caches import SessionSnapshot, SpokenCache
from tokendance.tier.levels import Levels
from tokendance.tier.slot_files import SlotFiles
from tokendance.tier.steps import Steps, awaited

# Of a file's rows: where fewer are needed, they are written anew, and the file goes.
_LEAST_SHARE = 0.5


def saving(
    levels: Levels,
    background: BackgroundWriter,
    snapshot: SessionSnapshot,
    stored: StoredSession | None,
) -> Steps[None]:
    """Write what is not on disk yet, and refer to what is; see `DiskTier.saving`.

    What is in memory of the session is held until all of it is on disk.
    """
    yield from levels.turn.free()
    with levels.turn.taken(), levels.store.holding() as held:
        if stored is None:
            stored = yield from levels.on_index(lambda: _stored(levels.disk, snapshot.key))
        in_memory = {
            agent: levels.match_computed(PrefixHashes(cache.token_ids, snapshot.salt))
            for agent, cache in snapshot.caches.items()
        }
        evicted = _evicted(snapshot, stored, in_memory) if stored is not None else {}
        for agent in evicted:
            del in_memory[agent]
        caches = [slots for _, slots in in_memory.values()]
        segments = _choose_segments(levels.store, snapshot, caches)
        _hold(levels.store, [*caches, *(copy.slots for _, copy in segments)], held)
        written: dict[FileId, WrittenFile] = {}
        for file, written_file, slots in background.collect(snapshot.key):
            written[file] = written_file
            levels.files.note(file, slots)
        try:
            yield from _save(levels, background, snapshot, evicted, in_memory, segments, written)
        except GeneratorExit:  # whoever saves has given up; what is being named may stay
            levels.files.forget(written)
            with contextlib.suppress(RuntimeError):  # closed; they go when it is opened again
                levels.threads.index.submit(levels.disk.discard_unnamed, written)
            raise
        except BaseException:
            levels.files.forget(written)
            yield from levels.on_index(lambda: levels.disk.discard_unnamed(written))
            raise
        for pages, _ in in_memory.values():
            levels.files.mark_on_disk(pages)
    levels.cost.tell(levels.store.order)


def _stored(disk: DiskStore, key: SessionKey) -> StoredSession | None:
    with contextlib.suppress(CorruptFileError):
        return disk.session(key)
    return None


def _hold(store: KVStore, caches: Sequence[Slots], held: list[PageIds]) -> None:
    """Keep what some slots hold from being evicted."""
    pages = pages_of(np.concatenate([np.empty(0, np.int32), *caches]), store.page_size)
    store.pool.retain(pages, Holder.REQUEST)
    held.append(pages)


def _save(
    levels: Levels,
    background: BackgroundWriter,
    snapshot: SessionSnapshot,
    evicted: dict[str, CacheRecord],
    in_memory: Mapping[str, tuple[Sequence[StoredPage], Slots]],
    segments: Sequence[tuple[TokenIds, StoredSegment]],
    written: dict[FileId, WrittenFile],
) -> Steps[None]:
    """Write files, which are added to `written`, and name them."""
    files = levels.files
    caches = [slots for _, slots in in_memory.values()]
    old_files = {FileId(file) for record in evicted.values() for file in record.extents[:, 0]}
    segment_slots = [copy.slots for _, copy in segments]
    yield from _write(
        levels, snapshot.key, caches, segment_slots, old_files, written, background.num_bytes
    )
    records = evicted | {
        agent: _record(files, snapshot.caches[agent], slots, exact_length(pages))
        for agent, (pages, slots) in in_memory.items()
    }
    in_segments = _segment_records(files, segments)
    yield from levels.on_index(
        lambda: levels.disk.commit(
            snapshot.key,
            round_number=snapshot.round,
            state=snapshot.state,
            caches={agent: records[agent] for agent in snapshot.caches},
            segments=in_segments,
            files=written,
            ttl_s=snapshot.ttl_s,
        )
    )


def _evicted(
    snapshot: SessionSnapshot,
    stored: StoredSession,
    in_memory: Mapping[str, tuple[Sequence[StoredPage], Slots]],
) -> dict[str, CacheRecord]:
    """Records of caches of which disk has more than memory: of agents not in the round."""
    return {
        agent: record
        for agent, record in stored.caches.items()
        if agent in in_memory
        and len(record.token_ids) > len(in_memory[agent][1])
        and np.array_equal(
            record.token_ids, snapshot.caches[agent].token_ids[: len(record.token_ids)]
        )
    }


def _choose_segments(
    store: KVStore, snapshot: SessionSnapshot, caches: Iterable[Slots]
) -> list[tuple[TokenIds, StoredSegment]]:
    """One copy of each shared segment: that of which caches read most, else the newest.

    Copies that only some may read stay in memory: the store does not say who may.
    """
    is_read = np.zeros(store.num_slots, np.bool_)
    for slots in caches:
        is_read[slots] = True
    chosen: list[tuple[TokenIds, StoredSegment]] = []
    for token_ids in snapshot.shared_segments:
        copies = [
            copy
            for copy in reversed(store.all_cached(hash_segment(token_ids, snapshot.salt)))
            if copy.num_behind == 0 and store.slot_ready[copy.slots].all()
        ]
        if copies:
            best = max(copies, key=lambda copy: np.count_nonzero(is_read[copy.slots]))
            chosen.append((token_ids, best))
    return chosen


# -- files ------------------------------------------------------------------------------------


def _write(
    levels: Levels,
    key: SessionKey,
    caches: Sequence[Slots],
    segments: Sequence[Slots],
    old_files: Collection[FileId],
    written: dict[FileId, WrittenFile],
    background_bytes: int,
) -> Steps[None]:
    """Write what is not on disk, as far as the budget has room for it, and add it to `written`.

    All that is `written` has no name in the index yet, like the `background_bytes` of other
    sessions. `old_files` hold what memory lacks.
    """
    disk = levels.disk
    new_bytes = sum(map(len, levels.unwritten(caches, segments, written))) * levels.row_bytes
    unnamed_bytes = background_bytes + sum(file.num_bytes for file in written.values())

    def make_room() -> set[FileId]:
        disk.make_room(new_bytes + unnamed_bytes, key)
        return disk.index.own_files(key)

    own_files = yield from levels.on_index(make_room)
    room = disk.budget - disk.num_bytes - unnamed_bytes
    _forget_sparse(levels, own_files.difference(old_files), [*caches, *segments], room - new_bytes)
    # Asked anew: the files that made room may have held something of it.
    for slots in levels.unwritten(caches, segments, written):
        rows = levels.memory.read_kv(slots)
        if file_bytes(rows) > room:
            continue  # and is computed again
        job = levels.threads.writer.submit(disk.write, rows)
        try:
            file, written_file = yield from awaited(job)
        except BaseException:
            levels.discard_written(job)
            raise
        written[file] = written_file
        room -= written_file.num_bytes
        levels.files.note(file, slots)


def _forget_sparse(levels: Levels, files: set[FileId], needed: Sequence[Slots], room: int) -> None:
    """Forget those files most of which nobody needs: what is needed is written again.

    Rows lose their last reader where histories are cut and where agents leave, and a file goes
    with its last row. Writing what is left of it elsewhere costs at most half of what it frees.
    """
    forgotten: list[FileId] = []
    for file in files.intersection(levels.files.sparse(needed, _LEAST_SHARE)):
        # Until the old file is gone there are both, and the new one is at most half as large.
        room -= levels.disk.index.file(file).num_bytes
        if room < 0:
            break
        forgotten.append(file)
    levels.files.forget(forgotten)


# -- records ----------------------------------------------------------------------------------


def _record(files: SlotFiles, cache: SpokenCache, slots: Slots, num_exact: int) -> CacheRecord:
    """Where a cache is on disk, up to the first token that is not."""
    extents = files.extents_of(slots)
    length = int(extents[:, 2].sum())
    num_exact, num_prompt = min(num_exact, length), min(cache.num_prompt, length)
    return CacheRecord(cache.token_ids[:length], num_exact, num_prompt, extents)


def _segment_records(
    files: SlotFiles, segments: Sequence[tuple[TokenIds, StoredSegment]]
) -> tuple[SegmentRecord, ...]:
    records = []
    for token_ids, copy in segments:
        cache = _record(files, SpokenCache(token_ids, 0), copy.slots, 0)
        if len(cache.token_ids) == len(token_ids):  # else the budget has cut it
            records.append(SegmentRecord(cache, copy.run, copy.index, len(copy.rounds)))
    return tuple(records)
