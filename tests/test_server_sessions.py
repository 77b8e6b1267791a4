"""Sessions that the server keeps, without a model: how they are loaded, saved and forgotten."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tokendance.disk.records import SessionKey
from tokendance.errors import AbortedError, StoreError, TokenDanceError
from tokendance.llm import LLM
from tokendance.models.encoder import PromptEncoder
from tokendance.rounds.segments import Salt
from tokendance.server import sessions
from tokendance.server.engine_thread import EngineThread
from tokendance.server.errors import ApiError
from tokendance.server.kept_chats import KeptChat
from tokendance.server.loading import Loader, Saved
from tokendance.server.protocol import RoundRequest
from tokendance.server.sessions import Sessions
from tokendance.session import Session
from tokendance.tier.caches import SessionSnapshot
from tokendance.tier.loader import Restored
from tokendance.tier.steps import Steps, finish

SALT = Salt(b"")


class FakeDurable:
    """A session of some files, each of which is there when its future is done."""

    def __init__(self, name: str, num_files: int = 0, error: Exception | None = None) -> None:
        self.key = SessionKey("", name)
        self.files = [Future[Any]() for _ in range(num_files)]
        self.commits: list[Future[Any]] = []
        self.error = error
        self.is_closed = False
        self.is_being_written = False
        self.num_saved = 0

    def restoring(self) -> Steps[Restored | None]:
        try:
            yield from self.files
            if self.error is not None:
                raise self.error
        finally:
            self.is_closed = True
        return Restored(0, 0, 0, ())

    def go_on_writing(self) -> bool:
        return self.is_being_written

    def saving(self) -> Steps[None]:
        yield from self.commits
        if self.error is not None:
            raise self.error
        self.num_saved += 1


def test_a_session_is_loaded_file_by_file() -> None:
    loader, session, ends = Loader(), FakeDurable("a", 2), list[TokenDanceError | None]()
    loader.begin(session, ends.append)
    loader.begin(session, ends.append)  # waits with the first
    assert session in loader
    assert loader.pause_s == 0
    loader.go_on()
    assert loader.pause_s > 0  # all wait for the disk
    loader.go_on()
    session.files[0].set_result(None)
    assert loader.pause_s == 0
    loader.go_on()
    loader.go_on()
    assert ends == []
    session.files[1].set_result(None)
    loader.go_on()
    assert ends == [None, None]
    assert not loader
    assert session.is_closed


def test_where_nothing_is_stored_nothing_is_loaded() -> None:
    loader, ends = Loader(), list[TokenDanceError | None]()
    loader.begin(FakeDurable("a"), ends.append)
    loader.go_on()
    assert ends == [None]
    assert not loader


@pytest.mark.parametrize("error", [StoreError("The file is gone."), MemoryError()])
def test_an_error_of_one_session_is_none_of_the_others(error: Exception) -> None:
    loader = Loader()
    ends: dict[str, list[TokenDanceError | None]] = {"a": [], "b": []}
    for session in (FakeDurable("a", 1, error), FakeDurable("b", 1)):
        session.files[0].set_result(None)
        loader.begin(session, ends[session.key.name].append)
    loader.go_on()
    loader.go_on()
    assert ends["b"] == [None]
    (told,) = ends["a"]
    assert isinstance(told, StoreError)
    assert (told is error) == isinstance(error, StoreError)
    failed, saved = Saved(), Saved()
    loader.save(FakeDurable("a", error=error), failed)
    loader.save(FakeDurable("b"), saved)
    loader.go_on()
    loader.go_on()
    found = failed.result(0)
    assert isinstance(found, StoreError)
    assert "stored" in str(found) or found is error
    assert saved.result(0) is None


def test_who_waits_is_told_when_the_server_stops() -> None:
    loader, session, ends = Loader(), FakeDurable("a", 1), list[TokenDanceError | None]()
    loader.begin(session, ends.append)
    loader.go_on()
    loader.stop()
    assert isinstance(ends[0], AbortedError)
    assert session.is_closed
    assert not loader


def test_who_is_being_written_is_saved_later_and_at_the_end_at_once() -> None:
    loader, slow, quick = Loader(), FakeDurable("slow"), FakeDurable("quick")
    slow.is_being_written = True
    for session in (slow, quick):
        loader.save(session)
    assert loader.pause_s > 0
    loader.go_on()
    assert (slow.num_saved, quick.num_saved) == (0, 1)
    loader.go_on()
    assert slow.num_saved == 0
    slow.is_being_written = False
    loader.go_on()
    assert slow.num_saved == 1
    assert not loader
    slow.is_being_written = True
    loader.save(slow)
    loader.stop()
    assert slow.num_saved == 2
    assert not loader


def test_the_engine_goes_on_while_a_session_is_named_in_the_index() -> None:
    loader, session, behind = Loader(), FakeDurable("a"), FakeDurable("b")
    session.commits.append(Future())
    saved = Saved()
    loader.save(session, saved)
    loader.save(behind)
    loader.go_on()
    loader.go_on()
    assert loader.pause_s > 0
    assert not saved.done()
    assert behind.num_saved == 0  # one after the other
    session.commits[0].set_result(None)
    assert loader.pause_s == 0
    loader.go_on()
    loader.go_on()
    assert saved.result(0) is None
    assert (session.num_saved, behind.num_saved) == (1, 1)
    assert not loader


def test_what_is_being_saved_when_the_server_stops_is_saved() -> None:
    loader, session, gone = Loader(), FakeDurable("a"), FakeDurable("b")
    session.commits.append(Future())
    saved, cancelled = Saved(), Saved()
    loader.save(session, saved)
    loader.save(gone, cancelled)
    loader.go_on()
    cancelled.cancel()
    session.commits[0].set_result(None)
    loader.stop()
    assert saved.result(0) is None
    assert gone.num_saved == 0
    assert not loader


def test_steps_of_sessions_take_little_time_between_passes() -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 0.004
        return now

    loader, session, ends = Loader(clock), FakeDurable("a", 9), list[TokenDanceError | None]()
    for file in session.files:
        file.set_result(None)
    loader.begin(session, ends.append)
    for _ in range(3):
        loader.go_on()
        assert ends == []
    loader.go_on()
    assert ends == [None]


class FakeWorker:
    """Does at once what the engine's thread would do."""

    def __init__(self) -> None:
        self.is_closed = False

    async def call(self, work: Callable[[], Any]) -> Any:
        if self.is_closed:
            raise ApiError(503, "The engine has stopped.")
        return work()

    async def save(self, session: Session) -> TokenDanceError | None:
        loader, saved = Loader(), Saved()
        await self.call(lambda: loader.save(session, saved))
        while loader:
            loader.go_on()
        return saved.result(0)


