"""Between memory and disk: what a session leaves is written, and is read when it goes on.

Memory is written through: whatever of a session's KV is not on disk yet goes there, prompts while
the round decodes (`engine/write_ahead.py`) and the rest at its end, so eviction from memory only
forgets. A round adds a file of what several agents read (its runs), and files of each agent's own
tokens; what earlier rounds wrote is referred to again:

    agent's tokens   [ own, round 1 ][ run, round 1 ][ own ][ run, round 2 ][ own, round 2 ]
    extents            file 7, 0-310   file 3, 0-980   7, 310-   file 9, ...   file 12, ...

Rows of a file lie in the order of their slots. When they come back they take slots in the same
order, so attention reads the same extents of memory as before.
"""

import logging
import time
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokendance.disk.kv_file import KVRows, WrittenFile, file_bytes
from tokendance.disk.records import (
    CacheRecord,
    Extents,
    FileId,
    SegmentRecord,
    SessionKey,
    StoredSession,
)
from tokendance.disk.store import DiskStore
from tokendance.engine.engine import Engine
from tokendance.engine.request import Request
from tokendance.engine.write_ahead import WriteAhead
from tokendance.errors import CorruptFileError, StoreError
from tokendance.rounds.segments import Salt, TokenIds, hash_segment
from tokendance.store.entries import PrefixBlock, RoundId, SegmentCopy, Slots, exact_length
from tokendance.store.pages import Holder
from tokendance.store.slot_files import SlotFiles

log = logging.getLogger("tokendance.store")

# Larger files are cut, so that none has to fit memory twice.
_MAX_ROWS = 4096
_READERS = 2
# Of a file's rows, below which the file is written anew without the others.
_LEAST_SHARE = 0.5
# Bytes a second until some were read here.
_FIRST_RATE = 500e6


@dataclass(frozen=True, slots=True, eq=False)
class SpokenCache:
    """What an agent has read and said, all of which may have KV.

    Attributes:
        token_ids: int32, prompt and answer.
        num_prompt: length of the prompt.
    """

    token_ids: TokenIds
    num_prompt: int

    @classmethod
    def of(cls, prompt: TokenIds, answer: Sequence[int]) -> "SpokenCache":
        """Put an answer behind its prompt."""
        return cls(np.concatenate([prompt, np.array(answer, np.int32)]), len(prompt))


@dataclass(frozen=True, slots=True)
class Restored:
    """What was read of a session.

    Attributes:
        rows: tokens whose KV was read.
        num_bytes: of the files.
        computed: tokens that are left to compute again.
        problems: what was wrong with files, a sentence each.
    """

    rows: int
    num_bytes: int
    computed: int
    problems: tuple[str, ...]


# A file's rows, and the seconds that reading them took.
_Read = Future[tuple[KVRows, float]]
Restoring = Generator[_Read, None, Restored]


