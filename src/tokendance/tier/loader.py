"""From disk to memory: what memory lacks of a session is read before its next round."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import numpy as np

from tokendance.disk.kv_file import WrittenFile
from tokendance.disk.records import Extents, FileId, SegmentRecord, StoredSession
from tokendance.errors import CorruptFileError
from tokendance.rounds.segments import PrefixHashes, Salt, SegmentHash, hash_segment
from tokendance.store.entries import RoundId, Slots
from tokendance.store.kv_rows import KVRows
from tokendance.store.kv_store import KVStore
from tokendance.store.pages import Holder, PageIds
from tokendance.tier.levels import NUM_READERS, Levels
from tokendance.tier.steps import Steps, awaited

log = logging.getLogger("tokendance.store")


@dataclass(frozen=True, slots=True)
class Restored:
    """What was read of a session."""

    rows: int  # tokens whose KV was read
    num_bytes: int  # of the files
    computed: int  # tokens that are left to compute again
    problems: tuple[str, ...]  # what was wrong with files, a sentence each


# A file's rows, and the seconds that reading them took.
_Read = Future[tuple[KVRows, float]]


def restoring(
    levels: Levels, session: StoredSession, salt: Salt, *, always: bool
) -> Steps[Restored]:
    """Read files into memory, and publish what they hold as if it had been computed.

    See `DiskTier.restoring`.
    """
    problems: list[str] = []
    missing: dict[FileId, WrittenFile] = {}
    for file_id in _missing(levels, session, salt):
        try:
            missing[file_id] = levels.disk.index.file(file_id)
        except CorruptFileError as error:
            problems.append(str(error))
    if not (always or levels.cost.pays(missing.values())):
        return Restored(0, 0, sum(file.num_rows for file in missing.values()), ())
    num_rows = num_bytes = 0
    seconds = 0.0
    damaged: list[FileId] = []
    with levels.store.holding() as held:
        for file, job in _read_ahead(levels, missing):
            try:
                rows, read_s = yield from awaited(job)
            except CorruptFileError as error:
                log.warning("%s", error)
                problems.append(str(error))
                damaged.append(file)
                continue
            start = time.perf_counter()
            pages = _load(levels, file, rows, salt)
            if pages is None:
                break
            held.append(pages)
            seconds += read_s / NUM_READERS + time.perf_counter() - start
            num_rows += len(rows)
            num_bytes += missing[file].num_bytes
            yield job  # done already: whoever drives these steps may give others their turn
        num_lacking = _publish(levels, session, salt)
    for file in damaged:
        yield from levels.turn.free()
        yield from levels.on_index(partial(levels.disk.forget_file, file))
    if num_bytes:
        levels.cost.note_read(num_bytes, seconds)
    return Restored(num_rows, num_bytes, num_lacking, tuple(problems))


def _missing(levels: Levels, session: StoredSession, salt: Salt) -> list[FileId]:
    """Files that memory lacks, in the order in which agents have their tokens."""
    unpublished = _unpublished(levels.store, session, salt)
    wanted: list[Extents] = [segment.cache.extents for segment in unpublished]
    for cache in session.caches.values():
        _, slots = levels.match_computed(PrefixHashes(cache.token_ids, salt))
        wanted.append(cache.extents[np.cumsum(cache.extents[:, 2]) > len(slots)])
    extents = np.concatenate([np.empty((0, 3), np.int64), *wanted])
    return [
        file
        for file in map(FileId, dict.fromkeys(extents[:, 0].tolist()))
        if not levels.files.in_memory(file, extents[extents[:, 0] == file])
    ]


def _read_ahead(
    levels: Levels, files: Mapping[FileId, WrittenFile]
) -> Iterator[tuple[FileId, _Read]]:
    """Read files in their order, a few ahead of whoever takes them."""

    def read(file: WrittenFile) -> tuple[KVRows, float]:
        start = time.perf_counter()
        return levels.disk.read(file), time.perf_counter() - start

    waiting: list[tuple[FileId, _Read]] = []
    for file, written in files.items():
        waiting.append((file, levels.threads.readers.submit(read, written)))
        if len(waiting) > NUM_READERS:
            yield waiting.pop(0)
    yield from waiting


def _load(levels: Levels, file: FileId, rows: KVRows, salt: Salt) -> PageIds | None:
    """Put a file's rows into memory; return the pages, held, or None if there is no room.

    What is kept for other tenants is left alone: these pages are held until all is read.
    """
    store = levels.store
    num_pages = store.num_pages([len(rows)])
    num_left = store.pool.num_pages - store.pool.num_held(Holder.REQUEST) - levels.num_kept(salt)
    if num_pages > num_left or not store.make_room(num_pages):
        return None
    (slots,), pages = store.take_slots([len(rows)])
    try:
        levels.memory.write_kv(slots, rows)
    except BaseException:
        store.pool.release(pages, Holder.REQUEST)
        raise
    store.slot_ready[slots] = True
    levels.files.note(file, slots)
    return pages


# -- publishing -------------------------------------------------------------------------------


def _publish(levels: Levels, session: StoredSession, salt: Salt) -> int:
    """Publish what memory has of a session; return how many tokens it lacks."""
    store, files = levels.store, levels.files
    num_lacking = 0
    for cache in session.caches.values():
        text = PrefixHashes(cache.token_ids, salt)
        _, slots = levels.match_computed(text)
        slots = np.concatenate([slots, files.slots_of(cache.extents, len(slots))])
        # The prompt by itself, too: an answer may be told otherwise than it was generated.
        for length in {min(cache.num_prompt, len(slots)), len(slots)}:
            # Whether the agent guards its text is not stored, so nobody else is offered any of it.
            store.publish_prefix(text, slots[:length], min(cache.num_exact, length), guarded=True)
        pages, _ = levels.match_computed(text)
        files.mark_on_disk(pages)
        num_lacking += len(cache.token_ids) - len(slots)
    levels.cost.tell(store.order)
    runs: dict[int, list[SegmentRecord]] = {}
    for segment in _unpublished(store, session, salt):
        runs.setdefault(segment.run, []).append(segment)
    for run in runs.values():
        _publish_run(levels, sorted(run, key=lambda segment: segment.index), salt)
    return num_lacking


def _unpublished(store: KVStore, session: StoredSession, salt: Salt) -> list[SegmentRecord]:
    """Shared segments of which the store has no copy."""
    return [
        segment
        for segment in session.segments
        if not store.all_cached(hash_segment(segment.cache.token_ids, salt))
    ]


def _publish_run(levels: Levels, run: Sequence[SegmentRecord], salt: Salt) -> None:
    in_memory: list[SegmentRecord] = []
    parts: list[tuple[SegmentHash, int, Slots]] = []
    for segment in run:
        token_ids = segment.cache.token_ids
        slots = levels.files.slots_of(segment.cache.extents)
        if len(slots) == len(token_ids):
            # Where the first token stood in the prompt of who computed it.
            start = int(levels.memory.positions_of(slots[:1])[0])
            in_memory.append(segment)
            parts.append((hash_segment(token_ids, salt), start, slots))
    entries = levels.store.publish_run(parts)
    for segment, entry in zip(in_memory, entries, strict=True):
        entry.verified = True
        # Rounds of another process: their numbers are below all that rounds have here.
        entry.rounds = {RoundId(-2 - number) for number in range(segment.num_rounds)}
