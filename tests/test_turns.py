"""Many callers of one LLM: threads, coroutines, forked processes, and sessions of one name."""

import asyncio
import gc
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from fake_executor import FakeExecutor
from serving import chat, serving
from tiny_models import SPECIALS, VOCAB, said
from tokendance import (
    LLM,
    Agent,
    Prompt,
    RoundError,
    SamplingParams,
    Session,
    StoreError,
    UsageError,
    private,
    shared,
)
from tokendance.conversation import Conversation
from tokendance.disk.records import SessionKey
from tokendance.disk.store import DiskStore
from tokendance.executor.step import StepInput, StepOutput
from tokendance.models.loader import LoadedModel
from tokendance.server.app import create_app
from tokendance.server.errors import ApiError
from tokendance.server.settings import ServerSettings
from tokendance.turns import Turns

MakeLLM = Callable[..., LLM]
ANSWER = SamplingParams(max_tokens=6, ignore_eos=True)
PEOPLE = [Agent(name, f"I am {name}.") for name in ("Ann", "Bo")]
ROUND = [Prompt([private([5 + n]), shared([9] * 20), private([7])]) for n in range(3)]
ANSWERS = [tuple(said([5 + n, *[9] * 20, 7], 6)) for n in range(3)]


class Gate(FakeExecutor):
    """An executor whose steps wait while it is closed."""

    def __init__(self) -> None:
        super().__init__(400 * 16, VOCAB, SPECIALS)
        self.is_open, self.is_reached = threading.Event(), threading.Event()
        self.is_open.set()

    def execute(self, step: StepInput) -> StepOutput:
        self.is_reached.set()
        assert self.is_open.wait(60)
        return super().execute(step)

    def close(self) -> None:
        self.is_reached.clear()
        self.is_open.clear()


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def llm(tiny: LoadedModel, make_llm: MakeLLM, gate: Gate) -> LLM:
    """An engine that runs no model; it may have a store."""
    return make_llm(model=tiny, executor=gate)


@pytest.fixture
def stored(llm: LLM, tmp_path: Path) -> Iterator[LLM]:
    llm.open_store(tmp_path / "store")
    yield llm
    llm.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