class Tiers:
    """Moves KV of sessions between an engine's memory and a disk store.

    Use it on the engine's thread, between two steps.

    Attributes:
        disk: the store.
        bytes_on_disk: of KV, when it was last looked at; for whoever reads it from elsewhere.
    """

    def __init__(self, engine: Engine, disk: DiskStore) -> None:
        """Write what this engine computes to `disk`."""
        self._engine = engine
        self.disk = disk
        self._files = SlotFiles(engine.store)
        self._ahead = WriteAhead(disk, engine.store)
        self._bytes_per_s = _FIRST_RATE
        self.bytes_on_disk = disk.num_bytes

    # -- memory to disk -----------------------------------------------------------------------

    def save(
        self,
        key: SessionKey,
        *,
        round_number: int,
        state: bytes,
        caches: Mapping[str, SpokenCache],
        heard: Iterable[TokenIds],
        salt: Salt,
        ttl_s: float | None = None,
    ) -> None:
        """Make a session durable as it is now; KV that does not fit the budget is left out.

        Args:
            key: of the session.
            round_number: of its next round.
            state: what it needs to go on, besides KV.
            caches: what each agent has read and said; as much as has KV is kept.
            heard: shared segments whose copies are kept, too, int32.
            salt: of these prompts.
            ttl_s: see `StoredSession`.

        Raises:
            StoreError: if the disk cannot be written; what was durable before still is.
        """
        found = {agent: self._match(one.token_ids, salt) for agent, one in caches.items()}
        only_on_disk = self._only_on_disk(key, caches, found)
        for agent in only_on_disk:
            del found[agent]
        slots = {agent: matched for agent, (_, matched) in found.items()}
        copies = self._choose_copies(heard, salt, list(slots.values()))
        wanted = list(slots.values()), [copy.slots for _, copy in copies]
        written: dict[FileId, WrittenFile] = {}
        for file, one, group in self._ahead.collect(key):
            written[file] = one
            self._files.note(file, group)
        try:
            new_bytes = sum(map(len, self._groups(written, *wanted))) * self._row_bytes
            unnamed = self._ahead.num_bytes + sum(one.num_bytes for one in written.values())
            self.disk.make_room(new_bytes + unnamed, key)
            room = self.disk.budget - self.disk.num_bytes - unnamed
            keep = {FileId(file) for one in only_on_disk.values() for file in one.extents[:, 0]}
            self._forget_sparse(key, *wanted, keep=keep, room=room - new_bytes)
            # Anew: what made room may have had something of it.
            for group in self._groups(written, *wanted):
                rows = self._rows(group)
                if file_bytes(rows) > room:
                    continue  # and is computed again
                file, one = self.disk.write(rows)
                written[file] = one
                room -= one.num_bytes
                self._files.note(file, group)
            records = {
                agent: self._record(caches[agent], matched, found[agent][0])
                for agent, matched in slots.items()
            }
            self.disk.commit(
                key,
                round_number=round_number,
                state=state,
                caches=records | only_on_disk,
                segments=self._copy_records(copies),
                files=written,
                ttl_s=ttl_s,
            )
        except BaseException:
            self._files.forget(written)
            self.disk.discard(written.values())
            raise
        for blocks, _ in found.values():
            self._mark(blocks)
        self.bytes_on_disk = self.disk.num_bytes

    def _only_on_disk(
        self,
        key: SessionKey,
        caches: Mapping[str, SpokenCache],
        found: Mapping[str, tuple[list[PrefixBlock], Slots]],
    ) -> dict[str, CacheRecord]:
        """Caches that memory has evicted, in part at least: of agents who were not in the round."""
        try:
            stored = self.disk.session(key)
        except CorruptFileError:
            stored = None
        return {
            agent: record
            for agent, record in (stored.caches.items() if stored is not None else ())
            if agent in caches
            and len(record.token_ids) > len(found[agent][1])
            and np.array_equal(record.token_ids, caches[agent].token_ids[: len(record.token_ids)])
        }

    def _forget_sparse(
        self,
        key: SessionKey,
        caches: Sequence[Slots],
        copies: Sequence[Slots],
        *,
        keep: Collection[FileId],
        room: int,
    ) -> None:
        """Forget a session's files most of which nobody needs: what is needed is written again.

        Rows are forgotten where histories are cut and where agents leave; a file goes with its
        last. Writing what is left of it elsewhere costs no more than half of what it frees.
        """
        sparse = self._files.sparse(self._marked([*caches, *copies]), _LEAST_SHARE)
        forgotten: list[FileId] = []
        for file in self.disk.index.own_files(key).difference(keep).intersection(sparse):
            # Until the old one is gone there are both, and of the new one half as much or less.
            room -= self.disk.index.file(file).num_bytes
            if room < 0:
                break
            forgotten.append(file)
        self._files.forget(forgotten)

    def _marked(self, several: Iterable[Slots]) -> npt.NDArray[np.bool_]:
        """By slot, whether it is one of these."""
        marked = np.zeros(len(self._engine.store.slot_position), np.bool_)
        for slots in several:
            marked[slots] = True
        return marked

    def _choose_copies(
        self, heard: Iterable[TokenIds], salt: Salt, caches: Sequence[Slots]
    ) -> list[tuple[TokenIds, SegmentCopy]]:
        """One copy of each segment: that of which caches read most, of several the newest."""
        store = self._engine.store
        is_read = self._marked(caches)
        chosen: list[tuple[TokenIds, SegmentCopy]] = []
        for segment in heard:
            copies = [
                copy
                for copy in reversed(store.all_copies(hash_segment(segment, salt)))
                if store.slot_ready[copy.slots].all()
            ]
            if copies:
                best = max(copies, key=lambda copy: np.count_nonzero(is_read[copy.slots]))
                chosen.append((segment, best))
        return chosen

    def write_ahead(self, requests: Collection[Request]) -> None:
        """Begin to write what rounds of sessions have read, while they decode.

        Call it after each step, and when it is due; a call hands one file to another thread. What
        is written has no name until `save` gives it one, and is gone if nobody does.

        Args:
            requests: of rounds that are under way; those without a session are passed over.
        """
        rounds: dict[SessionKey, list[Request]] = {}
        for request in requests:
            if request.session is not None:
                rounds.setdefault(request.session, []).append(request)
        self._ahead.see(rounds)
        for key, together in rounds.items():
            if not all(request.is_decoding or request.finish_reason for request in together):
                continue
            try:
                self._write_next(key, together)
            except StoreError as error:  # the round goes on, and its end tells
                log.warning("KV cannot be written ahead: %s", error)
                self._ahead.begin(key, together[0].round_id, ())

    def _write_next(self, key: SessionKey, together: Sequence[Request]) -> None:
        """Write the next file of a round all of which decodes."""
        round_id = together[0].round_id
        if not self._ahead.has_begun(key, round_id):
            prompts = [request.prompt for request in together if request.error is None]
            caches = [self._match(prompt.token_ids, prompt.salt)[1] for prompt in prompts]
            groups = self._groups((), caches, ())
            self._ahead.begin(key, round_id, groups)
            self.disk.make_room(
                sum(map(len, groups)) * self._row_bytes + self._ahead.num_bytes, key
            )
        slots = self._ahead.next_slots(key)
        if slots is None:
            return
        room = self.disk.budget - self.disk.num_bytes - self._ahead.num_bytes
        rows = self._rows(slots) if len(slots) * self._row_bytes <= room else None
        if rows is None or file_bytes(rows) > room:
            self._ahead.stop(key)
        else:
            self._ahead.write(key, rows)

    @property
    def write_ahead_due_s(self) -> float | None:
        """When, on the clock of `time.perf_counter`, `write_ahead` has something to remove."""
        return self._ahead.due_s

    def give_up(self, key: SessionKey) -> None:
        """Remove what `write_ahead` has written of a session whose round will not be saved."""
        self._ahead.drop(key)

    @property
    def _row_bytes(self) -> int:
        return self._engine.kv_bytes_per_token + 4  # with its position

    def _rows(self, slots: Slots) -> KVRows:
        return self._engine.runner.memory.read(slots, self._engine.store.slot_position[slots])

    def close(self) -> None:
        """Close the store; what has no name in it is removed."""
        try:
            self._ahead.close()
        finally:
            self.disk.close()

    def _match(self, token_ids: TokenIds, salt: Salt) -> tuple[list[PrefixBlock], Slots]:
        """What memory has of a cache, up to the first token whose KV somebody still computes."""
        blocks, slots = self._engine.store.match_prefix(token_ids, salt, exact=False)
        ready = self._engine.store.slot_ready[slots]
        if ready.all():
            return blocks, slots
        slots = slots[: int(np.argmin(ready))]
        ends = np.cumsum([len(block.slots) for block in blocks])
        return blocks[: int(np.searchsorted(ends, len(slots), side="right"))], slots

    def _copy_records(
        self, copies: Sequence[tuple[TokenIds, SegmentCopy]]
    ) -> tuple[SegmentRecord, ...]:
        records = []
        for segment, copy in copies:
            cache = self._record(SpokenCache(segment, 0), copy.slots, ())
            if len(cache.token_ids) == len(segment):  # else the budget has cut it
                records.append(SegmentRecord(cache, copy.run, copy.index, len(copy.rounds)))
        return tuple(records)

    def _groups(
        self, unnamed: Collection[FileId], caches: Sequence[Slots], copies: Sequence[Slots]
    ) -> list[Slots]:
        """Slots that are not on disk, by file: what several caches have, then each one's own.

        Args:
            unnamed: files that are on disk and not in its index.
            caches: of agents.
            copies: of shared segments.
        """
        self._files.forget_all_but(self.disk.index.file_ids() | set(unnamed))
        num_readers = np.zeros(len(self._engine.store.slot_position), np.int64)
        for slots in caches:
            num_readers[np.unique(slots)] += 1
        for slots in copies:  # nobody's own, where no cache has them
            num_readers[slots[num_readers[slots] == 0]] = 2
        new = np.flatnonzero((num_readers > 0) & ~self._files.written()).astype(np.int32)
        groups = [new[num_readers[new] > 1]]
        is_own = np.zeros(len(num_readers), np.bool_)
        is_own[new[num_readers[new] == 1]] = True
        for slots in caches:
            own = np.unique(slots)
            groups.append(own[is_own[own]])
        return [
            group[at : at + _MAX_ROWS] for group in groups for at in range(0, len(group), _MAX_ROWS)
        ]

    def _mark(self, blocks: Sequence[PrefixBlock]) -> None:
        """Tell memory which entries could be read again, and for how much."""
        store = self._engine.store
        for block in reversed(blocks):
            if self._files.written(block.slots).all():
                store.order.mark_on_disk(block)
        per_token = self._engine.seconds_per_token
        if per_token is not None:
            read_s = self._engine.kv_bytes_per_token / self._bytes_per_s
            store.order.disk_cost = read_s / per_token

    def _record(
        self, cache: SpokenCache, slots: Slots, blocks: Sequence[PrefixBlock]
    ) -> CacheRecord:
        """Where a cache is on disk, up to the first token that is not."""
        extents = self._files.extents_of(slots)
        length = int(extents[:, 2].sum())
        return CacheRecord(
            cache.token_ids[:length],
            min(exact_length(blocks), length),
            min(cache.num_prompt, length),
            extents,
        )

    # -- disk to memory -----------------------------------------------------------------------

    def restore(self, session: StoredSession, salt: Salt, *, always: bool = False) -> Restored:
        """Read what memory lacks of a session's KV, as far as there is room, and if it pays.

        A file that is damaged is taken out of the store, and what it held is computed again.

        Args:
            session: as it was stored.
            salt: of its prompts.
            always: read it even if computing it would be quicker.
        """
        steps = self.restoring(session, salt, always=always)
        while True:
            try:
                wait([next(steps)])
            except StopIteration as end:
                found: Restored = end.value
                return found

    def restoring(self, session: StoredSession, salt: Salt, *, always: bool = False) -> Restoring:
        """The same in steps between which the engine may go on.

        Yields:
            A file that is being read: a step before it is there does nothing.
        """
        files = self._missing(session, salt)
        known: dict[FileId, WrittenFile] = {}
        problems: list[str] = []
        for file in files:
            try:
                known[file] = self.disk.index.file(file)
            except CorruptFileError as error:
                problems.append(str(error))
        if not (always or self._pays(known.values())):
            return Restored(0, 0, sum(one.num_rows for one in known.values()), ())
        num_rows = num_bytes = 0
        seconds = 0.0
        bad: set[FileId] = set()
        with ThreadPoolExecutor(_READERS, "store") as pool:
            contents = _read_ahead(self.disk, known, pool)
            this = object()
            held = self._engine.store.loading.setdefault(this, [])
            try:
                for file, content in contents:
                    yield content
                    while not content.done():
                        yield content
                    try:
                        rows, read_s = content.result()
                    except CorruptFileError as error:
                        log.warning("%s", error)
                        problems.append(str(error))
                        bad.add(file)
                        continue
                    start = time.perf_counter()
                    pages = self._load(file, rows)
                    if pages is None:
                        break
                    held.append(pages)
                    seconds += read_s / _READERS + time.perf_counter() - start
                    num_rows += len(rows)
                    num_bytes += known[file].num_bytes
                left = self._list(session, salt)
            finally:
                del self._engine.store.loading[this]
                for pages in held:
                    self._engine.store.pool.release(pages, Holder.REQUEST)
        for file in bad:
            self.disk.forget_file(file)
        if num_bytes:
            self._bytes_per_s = num_bytes / seconds
        return Restored(num_rows, num_bytes, left, tuple(problems))

    def _missing(self, session: StoredSession, salt: Salt) -> list[FileId]:
        """Files that memory lacks, in the order in which agents have their tokens."""
        wanted: list[Extents] = [copy.cache.extents for copy in self._unlisted(session, salt)]
        for cache in session.caches.values():
            _, matched = self._match(cache.token_ids, salt)
            wanted.append(cache.extents[np.cumsum(cache.extents[:, 2]) > len(matched)])
        extents = np.concatenate([np.empty((0, 3), np.int64), *wanted])
        return [
            file
            for file in dict.fromkeys(FileId(int(file)) for file in extents[:, 0])
            if not self._files.in_memory(file, extents[extents[:, 0] == file])
        ]

    def _pays(self, files: Iterable[WrittenFile]) -> bool:
        """Whether reading files takes less time than computing what they hold."""
        per_token = self._engine.seconds_per_token
        if per_token is None:
            return True
        read_s = sum(file.num_bytes for file in files) / self._bytes_per_s
        return read_s < per_token * sum(file.num_rows for file in files)

    def _load(self, file: FileId, rows: KVRows) -> npt.NDArray[np.int32] | None:
        """Put a file's rows into memory; return the pages, held, or None if there is no room."""
        store = self._engine.store
        positions = rows.positions.astype(np.int64)
        if not store.make_room(store.num_pages([positions])):
            return None
        (slots,), pages = store.take_slots([positions])
        try:
            self._engine.runner.memory.write(slots, rows)
        except BaseException:
            store.pool.release(pages, Holder.REQUEST)
            raise
        store.slot_ready[slots] = True
        self._files.note(file, slots)
        return pages

    def _list(self, session: StoredSession, salt: Salt) -> int:
        """List what is in memory in the prefix index; return how many tokens are not."""
        store = self._engine.store
        left = 0
        for cache in session.caches.values():
            _, matched = self._match(cache.token_ids, salt)
            every = np.concatenate([matched, self._files.slots_of(cache.extents, len(matched))])
            for length in {min(cache.num_prompt, len(every)), len(every)}:
                store.put_prefix(
                    cache.token_ids[:length], every[:length], salt, min(cache.num_exact, length)
                )
            self._mark(self._match(cache.token_ids[: len(every)], salt)[0])
            left += len(cache.token_ids) - len(every)
        runs: dict[int, list[SegmentRecord]] = {}
        for copy in self._unlisted(session, salt):
            runs.setdefault(copy.run, []).append(copy)
        for run in runs.values():
            self._list_run(sorted(run, key=lambda copy: copy.index), salt)
        return left

    def _unlisted(self, session: StoredSession, salt: Salt) -> list[SegmentRecord]:
        """Copies of segments of which memory has none."""
        store = self._engine.store
        return [
            copy
            for copy in session.segments
            if not store.all_copies(hash_segment(copy.cache.token_ids, salt))
        ]

    def _list_run(self, run: Sequence[SegmentRecord], salt: Salt) -> None:
        known = [
            (copy, slots)
            for copy in run
            if len(slots := self._files.slots_of(copy.cache.extents)) == len(copy.cache.token_ids)
        ]
        entries = self._engine.store.put_run(
            [(hash_segment(copy.cache.token_ids, salt), slots) for copy, slots in known]
        )
        for (copy, _), entry in zip(known, entries, strict=True):
            assert isinstance(entry, SegmentCopy)
            entry.sound = True
            # Rounds of another process: below all numbers that rounds have here.
            entry.rounds = {RoundId(-2 - place) for place in range(copy.num_rounds)}


def _read_ahead(
    disk: DiskStore, files: Mapping[FileId, WrittenFile], pool: ThreadPoolExecutor
) -> Iterator[tuple[FileId, _Read]]:
    """Read files in their order, a few ahead of whoever takes them."""

    def read(one: WrittenFile) -> tuple[KVRows, float]:
        start = time.perf_counter()
        return disk.read(one), time.perf_counter() - start

    waiting: list[tuple[FileId, _Read]] = []
    for file, one in files.items():
        waiting.append((file, pool.submit(read, one)))
        if len(waiting) > _READERS:
            yield waiting.pop(0)
    yield from waiting
