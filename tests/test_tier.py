"""The tier by itself: over arrays in place of an engine's memory, by a clock of the test's own."""

import threading
from collections.abc import Iterator
from concurrent.futures import wait
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tokendance import SamplingParams
from tokendance.disk.kv_file import WrittenFile
from tokendance.disk.records import FileId, SessionKey, StoredSession
from tokendance.disk.store import DiskStore
from tokendance.engine.request import Request
from tokendance.rounds.segments import (
    PrefixHashes,
    TokenIds,
    as_token_ids,
    build_prompt,
    make_salt,
)
from tokendance.server.kept_chats import KeptChat
from tokendance.store.entries import RoundId, Slots
from tokendance.store.eviction import EvictionOrder
from tokendance.store.kv_rows import KVRows
from tokendance.store.kv_store import KVStore
from tokendance.store.pages import Holder, PagePool
from tokendance.tier.caches import SessionSnapshot, SpokenCache
from tokendance.tier.levels import ReadCost
from tokendance.tier.slot_files import SlotFiles
from tokendance.tier.steps import Steps, finish
from tokendance.tier.tier import DiskTier

SALT = make_salt("test")
TOWN = SessionKey("", "town")
LAYERS, HEADS, SIZE = 2, 1, 4
BYTES_PER_TOKEN = 2 * LAYERS * HEADS * SIZE * 4  # keys and values in float32


class Arrays:
    """Keys and values by slot, drawn at random; what is read is counted."""

    def __init__(self, num_slots: int) -> None:
        random = np.random.default_rng(0)
        shape = (2, LAYERS, HEADS, num_slots, SIZE)
        self.keys, self.values = random.standard_normal(shape).astype(np.float32)
        self.positions = np.zeros(num_slots, np.int32)
        self.num_reads = 0

    def read_kv(self, slots: Slots) -> KVRows:
        self.num_reads += 1
        return KVRows(self.positions[slots], self.keys[:, :, slots], self.values[:, :, slots])

    def positions_of(self, slots: Slots) -> npt.NDArray[np.int32]:
        return self.positions[slots]

    def write_kv(self, slots: Slots, rows: KVRows) -> None:
        self.keys[:, :, slots], self.values[:, :, slots] = rows.keys, rows.values
        self.positions[slots] = rows.positions


class Town:
    """A store of 64 pages of 4 tokens, with its tier."""

    def __init__(self, folder: Path) -> None:
        self.num_kept = 0  # pages, for others
        self.store = KVStore(PagePool(64, 4), max_reuse_rounds=4)
        self.memory = Arrays(256)
        self.disk = DiskStore(folder, {})
        self.tier = DiskTier(
            self.store,
            self.memory,
            self.disk,
            bytes_per_token=BYTES_PER_TOKEN,
            seconds_per_token=lambda: None,
            num_kept=lambda _: self.num_kept,
        )

    def compute(self, token_ids: TokenIds) -> Slots:
        """Put the KV of a prompt into memory, as far as it is not there; return its slots."""
        text = PrefixHashes(token_ids, SALT)
        known = self.store.match_slots(text)
        (slots,), pages = self.store.take_slots([len(token_ids) - len(known)])
        self.store.slot_ready[slots] = True
        self.memory.positions[slots] = np.arange(len(known), len(token_ids))
        slots = np.concatenate([known, slots])
        self.store.publish_prefix(text, slots, len(token_ids))
        self.store.pool.release(pages, Holder.REQUEST)
        return slots

    def kv_of(self, token_ids: TokenIds) -> npt.NDArray[np.float32]:
        """Keys and values that memory has of a prompt, in its order."""
        slots = self.store.match_slots(PrefixHashes(token_ids, SALT))
        return np.stack([self.memory.keys[:, :, slots], self.memory.values[:, :, slots]])

    def stored(self, key: SessionKey = TOWN) -> StoredSession:
        session = self.disk.session(key)
        assert session is not None
        return session

    def extents(self) -> dict[str, list[tuple[int, int, int]]]:
        """Of each agent's cache, with the files numbered in the order of their first mention."""
        numbers: dict[int, int] = {}
        return {
            agent: [
                (numbers.setdefault(file, len(numbers)), first, count)
                for file, first, count in cache.extents.tolist()
            ]
            for agent, cache in self.stored().caches.items()
        }