class Waiting(threading.Condition):
    """Says when somebody has to wait for a turn."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = threading.Semaphore(0)

    def wait(self, timeout: float | None = None) -> bool:
        self.begun.release()
        return super().wait(timeout)


def watch(turns: Turns) -> Waiting:
    turns._changed = waiting = Waiting()
    return waiting


def words(llm: LLM) -> list[tuple[int, ...]]:
    result = llm.run_round(ROUND, ANSWER)
    result.raise_for_errors()
    return [output.token_ids for output in result.outputs]


# -- threads ----------------------------------------------------------------------------------


def test_threads_are_served_one_after_the_other(stored: LLM, pool: ThreadPoolExecutor) -> None:
    llm, begin = stored, threading.Barrier(8)

    def hammer(number: int) -> None:
        session = llm.session(f"town {number % 4}", params=ANSWER)
        begin.wait(60)
        for turn in range(5):
            assert words(llm) == ANSWERS
            (output,) = llm.generate([[number + 3, turn + 3]], ANSWER)
            assert output.token_ids == tuple(said([number + 3, turn + 3], 6))
            name = f"{number} {turn}"
            session.join(Agent(name, "I."))
            assert name in [one.agent for one in session.run("Speak.").outputs]
            session.leave(name)

    for done in [pool.submit(hammer, number) for number in range(8)]:
        done.result(120)
    llm.engine.check_integrity()
    assert [llm.session(f"town {number}").round for number in range(4)] == [10] * 4


def test_turns_come_in_order(pool: ThreadPoolExecutor) -> None:
    turns, served = Turns(), list[int]()
    waiting = watch(turns)

    def call(number: int) -> None:
        with turns.take():
            served.append(number)

    with turns.take(), turns.take():  # whoever has the turn need not wait for it
        calls = []
        for number in range(5):
            calls.append(pool.submit(call, number))
            assert waiting.begun.acquire(timeout=60)
        assert served == []
    for done in calls:
        done.result(60)
    assert served == [0, 1, 2, 3, 4]


def test_who_is_interrupted_while_waiting_holds_up_nobody(pool: ThreadPoolExecutor) -> None:
    turns = Turns()

    class Interrupted(threading.Condition):
        def wait(self, timeout: float | None = None) -> bool:
            raise KeyboardInterrupt(timeout)

    turns._changed = Interrupted()

    def call() -> None:
        with turns.take():
            raise AssertionError

    with turns.take(), pytest.raises(KeyboardInterrupt):
        pool.submit(call).result(60)
    with turns.take():
        pass


def test_a_callback_cannot_call_its_own_llm(stored: LLM) -> None:
    session = stored.session("town", PEOPLE, params=ANSWER)
    calls: list[Callable[[], object]] = [
        lambda: stored.generate("x"),
        lambda: stored.run_round(ROUND),
        lambda: session.run("x"),
        lambda: session.leave("Ann"),
        lambda: stored.session("town"),
        stored.check_shadow,
        stored.close,
    ]
    for call in calls:
        with pytest.raises(UsageError, match="own progress callback"):
            session.run("Speak.", progress=lambda *_, call=call: call())
        assert not stored.engine.has_work
        stored.engine.check_integrity()
    assert session.round == 0
    assert words(stored) == ANSWERS


def test_who_may_catch_it_goes_on(llm: LLM) -> None:
    refused = []

    def call(phase: str, count: int) -> None:
        with pytest.raises(UsageError):
            llm.generate(f"{phase} {count}")
        refused.append(phase)

    result = llm.run_round(ROUND, ANSWER, call)
    assert [output.token_ids for output in result.outputs] == ANSWERS
    assert refused


def test_what_a_server_runs_is_not_run_by_others(llm: LLM, pool: ThreadPoolExecutor) -> None:
    session = llm.session(agents=PEOPLE, params=ANSWER)
    waiting = watch(llm.turns)
    with serving(llm) as (client, _):
        assert client.get("/health").status_code == 200
        for call in (llm.close, lambda: words(llm), lambda: session.run("x")):
            with pytest.raises(UsageError, match="A server runs this LLM"):
                pool.submit(call).result(60)
    assert waiting.begun._value == 0  # nobody had to wait
    assert words(llm) == ANSWERS
    session.run("x").raise_for_errors()


# -- coroutines -------------------------------------------------------------------------------


def test_coroutines_leave_the_event_loop_free(llm: LLM, gate: Gate) -> None:
    session = llm.session(agents=PEOPLE, params=ANSWER)
    told: list[tuple[int, str]] = []

    def progress(phase: str, _: int) -> None:
        told.append((threading.get_ident(), phase))

    async def main() -> None:
        gate.close()
        rounds = [asyncio.create_task(llm.arun_round(ROUND, ANSWER, progress)) for _ in range(3)]
        others = asyncio.create_task(llm.agenerate([[4, 5]], ANSWER))
        town = asyncio.create_task(session.arun("Speak."))
        await asyncio.to_thread(gate.is_reached.wait, 60)
        assert not any(task.done() for task in (*rounds, others, town))
        gate.is_open.set()  # by a loop that goes on
        for result in await asyncio.gather(*rounds):
            assert [output.token_ids for output in result.outputs] == ANSWERS
        assert (await others)[0].token_ids == tuple(said([4, 5], 6))
        assert len((await town).outputs) == 2
        with pytest.raises(RoundError, match="empty"):
            await llm.arun_round([])

    asyncio.run(main())
    assert session.round == 1
    assert {thread for thread, _ in told} == {threading.get_ident()}
    assert {phase for _, phase in told} == {"prefill", "decode"} or told[-1][1] == "decode"


def test_who_is_cancelled_is_taken_back(stored: LLM, gate: Gate) -> None:
    session = stored.session("town", PEOPLE, params=ANSWER)
    session.run("Speak.")
    num_steps = len(gate.steps)

    async def main() -> None:
        gate.close()
        running = asyncio.create_task(session.arun("Go on."))
        await asyncio.to_thread(gate.is_reached.wait, 60)
        waiting = asyncio.create_task(stored.arun_round(ROUND, ANSWER))
        await asyncio.sleep(0)
        for task in (waiting, running):
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not running.done()  # it is in the middle of a step
        gate.is_open.set()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert not stored.engine.has_work  # when the cancellation is over
        assert len(gate.steps) == num_steps + 1
        result = await stored.arun_round(ROUND, ANSWER)
        assert [output.token_ids for output in result.outputs] == ANSWERS

    asyncio.run(main())
    assert session.round == 1
    stored.engine.check_integrity()
    session.run("Go on.").raise_for_errors()
    assert session.round == 2
    assert stored.tier is not None
    stored.tier.disk.check_integrity()


def test_nobody_complains_of_a_call_that_was_left(llm: LLM, gate: Gate) -> None:
    complaints: list[object] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: complaints.append(context))
        gate.close()
        running = asyncio.create_task(llm.arun_round(ROUND, ANSWER))
        await asyncio.to_thread(gate.is_reached.wait, 60)
        running.cancel()
        await asyncio.sleep(0)
        gate.is_open.set()
        with pytest.raises(asyncio.CancelledError):
            await running
        del running
        gc.collect()

    asyncio.run(main())
    assert not complaints


def test_a_coroutine_that_is_cancelled_need_not_have_its_turn(
    llm: LLM, gate: Gate, pool: ThreadPoolExecutor
) -> None:
    """It waits for a thread's call, whose end its cancellation does not wait for."""
    waiting = watch(llm.turns)
    gate.close()
    under_way = pool.submit(words, llm)
    assert gate.is_reached.wait(60)

    async def main() -> None:
        task = asyncio.create_task(llm.arun_round(ROUND, ANSWER))
        assert await asyncio.to_thread(waiting.begun.acquire, timeout=60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert not under_way.done()
    gate.is_open.set()
    assert under_way.result(60) == ANSWERS
    assert words(llm) == ANSWERS


def test_an_interrupt_ends_a_coroutines_round(llm: LLM) -> None:
    async def main() -> None:
        async def interrupt() -> None:
            raise KeyboardInterrupt

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(llm.arun_round(ROUND, SamplingParams(max_tokens=300)))
            tasks.create_task(interrupt())

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    assert not llm.engine.has_work
    assert words(llm) == ANSWERS


# -- forks ------------------------------------------------------------------------------------


@contextmanager
def forked(work: Callable[[], object]) -> Iterator[None]:
    """Do something in a forked process, which lives until the end of the context.

    It has done it when the context begins; what it raises fails the test.
    """
    (read_end, to_parent), (read_child, to_child) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        reply = b"no"
        try:
            os.close(to_child)
            work()
            reply = b"ok"
        except BaseException as error:
            reply = repr(error).encode()
        finally:
            os.write(to_parent, reply)
            os.read(read_child, 1)
            os._exit(0)
    try:
        os.close(to_parent)
        assert os.read(read_end, 1000) == b"ok"
        yield
    finally:
        os.close(to_child)
        os.waitpid(child, 0)
        os.close(read_end)
        os.close(read_child)


def test_a_forked_process_is_told(
    stored: LLM, gate: Gate, pool: ThreadPoolExecutor, tmp_path: Path
) -> None:
    session = stored.session("town", PEOPLE, params=ANSWER)
    session.run("Speak.")
    calls: list[Callable[[], object]] = [
        lambda: stored.generate("x"),
        lambda: stored.run_round(ROUND),
        lambda: stored.session("town"),
        lambda: session.run("x"),
        lambda: session.join(Agent("Cy", "")),
        session.save,
        session.restore,
        lambda: asyncio.run(stored.arun_round(ROUND)),
        lambda: asyncio.run(session.arun("x")),
        stored.check_shadow,
        stored.close,
    ]

    def be_refused() -> None:
        for call in calls:
            with pytest.raises(UsageError, match="forked"):
                call()

    gate.close()
    under_way = pool.submit(words, stored)  # has the turn when the process is forked
    assert gate.is_reached.wait(60)
    with forked(be_refused):
        gate.is_open.set()
        assert under_way.result(60) == ANSWERS
        session.run("Go on.").raise_for_errors()
        with pytest.raises(StoreError, match="in use"):
            DiskStore(tmp_path / "store", None)  # the lock is still the parent's
        stored.close()
        with DiskStore(tmp_path / "store", None) as store:  # and not the child's
            assert len(store.index.session_keys()) == 1
            store.check_integrity()


def test_a_forked_process_leaves_the_parents_transaction(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "store", {})
    database = store.index._database
    journal = tmp_path / "store" / "index.sqlite-journal"
    database.execute("BEGIN IMMEDIATE")
    database.execute("INSERT INTO meta VALUES ('a', 'b')")
    assert journal.stat().st_size > 0
    opened = [store, database]
    del store, database

    def let_go() -> None:
        opened.clear()
        gc.collect()

    with forked(let_go):
        assert journal.stat().st_size > 0
    opened[1].execute("ROLLBACK")  # type: ignore[attr-defined]
    opened[0].close()  # type: ignore[attr-defined]


def test_a_served_application_is_not_served_where_it_was_forked(llm: LLM) -> None:
    """Whether the engine's thread had started, as by servers that load before they fork."""
    waiting = create_app(llm, ServerSettings()).state.context.engine_thread
    with serving(llm) as (client, server):

        def be_refused() -> None:
            with pytest.raises(UsageError, match="from which this one was forked"):
                waiting.start()
            with pytest.raises(ApiError, match="from which this one was forked") as refused:
                asyncio.run(server.engine_thread.call(lambda: None))
            assert refused.value.status == 503
            assert not server.engine_thread.is_alive

        with forked(be_refused):
            assert chat(client).status_code == 200


# -- sessions of one name ---------------------------------------------------------------------


def test_sessions_of_one_name_are_one(stored: LLM) -> None:
    first = stored.session("town", PEOPLE, params=ANSWER)
    second = stored.session("town", [*PEOPLE, Agent("Cy", "I am Cy.")])
    assert second is first
    assert [agent.name for agent in second.agents] == ["Ann", "Bo", "Cy"]
    first.run("Speak.")
    second.run("Speak.")
    assert first.round == 2
    assert all(len(output.token_ids) == 6 for output in first.run("Speak.").outputs)
    shorter = stored.session("town", params=SamplingParams(max_tokens=2, ignore_eos=True), ttl_s=9)
    assert all(len(output.token_ids) == 2 for output in shorter.run("Speak.").outputs)
    assert first.ttl_s == 9
    assert stored.session("other") is not first
    assert stored.session() is not stored.session()
    with pytest.raises(RoundError, match="'Dan'"):
        stored.session("town", [Agent("Dan", ""), Agent("Dan", "")])
    del first, second, shorter
    gc.collect()
    assert stored.session("town").round == 4  # from disk


def test_without_a_store_nothing_is_shared(llm: LLM) -> None:
    first = llm.session("town", PEOPLE, params=ANSWER)
    first.run("Speak.")
    assert llm.session("town").round == 0


def test_no_words_are_written_over(stored: LLM) -> None:
    """By a session that was opened by other ways, as a server's of the same LLM."""

    def opened() -> Session:
        conversation = Conversation(stored.encoder, 512, params=ANSWER)
        key, tier = SessionKey("", "town"), stored.tier
        session = Session(conversation, stored.run_round, key=key, tier=tier)
        session.load()
        return session

    session = stored.session("town", PEOPLE, params=ANSWER)
    other = opened()
    session.run("Speak.")
    for agent in PEOPLE:
        other.join(agent)
    with pytest.raises(StoreError, match="Somebody else has gone on with the session 'town'"):
        other.run("Speak.")
    later = opened()
    later.run("Speak.").raise_for_errors()
    with pytest.raises(StoreError, match="2 of its rounds are stored, and only 1"):
        session.run("Speak.")


def test_what_is_closed_is_not_called_damaged(stored: LLM, tmp_path: Path) -> None:
    session = stored.session("town", PEOPLE, params=ANSWER)
    session.run("Speak.")
    stored.close()
    with pytest.raises(StoreError, match="is closed"):
        session.run("Speak.")
    with pytest.raises(StoreError, match="is closed"):  # a new one would last nowhere
        stored.session("town")
    assert session.round == 1
    stored.open_store(tmp_path / "store")
    again = stored.session("town", params=ANSWER)
    assert again is not session
    again.run("Speak.").raise_for_errors()
    with pytest.raises(StoreError, match="is closed"):
        session.run("Speak.")
