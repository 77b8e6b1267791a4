"""Sessions that last: they go on after a restart as if nothing had been."""

import itertools
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from conftest import examples
from tokendance import LLM, Agent, SamplingParams, Session
from tokendance.disk.kv_file import WrittenFile
from tokendance.disk.records import FileId, SessionKey
from tokendance.disk.store import DiskStore
from tokendance.engine.request import Request
from tokendance.errors import StoreError
from tokendance.models.loader import LoadedModel, load_model
from tokendance.options import EngineOptions
from tokendance.outputs import NotStoredError, RoundResult
from tokendance.store.kv_rows import KVRows

ANSWER = SamplingParams(max_tokens=10, ignore_eos=True)
PEOPLE = [Agent(name, f"I am {name}, and my number is {name * 3}.") for name in ("Ann", "Bo", "Cy")]


@pytest.fixture(scope="module")
def roomy(model_folder: Callable[..., Path]) -> LoadedModel:
    return load_model(str(model_folder("llama", max_position_embeddings=4096)), "float32")


class KeepsUp(ThreadPoolExecutor):
    """A thread that is done before the next step, however busy the machine is."""

    def submit(self, *arguments: Any, **named: Any) -> Future[Any]:
        job = super().submit(*arguments, **named)
        wait([job])
        return job


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what is written where: a save writes what the background has not begun."""
    monkeypatch.setattr("tokendance.tier.levels.ThreadPoolExecutor", KeepsUp)


def open_llm(
    model: LoadedModel,
    folder: Path | None,
    pages: int = 2000,
    correction: str | None = None,
    **budget: Any,
) -> LLM:
    page_bytes = model.shape.kv_bytes_per_token(model.dtype) * 16
    options = EngineOptions(kv_budget=pages * page_bytes, correction=correction)
    llm = LLM.from_loaded(model, options)
    if folder is not None:
        llm.open_store(folder, **budget)
    return llm


def run(session: Session, rounds: int) -> list[RoundResult]:
    results = [session.run(f"Speak, the {session.round}th time.") for _ in range(rounds)]
    for result in results:
        result.raise_for_errors()
    return results


def words(results: list[RoundResult]) -> list[list[tuple[int, ...]]]:
    return [[output.token_ids for output in result.outputs] for result in results]


def computed(results: list[RoundResult]) -> list[int]:
    return [result.stats.computed_tokens for result in results]


def rounds_on_disk(llm: LLM) -> int:
    assert llm.tier is not None
    stored = llm.tier.disk.session(SessionKey("", "town"))
    return stored.round if stored is not None else 0


def test_a_session_goes_on_where_the_last_process_stopped(
    roomy: LoadedModel, tmp_path: Path
) -> None:
    whole = run(open_llm(roomy, None).session(agents=PEOPLE, params=ANSWER), 5)
    parts: list[RoundResult] = []
    for rounds in (2, 1, 2):
        llm = open_llm(roomy, tmp_path / "store")
        session = llm.session("town", PEOPLE, params=ANSWER)
        assert session.round == len(parts)
        parts += run(session, rounds)
        llm.engine.check_integrity()
        assert llm.tier is not None
        llm.tier.disk.check_integrity()
        llm.close()
    assert words(parts) == words(whole)
    assert computed(parts) == computed(whole)  # nothing is computed twice


def test_what_was_evicted_is_read_again(roomy: LoadedModel, tmp_path: Path) -> None:
    whole = run(open_llm(roomy, None).session(agents=PEOPLE, params=ANSWER), 3)
    llm = open_llm(roomy, tmp_path / "store")
    session = llm.session("town", PEOPLE, params=ANSWER)
    parts = run(session, 2)
    llm.kv_store.clear()
    parts += run(session, 1)
    assert words(parts) == words(whole)
    assert computed(parts) == computed(whole)
    llm.close()


def test_without_kv_a_session_says_the_same(roomy: LoadedModel, tmp_path: Path) -> None:
    """What is stored of what was said is enough; KV saves computing it."""
    llm = open_llm(roomy, tmp_path / "store")
    first = run(llm.session("town", PEOPLE, params=ANSWER), 2)
    assert llm.tier is not None
    llm.tier.disk.drop_kv(SessionKey("", "town"))
    llm.kv_store.clear()
    (third,) = run(llm.session("town", params=ANSWER), 1)
    assert len(third.outputs) == 3
    assert third.stats.computed_tokens > first[1].stats.computed_tokens
    assert all(
        output.prompt_tokens > before.prompt_tokens
        for output, before in zip(third.outputs, first[1].outputs, strict=True)
    )
    llm.close()


@pytest.mark.usefixtures("quick_disk")
def test_the_stored_form_is_shared(roomy: LoadedModel, tmp_path: Path) -> None:
    """A round adds what is new: one run, and each agent's own tokens."""
    llm = open_llm(roomy, tmp_path / "store")
    session = llm.session("town", PEOPLE, params=ANSWER)
    assert llm.tier is not None
    disk, key = llm.tier.disk, SessionKey("", "town")
    before = disk.index.usage(key)
    for _ in range(4):
        (result,) = run(session, 1)
        usage = disk.index.usage(key)
        # Answers' last tokens have no KV yet, and are computed with the next prompt.
        new = result.stats.computed_tokens + result.stats.generated_tokens - len(PEOPLE)
        # One that held a special token is told without it; nothing refers to the file of it then.
        lost = new - (usage.stored_rows - before.stored_rows)
        assert lost in {0, 9, 18, 27}
        before = usage
    by_file = disk.index.readers(key).values()
    runs = [rows for rows, names in by_file if names == ["Ann", "Bo", "Cy"]]
    assert len(runs) == 3  # of rounds 2 to 4
    shared_rows = sum(runs)
    # Two of three readers refer to them.
    assert usage.dense_rows - usage.stored_rows == 2 * shared_rows
    session.leave("Ann")
    run(session, 1)
    assert not any("Ann" in names for _, names in disk.index.readers(key).values())
    disk.check_integrity()
    llm.close()