@pytest.fixture
def town(tmp_path: Path) -> Iterator[Town]:
    found = Town(tmp_path / "store")
    yield found
    found.disk.check_integrity()
    found.store.check_integrity([])
    found.tier.close()


def tokens(*runs: tuple[int, int]) -> TokenIds:
    """Each token so many times."""
    return as_token_ids(token for token, count in runs for _ in range(count))


def snapshot(caches: dict[str, TokenIds], number: int = 1) -> SessionSnapshot:
    spoken = {agent: SpokenCache(ids, len(ids)) for agent, ids in caches.items()}
    return SessionSnapshot(TOWN, number, b"state", spoken, (), SALT)


ANN, BO = tokens((1, 8), (2, 5)), tokens((1, 8), (3, 3))


# -- saving and loading -----------------------------------------------------------------------


def test_what_is_shared_is_written_once_and_read_into_place(town: Town) -> None:
    caches = {"ann": ANN, "bo": BO}
    for ids in caches.values():
        town.compute(ids)
    before = {agent: town.kv_of(ids) for agent, ids in caches.items()}
    town.tier.save(snapshot(caches))
    # One file of what both read, and one of each one's own tokens.
    assert town.extents() == {"ann": [(0, 0, 8), (1, 0, 5)], "bo": [(0, 0, 8), (2, 0, 3)]}
    assert town.tier.bytes_on_disk == town.disk.num_bytes > 16 * BYTES_PER_TOKEN
    town.store.clear()
    town.memory.keys[:], town.memory.values[:] = 0, 0
    restored = town.tier.restore(town.stored(), SALT)
    assert (restored.rows, restored.computed, restored.problems) == (16, 0, ())
    for agent, ids in caches.items():
        assert np.array_equal(town.kv_of(ids), before[agent])
    # Everything is there now, so nothing is read; and nothing is new, so nothing is written.
    assert town.tier.restore(town.stored(), SALT).rows == 0
    reads = town.memory.num_reads
    town.tier.save(snapshot(caches, 2))
    assert town.memory.num_reads == reads
    assert (town.stored().round, town.extents()["bo"]) == (2, [(0, 0, 8), (2, 0, 3)])


def test_others_have_their_turn_between_two_files(town: Town) -> None:
    """Also where all files have been read by the time the first of them is put into memory."""
    caches = {"ann": ANN, "bo": BO}  # in three files
    for ids in caches.values():
        town.compute(ids)
    town.tier.save(snapshot(caches))
    town.store.clear()
    num_held = [0]
    for job in town.tier.restoring(town.stored(), SALT):
        wait([job])
        num_held.append(town.store.pool.num_held(Holder.REQUEST))
    more = [later - before for before, later in pairwise(num_held)]
    assert [pages for pages in more if pages] == [2, 2, 1]  # of 8, 5 and 3 tokens, one by one


def test_a_round_adds_files_of_what_is_new(town: Town) -> None:
    town.compute(ANN)
    town.tier.save(snapshot({"ann": ANN}))
    longer = np.concatenate([ANN[:12], tokens((7, 6))])
    town.compute(longer)
    town.tier.save(snapshot({"ann": longer}, 2))
    assert town.extents() == {"ann": [(0, 0, 12), (1, 0, 6)]}


def test_what_memory_has_lost_stays_as_it_was(town: Town) -> None:
    for ids in (ANN, BO):
        town.compute(ids)
    town.tier.save(snapshot({"ann": ANN, "bo": BO}))
    before = town.extents()
    town.store.clear()
    town.compute(BO)
    town.tier.save(snapshot({"ann": ANN, "bo": BO}, 2))
    assert town.extents()["ann"] == before["ann"]
    assert town.extents()["bo"] == [(2, 0, 11)]  # nobody knows that memory has what was written