class FakeTier:
    """A store in which nothing is found; it counts what is saved."""

    def __init__(self) -> None:
        self.saved: list[str] = []
        self.is_closed = False
        self.disk = SimpleNamespace(session=lambda _: None)

    def job(self, work: Callable[[], Any]) -> Steps[Any]:
        yield from ()
        return work()

    def saving(self, snapshot: SessionSnapshot, _: object = None) -> Steps[None]:
        yield from ()
        self.saved.append(snapshot.key.name)


class FakeEncoder:
    salt = SALT


@pytest.fixture
def tier() -> FakeTier:
    return FakeTier()


@pytest.fixture
def worker() -> FakeWorker:
    return FakeWorker()


@pytest.fixture
def opened(tier: FakeTier, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch) -> Sessions:
    monkeypatch.setattr(sessions, "_MAX_SESSIONS", 3)
    model = SimpleNamespace(shape=SimpleNamespace(max_context=100))
    llm = SimpleNamespace(tier=tier, model=model, run_round=None)
    return Sessions(cast(LLM, llm), cast(EngineThread, worker))


def body(session: str) -> RoundRequest:
    agents = [{"agent": "ann", "system": "I am Ann.", "task": "Speak."}]
    return RoundRequest.model_validate({"model": "", "session": session, "agents": agents})


async def play(opened: Sessions, name: str, tenant: str = "") -> Session:
    encoder = cast(PromptEncoder, FakeEncoder())
    async with opened.round_of(body(name), tenant, encoder) as session:
        session._conversation.round += 1  # as if it had been heard
        return session


def chat(opened: Sessions, name: str, tenant: str = "") -> KeptChat | None:
    return opened.chat(tenant, SessionKey(f"chat/{tenant}", name), SALT)


def test_a_tenants_sessions_have_one_bound_whatever_their_kind(opened: Sessions) -> None:
    first, town = chat(opened, "first"), asyncio.run(play(opened, "town"))
    other = chat(opened, "first", tenant="other")
    assert chat(opened, "first") is first  # and is the last to be forgotten now
    for name in ("second", "third"):
        chat(opened, name)
    assert chat(opened, "first") is first
    assert asyncio.run(play(opened, "town")) is not town
    assert chat(opened, "second") is not None
    assert chat(opened, "first", tenant="other") is other


def test_a_session_has_one_round_at_a_time_and_is_not_forgotten_meanwhile(
    opened: Sessions,
) -> None:
    async def meanwhile() -> None:
        encoder = cast(PromptEncoder, FakeEncoder())
        async with opened.round_of(body("town"), "", encoder) as session:
            for number in range(5):
                chat(opened, str(number))
            with pytest.raises(ApiError) as refused:
                await play(opened, "town")
            assert refused.value.status == 409
            session._conversation.round += 1
        assert await play(opened, "town") is session

    asyncio.run(meanwhile())


def test_what_has_not_begun_is_not_remembered(opened: Sessions) -> None:
    async def leave() -> Session:
        async with opened.round_of(body("town"), "", cast(PromptEncoder, FakeEncoder())) as found:
            assert [agent.name for agent in found.agents] == ["ann"]
            return found

    first = asyncio.run(leave())
    assert first.agents == ()
    assert not opened._open[""]


def test_both_kinds_are_saved_in_one_way(
    opened: Sessions, tier: FakeTier, worker: FakeWorker
) -> None:
    session = asyncio.run(play(opened, "town"))
    assert asyncio.run(opened.save(session)) is None
    kept = chat(opened, "talk")
    assert kept is not None
    finish(kept.saving())
    assert tier.saved == ["town", "talk"]
    worker.is_closed = True
    assert "has stopped" in str(asyncio.run(opened.save(session)))


def test_without_a_store_no_chat_is_kept(opened: Sessions) -> None:
    opened._llm.tier = None
    assert chat(opened, "talk") is None
    assert not opened._open[""]