def test_a_damaged_file_costs_what_it_held(roomy: LoadedModel, tmp_path: Path) -> None:
    # Where the default corrects goes by what was reused before, and words may then differ.
    opened = partial(open_llm, roomy, correction="edges:3+1")
    whole = run(opened(None).session(agents=PEOPLE, params=ANSWER), 3)
    llm = opened(tmp_path / "store")
    run(llm.session("town", PEOPLE, params=ANSWER), 2)
    assert llm.tier is not None
    readers = llm.tier.disk.index.readers(SessionKey("", "town"))
    file = next(file for file, (_, names) in readers.items() if names == ["Bo"])
    path = tmp_path / "store" / "kv" / llm.tier.disk.index.file(file).name
    llm.close()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    llm = opened(tmp_path / "store")
    (third,) = run(llm.session("town", params=ANSWER), 1)
    assert words([third]) == words(whole[2:])
    expected = {output.agent: output.computed_tokens for output in whole[2].outputs}
    for output in third.outputs:
        assert (output.computed_tokens > expected[output.agent]) == (output.agent == "Bo")
    assert llm.tier is not None
    llm.tier.disk.check_integrity()
    llm.close()


def test_two_sessions_share_nothing_but_text(roomy: LoadedModel, tmp_path: Path) -> None:
    llm = open_llm(roomy, tmp_path / "store")
    one = llm.session("one", PEOPLE, params=ANSWER)
    other = llm.session("other", PEOPLE[:2], params=ANSWER)
    run(one, 2)
    run(other, 1)
    assert llm.session("one").round == 2
    assert llm.session("other").round == 1
    assert len(llm.session("other").agents) == 2
    assert llm.session("third").round == 0
    llm.close()


def test_a_budget_on_disk_is_kept(roomy: LoadedModel, tmp_path: Path) -> None:
    llm = open_llm(roomy, tmp_path / "store", budget="300KiB")
    assert llm.tier is not None
    for name in "abc":
        run(llm.session(name, PEOPLE, params=ANSWER), 3)
        llm.tier.disk.check_integrity()
        assert llm.tier.disk.num_bytes <= 300 * 2**10
    assert {llm.session(name).round for name in "abc"} == {3}
    llm.close()