def test_a_session_is_read_once_when_it_is_saved(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    town.compute(ANN)
    town.tier.save(snapshot({"ann": ANN}))
    reads = []
    session = town.disk.session

    def count(key: SessionKey) -> StoredSession | None:
        reads.append(key)
        return session(key)

    monkeypatch.setattr(town.disk, "session", count)
    town.tier.save(snapshot({"ann": ANN}, 2))
    assert len(reads) == 1
    town.tier.save(snapshot({"ann": ANN}, 3), session(TOWN))
    assert len(reads) == 1
    chat = KeptChat(TOWN, SALT, town.tier)
    chat.note(request_of(ANN))
    finish(chat.saving())
    assert len(reads) == 2
    assert town.stored().round == 4


def test_what_is_kept_for_other_tenants_is_not_taken(town: Town) -> None:
    for ids in (ANN, BO):
        town.compute(ids)
    town.tier.save(snapshot({"ann": ANN, "bo": BO}))
    town.store.clear()
    town.num_kept = town.store.pool.num_pages - 3  # which what both have read fits into
    assert town.tier.restore(town.stored(), SALT).rows == 8
    town.num_kept = 0
    assert town.tier.restore(town.stored(), SALT).rows == 8


def begin_to_write(town: Town, steps: Steps[None]) -> None:
    """Do the steps of a save up to its first file."""
    job = next(steps)
    while town.memory.num_reads == 0:
        wait([job])
        job = next(steps)


def test_what_is_being_saved_is_not_evicted(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests go on meanwhile, and want its pages; what it refers to is there when it is named."""
    slow = SlowDisk(town, monkeypatch)
    town.compute(ANN)
    steps = town.tier.saving(snapshot({"ann": ANN}))
    begin_to_write(town, steps)
    assert not town.store.make_room(town.store.pool.num_pages)
    town.store.check_integrity([])
    slow.may_write.release(9)
    finish(steps)
    assert town.extents() == {"ann": [(0, 0, 13)]}
    assert town.store.make_room(town.store.pool.num_pages)


def test_who_gives_up_saving_leaves_nothing_behind(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowDisk(town, monkeypatch)
    town.compute(ANN)
    steps = town.tier.saving(snapshot({"ann": ANN}))
    begin_to_write(town, steps)
    steps.close()
    slow.may_write.release(9)
    settle(town)
    assert num_files(town) == 0
    town.tier.save(snapshot({"ann": ANN}))
    assert town.extents() == {"ann": [(0, 0, 13)]}


def test_saves_take_turns(town: Town) -> None:
    """What one has found on disk has to be there until its session is named."""
    for ids in (ANN, BO):
        town.compute(ids)
    first = town.tier.saving(snapshot({"ann": ANN}))
    other = SessionKey("", "city")
    second = town.tier.saving(replace(snapshot({"bo": BO}), key=other))
    next(first)
    waits_for = next(second)
    finish(first)
    assert waits_for.done()
    assert town.disk.index.session_keys() == [TOWN]
    finish(second)
    assert set(town.disk.index.session_keys()) == {TOWN, other}


# -- in the background ------------------------------------------------------------------------


def request_of(token_ids: TokenIds, key: SessionKey = TOWN, *, decodes: bool = True) -> Request:
    prompt = build_prompt([(token_ids.copy(), False)], SALT)
    request = Request("ann", RoundId(1), prompt, SamplingParams(), 9, session=key)
    request.generated = [5] if decodes else []
    return request


class SlowDisk:
    """Lets one file after the other be written."""

    def __init__(self, town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_write, self.has_written = threading.Semaphore(0), threading.Semaphore(0)
        write = town.disk.write

        def wait_and_write(rows: KVRows) -> tuple[FileId, WrittenFile]:
            assert self.may_write.acquire(timeout=60)
            try:
                return write(rows)
            finally:
                self.has_written.release()

        monkeypatch.setattr(town.disk, "write", wait_and_write)

    def write_one(self) -> None:
        self.may_write.release()
        assert self.has_written.acquire(timeout=60)


def settle(town: Town) -> None:
    """Let the thread that writes come to the end of what it has been given."""
    town.tier._levels.threads.writer.submit(lambda: None).result(60)


def num_files(town: Town) -> int:
    return len(list((town.disk.folder / "kv").iterdir()))


def test_a_round_that_nobody_saves_is_removed_in_time(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowDisk(town, monkeypatch)
    town.compute(ANN)
    town.tier.after_step(50.0, [request_of(ANN, decodes=False)])
    assert town.memory.num_reads == 0  # its prompt may not be computed whole
    assert town.tier.due_s() is None
    town.tier.after_step(100.0, [request_of(ANN)])
    slow.write_one()
    town.tier.after_step(103.0, [request_of(ANN)])
    assert town.tier.due_s() == 113.0
    town.tier.after_step(112.9, ())
    assert num_files(town) == 1
    settle(town)
    town.tier.after_step(113.0, ())
    assert num_files(town) == 0
    assert town.tier.due_s() is None


def test_what_was_written_in_the_background_is_taken_over(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowDisk(town, monkeypatch)
    for ids in (ANN, BO):
        town.compute(ids)
    requests = [request_of(ANN), request_of(BO)]
    for second in range(3):
        town.tier.after_step(float(second), requests)
        slow.write_one()
    assert town.memory.num_reads == 3
    town.tier.save(snapshot({"ann": ANN, "bo": BO}))
    assert town.memory.num_reads == 3
    assert town.extents() == {"ann": [(0, 0, 8), (1, 0, 5)], "bo": [(0, 0, 8), (2, 0, 3)]}
    assert town.tier.due_s() is None


def test_answers_are_written_in_the_background_too(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowDisk(town, monkeypatch)
    request = request_of(ANN)
    town.compute(ANN)
    town.tier.after_step(0.0, [request])
    request.generated = [5, 6, 7]
    request.finish_reason = "stop"
    said = np.concatenate([ANN, as_token_ids(request.generated)])
    town.compute(said)
    town.tier.after_step(1.0, [request])
    assert town.tier.go_on_writing(TOWN)
    for _ in range(2):
        slow.write_one()
    settle(town)
    assert not town.tier.go_on_writing(TOWN)
    town.tier.after_step(60.0, ())  # it is awaited, so nothing is dropped
    assert town.tier.due_s() is None
    assert town.memory.num_reads == 2
    town.tier.save(snapshot({"ann": said}))  # writes no file by itself: the disk would be slow
    assert town.memory.num_reads == 2
    assert town.extents() == {"ann": [(0, 0, 13), (1, 0, 3)]}
    assert not town.tier.go_on_writing(TOWN)


def test_what_is_dropped_while_it_is_written_is_removed_then(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowDisk(town, monkeypatch)
    town.compute(ANN)
    town.tier.after_step(0.0, [request_of(ANN)])
    town.tier.after_step(10.0, ())  # waits for nothing
    slow.may_write.release()
    settle(town)
    assert num_files(town) == 0


def test_few_copies_wait_to_be_written(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowDisk(town, monkeypatch)
    for ids in (ANN, BO):
        town.compute(ids)
    for second in range(9):
        town.tier.after_step(float(second), [request_of(ANN), request_of(BO)])
    assert town.memory.num_reads == 2
    slow.write_one()
    slow.write_one()
    town.tier.give_up(TOWN)
    assert num_files(town) == 0


def test_slots_that_hold_something_else_by_now_are_not_taken_over(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowDisk(town, monkeypatch)
    town.compute(ANN)
    town.tier.after_step(0.0, [request_of(ANN)])
    slow.write_one()
    assert num_files(town) == 1
    town.store.clear()
    town.compute(BO)  # in the same slots
    slow.may_write.release(2)
    town.tier.save(snapshot({"ann": ANN, "bo": BO}))
    assert town.extents() == {"ann": [(0, 0, 8)], "bo": [(0, 0, 8), (1, 0, 3)]}
    assert num_files(town) == 2


# -- which slots hold which rows --------------------------------------------------------------


def slots(*numbers: int) -> Slots:
    return np.array(numbers, np.int32)


def test_slots_and_extents_lead_to_each_other() -> None:
    store = KVStore(PagePool(8, 4), max_reuse_rounds=1)
    _, pages = store.take_slots([24])
    files = SlotFiles(store, BYTES_PER_TOKEN)
    files.note(FileId(7), slots(0, 1, 2, 3, 8, 9))
    files.note(FileId(3), slots(4, 5))
    extents = files.extents_of(slots(1, 2, 3, 4, 5, 0, 8, 9, 20, 0))
    # Ends before slot 20, which is in no file.
    assert extents.tolist() == [[7, 1, 3], [3, 0, 2], [7, 0, 1], [7, 4, 2]]
    assert files.extents_of(slots(20)).tolist() == []
    assert files.slots_of(extents).tolist() == [1, 2, 3, 4, 5, 0, 8, 9]
    assert files.slots_of(extents, skip=4).tolist() == [5, 0, 8, 9]
    assert files.in_memory(FileId(7), extents[extents[:, 0] == 7])
    assert not files.in_memory(FileId(7), np.array([[7, 5, 2]]))  # it has 6 rows
    files.forget([FileId(3)])
    assert files.slots_of(extents).tolist() == [1, 2, 3]
    # A page that nobody holds is gone, although its slots have not been taken again.
    store.pool.release(pages[2:], Holder.REQUEST)
    assert not files.in_memory(FileId(7), extents[extents[:, 0] == 7])
    assert files.slots_of(extents[2:]).tolist() == [0]
    store.take_slots([4])
    assert not files.is_written(slots(8, 9)).any()
    assert files.is_written(slots(0, 1, 2, 3)).all()


def test_what_is_not_written_is_grouped_by_who_reads_it() -> None:
    store = KVStore(PagePool(8, 4), max_reuse_rounds=1)
    store.take_slots([32])
    files = SlotFiles(store, BYTES_PER_TOKEN)
    files.note(FileId(1), slots(0, 1))
    groups = files.unwritten(
        [slots(0, 1, 2, 3, 9, 10), slots(2, 3, 12), slots(2, 3)],
        [slots(3, 12, 20, 21)],  # of a shared segment: 20 and 21 are in no cache
    )
    assert [group.tolist() for group in groups] == [[2, 3, 20, 21], [9, 10], [12]]
    assert all(group.dtype == np.int32 for group in groups)


def test_no_file_is_larger_than_the_engine_may_copy_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tokendance.tier.slot_files._MAX_FILE_BYTES", 3 * BYTES_PER_TOKEN + 1)
    store = KVStore(PagePool(8, 4), max_reuse_rounds=1)
    store.take_slots([32])
    groups = SlotFiles(store, BYTES_PER_TOKEN).unwritten([np.arange(8, dtype=np.int32)], ())
    assert [group.tolist() for group in groups] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    monkeypatch.setattr("tokendance.tier.slot_files._MAX_FILE_BYTES", 1)  # a row is one, at least
    groups = SlotFiles(store, BYTES_PER_TOKEN).unwritten([slots(4, 5)], ())
    assert [group.tolist() for group in groups] == [[4], [5]]


def test_files_of_which_little_is_needed_are_sparse() -> None:
    store = KVStore(PagePool(8, 4), max_reuse_rounds=1)
    store.take_slots([32])
    files = SlotFiles(store, BYTES_PER_TOKEN)
    files.note(FileId(1), slots(0, 1, 2, 3))
    files.note(FileId(2), slots(4, 5, 6, 7))
    files.note(FileId(3), slots(8, 9, 10, 11))
    # Two of four rows are half; of a file that nobody needs at all nothing has to be written.
    assert files.sparse([slots(0, 1), slots(0, 4)], 0.5) == [2]
    files.note(FileId(2), slots(12, 13, 14, 15))  # read again: its row 0 lies in two slots
    assert files.sparse([slots(4, 12)], 0.5) == [2]
    assert files.sparse([slots(4, 13)], 0.5) == []


# -- what reading costs -----------------------------------------------------------------------


def test_reading_pays_where_it_is_quicker_than_computing() -> None:
    seconds_per_token: list[float | None] = [None]
    cost = ReadCost(1000, lambda: seconds_per_token[0])
    order = EvictionOrder()
    files = [WrittenFile("a", 10, 8000, b""), WrittenFile("b", 30, 8000, b"")]
    cost.note_read(2_000_000, 2.0)  # a megabyte a second: 16 ms for 40 tokens
    cost.tell(order)
    assert cost.pays(files)  # while nobody knows what computing takes
    assert order.disk_cost == 1.0
    for per_token, pays in ((0.0005, True), (0.0003, False)):
        seconds_per_token[0] = per_token
        assert cost.pays(files) == pays
    cost.tell(order)
    assert order.disk_cost == pytest.approx(0.001 / 0.0003)