def test_a_store_that_fails_says_so_and_keeps_the_round_before(
    roomy: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = open_llm(roomy, tmp_path / "store")
    session = llm.session("town", PEOPLE, params=ANSWER)
    run(session, 1)
    assert llm.tier is not None

    def fail(*_: object, **__: object) -> None:
        raise StoreError("The disk is full.")

    with monkeypatch.context() as patched:
        patched.setattr(llm.tier.disk, "commit", fail)
        with pytest.raises(NotStoredError, match="full") as raised:
            session.run("Speak.")
    assert len(raised.value.result.outputs) == 3  # nothing that was computed is lost
    llm.tier.disk.check_integrity()
    assert rounds_on_disk(llm) == 1
    run(session, 1)  # and it goes on when there is room again
    assert rounds_on_disk(llm) == 3
    llm.tier.disk.check_integrity()
    llm.close()


@pytest.mark.usefixtures("quick_disk")
def test_prompts_are_written_while_the_round_decodes(
    roomy: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(open_llm(roomy, None).session(agents=PEOPLE, params=ANSWER), 3)
    llm = open_llm(roomy, tmp_path / "store")
    assert llm.tier is not None
    disk = llm.tier.disk
    written: list[tuple[str, int]] = []  # by which thread, and how many rows
    write = disk.write

    def record(rows: KVRows) -> tuple[FileId, WrittenFile]:
        written.append((threading.current_thread().name, len(rows)))
        return write(rows)

    monkeypatch.setattr(disk, "write", record)
    session = llm.session("town", PEOPLE, params=ANSWER)
    (first,) = run(session, 1)
    ahead = sum(rows for thread, rows in written if thread.startswith("store"))
    assert ahead >= first.stats.prompt_tokens
    # Each answer but its last token, which has no KV yet.
    num_answer = first.stats.generated_tokens - len(PEOPLE)
    assert sum(rows for _, rows in written) == first.stats.prompt_tokens + num_answer
    llm.close()
    llm = open_llm(roomy, tmp_path / "store")
    parts = [first, *run(llm.session("town", params=ANSWER), 2)]
    assert words(parts) == words(whole)
    assert computed(parts) == computed(whole)
    llm.close()


def test_only_what_is_computed_is_written(roomy: LoadedModel, tmp_path: Path) -> None:
    """Somebody else may be about to compute the words of a session exactly."""
    llm = open_llm(roomy, tmp_path / "store")
    assert llm.tier is not None
    session = llm.session("town", PEOPLE, params=SamplingParams(max_tokens=30, ignore_eos=True))
    run(session, 1)
    after_step, engine = llm.tier.after_step, llm.engine
    unready: list[int] = []

    def interfere(now: float, requests: Collection[Request]) -> None:
        if not unready and all(request.is_decoding for request in requests):
            mirror = next(
                request for request in requests if request.plan is not None and request.plan.uses
            )
            engine._engine.scheduler._max_num_batched_tokens = 12
            other = Request(
                "other", engine.new_round_id(), mirror.prompt, ANSWER, 10, in_round=False
            )
            engine.add([other])
            engine.tick()
            slots = llm.kv_store.match_slots(mirror.prompt.prefix_hashes)
            unready.append(int(np.count_nonzero(~llm.kv_store.slot_ready[slots])))
        after_step(now, requests)

    llm.tier.after_step = interfere  # type: ignore[method-assign]
    run(session, 1)
    while engine.has_work:
        engine.tick()
    assert unready[0] > 0
    readers = llm.tier.disk.index.readers(SessionKey("", "town"))
    for file in readers:
        rows = llm.tier.disk.read(llm.tier.disk.index.file(file))
        slots = llm.tier._levels.files.slots_of(np.array([[file, 0, len(rows)]], np.int64))
        now = llm.executor.read_kv(slots)
        assert np.array_equal(now.keys, rows.keys[:, :, : len(slots)])
    llm.close()


def test_a_store_that_fails_ahead_costs_nothing(
    roomy: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(open_llm(roomy, None).session(agents=PEOPLE, params=ANSWER), 2)
    llm = open_llm(roomy, tmp_path / "store")
    assert llm.tier is not None
    session = llm.session("town", PEOPLE, params=ANSWER)
    parts = run(session, 1)
    file_ids, calls = llm.tier.disk.index.file_ids, itertools.count()

    def fail_first() -> set[FileId]:
        if next(calls) == 0:
            raise StoreError("The index cannot be read.")
        return file_ids()

    monkeypatch.setattr(llm.tier.disk.index, "file_ids", fail_first)
    parts += run(session, 1)
    assert words(parts) == words(whole)
    llm.tier.disk.check_integrity()
    llm.close()


@pytest.mark.parametrize("whose", ["thread", "round"])
def test_what_goes_ahead_may_fail(
    roomy: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    whole = run(open_llm(roomy, None).session(agents=PEOPLE, params=ANSWER), 3)
    llm = open_llm(roomy, tmp_path / "store")
    assert llm.tier is not None
    disk = llm.tier.disk
    session = llm.session("town", PEOPLE, params=ANSWER)
    parts = run(session, 1)
    if whose == "thread":
        write, calls = disk.write, itertools.count()
        submit = llm.tier._levels.threads.writer.submit

        def fail_sometimes(rows: KVRows) -> tuple[FileId, WrittenFile]:
            if next(calls) % 2:
                raise MemoryError("The disk is busy.")
            return write(rows)

        def fail_ahead(work: Any, rows: KVRows) -> Future[Any]:
            is_saving = llm.tier is not None and llm.tier._levels.turn.is_taken
            return submit(work if is_saving else fail_sometimes, rows)

        monkeypatch.setattr(llm.tier._levels.threads.writer, "submit", fail_ahead)
    else:
        steps = itertools.count()

        def interrupt(phase: str, _: int) -> None:
            if phase == "decode" and next(steps) == 6:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            session.run("Speak, the 1th time.", progress=interrupt)
    disk.check_integrity()
    parts += run(session, 2)
    assert words(parts) == words(whole)
    disk.check_integrity()
    llm.engine.check_integrity()
    llm.close()
    with DiskStore(tmp_path / "store", None) as reopened:
        assert reopened.verify() == []


@pytest.mark.usefixtures("quick_disk")
def test_memory_does_not_grow_with_rounds(roomy: LoadedModel, tmp_path: Path) -> None:
    llm = open_llm(roomy, tmp_path / "store", pages=300)
    session = llm.session("town", PEOPLE, params=ANSWER, max_history=2)
    assert llm.tier is not None
    sizes = []
    for _ in range(24):
        run(session, 1)
        sizes.append((len(llm.tier.disk.index.file_ids()), len(llm.tier._levels.files)))
    assert max(sizes[12:]) <= max(sizes[6:12])
    llm.engine.check_integrity()
    llm.close()


def rows_in_need(disk: DiskStore, key: SessionKey) -> dict[FileId, int]:
    """Of each file, how many rows the session refers to."""
    stored = disk.session(key)
    assert stored is not None
    rows: dict[FileId, set[int]] = {}
    for cache in (*stored.caches.values(), *(segment.cache for segment in stored.segments)):
        for file, first, count in cache.extents.tolist():
            rows.setdefault(FileId(file), set()).update(range(first, first + count))
    return {file: len(found) for file, found in rows.items()}


def test_files_most_of_which_is_forgotten_are_written_anew(
    roomy: LoadedModel, tmp_path: Path
) -> None:
    whole = run(open_llm(roomy, None).session(agents=PEOPLE, params=ANSWER, max_history=2), 9)
    llm = open_llm(roomy, tmp_path / "store")
    session = llm.session("town", PEOPLE, params=ANSWER, max_history=2)
    assert llm.tier is not None
    disk, key = llm.tier.disk, SessionKey("", "town")
    written: set[FileId] = set()
    parts = []
    for _ in range(8):
        parts += run(session, 1)
        disk.check_integrity()
        for file, count in rows_in_need(disk, key).items():
            assert 2 * count >= disk.index.file(file).num_rows
        assert not written - disk.index.file_ids() or session.round > 3  # nothing is forgotten yet
        written |= disk.index.file_ids()
    llm.close()
    llm = open_llm(roomy, tmp_path / "store")
    assert llm.tier is not None
    assert llm.tier.disk.verify() == []
    parts += run(llm.session("town", params=ANSWER, max_history=2), 1)
    llm.close()
    assert words(parts) == words(whole)
    assert computed(parts) == computed(whole)


def test_what_memory_has_evicted_stays_on_disk(roomy: LoadedModel, tmp_path: Path) -> None:
    whole = run(open_llm(roomy, None).session(agents=PEOPLE, params=ANSWER), 3)
    llm = open_llm(roomy, tmp_path / "store")
    session = llm.session("town", PEOPLE, params=ANSWER)
    parts = run(session, 2)
    assert llm.tier is not None
    disk, key = llm.tier.disk, SessionKey("", "town")
    before = disk.index.readers(key)
    llm.kv_store.clear()
    session.save()
    assert disk.index.readers(key) == before
    disk.check_integrity()
    parts += run(session, 1)
    assert words(parts) == words(whole)
    assert computed(parts) == computed(whole)
    llm.close()


@pytest.mark.parametrize("share", [0.5, 0.7, 0.85])
def test_what_is_read_again_in_part_has_one_place_on_disk(
    roomy: LoadedModel, tmp_path: Path, share: float
) -> None:
    """Some slots hold a row of the first time, others of the second; the file may go later."""
    llm = open_llm(roomy, tmp_path / "store")
    session = llm.session("town", PEOPLE, params=ANSWER)
    run(session, 4)
    assert llm.tier is not None
    disk, key = llm.tier.disk, SessionKey("", "town")
    before = disk.index.usage(key)
    entries = list(llm.kv_store.order.in_turn())
    for entry in entries[: int(share * len(entries))]:
        llm.kv_store.drop(entry)
    restored = session.restore(always=True)
    assert restored is not None
    assert restored.rows > 0
    session.save()
    assert disk.index.usage(key).stored_rows <= before.stored_rows
    disk.drop_kv(key)
    run(session, 1)
    disk.check_integrity()
    assert disk.verify() == []
    llm.close()


class Towns(RuleBasedStateMachine):
    """Sessions that talk, are evicted, reloaded, dropped and restarted, in any order."""

    model: LoadedModel
    folder: Path
    number = 0

    @initialize()
    def begin(self) -> None:
        Towns.number += 1
        self.path = self.folder / str(Towns.number)
        self.llm = open_llm(self.model, self.path, pages=60, budget="400KiB")
        self.rounds: dict[str, int] = {}
        self.open: dict[str, Session] = {}

    @rule(name=st.sampled_from("ab"), agents=st.integers(1, 3))
    def talk(self, name: str, agents: int) -> None:
        if name not in self.open:
            self.open[name] = self.llm.session(
                name, PEOPLE[:agents], params=SamplingParams(max_tokens=4), max_history=2
            )
        session = self.open[name]
        assert session.round == self.rounds.get(name, 0)
        run(session, 1)
        self.rounds[name] = session.round

    @rule(name=st.sampled_from("ab"))
    @precondition(lambda self: self.rounds)
    def leave(self, name: str) -> None:
        session = self.open.get(name)
        if session is not None and len(session.agents) > 1:
            session.leave(session.agents[0].name)

    @rule(name=st.sampled_from("ab"), step=st.integers(0, 3))
    def interrupt(self, name: str, step: int) -> None:
        """A round ends before it is heard."""
        steps = itertools.count()

        def stop(_: str, __: int) -> None:
            if next(steps) == step:
                raise KeyboardInterrupt

        if name in self.open:
            with suppress(KeyboardInterrupt):
                self.open[name].run("Speak.", SamplingParams(max_tokens=9), stop)
            self.rounds[name] = self.open[name].round

    @rule()
    def evict(self) -> None:
        self.llm.kv_store.clear()

    @rule()
    def restart(self) -> None:
        self.llm.close()
        self.open.clear()
        self.llm = open_llm(self.model, self.path, pages=60, budget="400KiB")

    @rule(name=st.sampled_from("ab"))
    def drop(self, name: str) -> None:
        assert self.llm.tier is not None
        existed = self.llm.tier.disk.remove(SessionKey("", name))
        assert existed == (name in self.rounds)
        self.rounds.pop(name, None)
        self.open.pop(name, None)

    @invariant()
    def books_agree(self) -> None:
        if not hasattr(self, "llm"):
            return
        self.llm.engine.check_integrity()
        assert self.llm.tier is not None
        # An interrupted round may still be making room, or be writing what nobody will name.
        threads = self.llm.tier._levels.threads
        threads.writer.submit(lambda: None).result(60)
        threads.index.submit(self.llm.tier.disk.check_integrity).result(60)
        assert {key.name for key in self.llm.tier.disk.index.session_keys()} == set(self.rounds)

    def teardown(self) -> None:
        if hasattr(self, "llm"):
            self.llm.close()


@pytest.fixture
def towns(roomy: LoadedModel, tmp_path: Path) -> type[Towns]:
    Towns.model, Towns.folder = roomy, tmp_path
    return Towns


def test_any_order_of_events_keeps_the_books(towns: type[Towns]) -> None:
    run_state_machine_as_test(
        towns, settings=settings(max_examples=examples(10), stateful_step_count=12)
    )
