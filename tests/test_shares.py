"""The time of the event loop's thread is divided among those who ask."""

import asyncio
import gc
import json
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import SimpleNamespace

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import HELLO, chat, serving, wait_until
from test_connections import answer_on, connected, counted
from tokendance import LLM
from tokendance.errors import ConfigError
from tokendance.server.connection import Connection
from tokendance.server.connections import Phase
from tokendance.server.context import ServerContext
from tokendance.server.settings import ServerSettings
from tokendance.server.shares import Account, Shares, drain

MakeLLM = Callable[..., LLM]

_POST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer %s\r\n"
    b"content-type: application/json\r\ncontent-length: %d\r\n\r\n"
)
_BODY = json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": 1}).encode()
_ASK = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer %s\r\n\r\n"


@given(
    st.lists(st.floats(0, 10), max_size=8),
    st.floats(0, 20),
)
def test_what_drains_is_divided_evenly(taken: list[float], seconds: float) -> None:
    """Max-min fairness: all drains that can, and who is not empty has given as much as anybody."""
    accounts = [Account(taken_s=one) for one in taken]
    drain(accounts, seconds)
    given_up = [one - account.taken_s for one, account in zip(taken, accounts, strict=True)]
    assert sum(given_up) == pytest.approx(min(seconds, sum(taken)))
    for one, account in zip(given_up, accounts, strict=True):
        assert one >= 0
        assert account.taken_s >= 0
        if account.taken_s > 1e-9:
            assert one == pytest.approx(max(given_up))


class Clocks:
    """A loop's time and its thread's, which pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = self.computed_s = 0.0

    def compute(self, seconds: float) -> None:
        """The thread is busy."""
        self.now_s += seconds
        self.computed_s += seconds


def shares_of(clocks: Clocks, share: float, *answered: str) -> Shares:
    return Shares(share, lambda: answered, lambda: clocks.now_s, lambda: clocks.computed_s)


@pytest.mark.parametrize(
    ("answered", "waits"),
    [
        (["two"], True),
        (["one", "two"], True),
        (["one"], False),  # nobody else is answered
        ([], False),
    ],
)
def test_who_has_taken_more_than_its_part_is_held_back(answered: list[str], *, waits: bool) -> None:
    async def come() -> None:
        clocks = Clocks()
        shares = shares_of(clocks, 0.1, *answered)
        one, two = shares.account("one"), shares.account("two")
        for _ in range(100):  # requests of 5 ms, without a pause
            held = shares.hold(one)
            if held is not None:
                shares.release(one, held)
                assert held.done()
                break
            clocks.compute(0.005)
            shares.charge(one, 0.005)
        assert (held is not None) is waits
        assert not one.held
        assert shares.hold(two) is None

    asyncio.run(come())


def test_who_has_been_alone_owes_nothing_to_who_comes() -> None:
    async def come() -> None:
        clocks = Clocks()
        answered = ["one"]
        shares = Shares(0.1, lambda: answered, lambda: clocks.now_s, lambda: clocks.computed_s)
        one = shares.account("one")
        for _ in range(100):
            assert shares.hold(one) is None
            clocks.compute(0.005)
            shares.charge(one, 0.005)
        answered.append("two")
        assert shares.hold(one) is None
        # That the other has gone a moment ago is enough to be let in, but not to be forgiven.
        shares.charge(one, 0.4)
        assert shares.hold(one) is not None
        shares.release(one, next(iter(one.held)))
        answered.remove("two")
        clocks.now_s += 0.01
        assert shares.hold(one) is None
        assert one.taken_s > 0.3
        answered.append("two")
        # Those who are refused are held back, too, and hold back nobody.
        answered.remove("two")
        clocks.now_s += 6
        wrong = shares.account("")
        shares.hold(wrong)
        shares.charge(wrong, 0.4)
        clocks.now_s += 0.1
        held = shares.hold(wrong)
        assert held is not None
        shares.release(wrong, held)
        shares.charge(one, 0.4)
        assert shares.hold(one) is None

    asyncio.run(come())


def test_all_have_their_part_and_who_takes_little_is_never_held_back() -> None:
    """Two who ask without end get half of the share each."""
    clocks = Clocks()
    begun = {"one": 0, "two": 0}
    waited: list[bool] = []
    cost_s, share = 0.01, 0.2
    shares = shares_of(clocks, share, "one", "two", "little")

    async def flood(name: str) -> None:
        account = shares.account(name)
        while True:
            held = shares.hold(account)
            if held is not None:
                await held
            clocks.compute(cost_s)
            shares.charge(account, cost_s)
            begun[name] += 1
            await asyncio.sleep(0)

    async def run() -> None:
        # Timers of the loop go by the same clock, which goes on when nothing else does.
        asyncio.get_running_loop().time = lambda: clocks.now_s  # type: ignore[method-assign]
        floods = [asyncio.create_task(flood(name)) for name in begun for _ in range(4)]
        little, last_s = shares.account("little"), 0.0
        while clocks.now_s < 60:
            clocks.now_s += 0.001
            if clocks.now_s - last_s > 1:
                last_s = clocks.now_s
                waited.append(shares.hold(little) is not None)
                shares.charge(little, cost_s)
            await asyncio.sleep(0)
        for task in floods:
            task.cancel()

    asyncio.run(run())
    total_s = sum(begun.values()) * cost_s
    # The bursts at the beginning are on top, and what is measured too late.
    assert 0.15 * 60 < total_s < share * 60 + 1.5
    assert begun["one"] == pytest.approx(begun["two"], rel=0.1)
    assert len(waited) > 20
    assert not any(waited)


def test_what_is_long_past_is_forgiven() -> None:
    shares = shares_of(Clocks(), 0.1)
    account = shares.account("one")
    shares.charge(account, 1000.0)
    assert account.taken_s == 1.0


# -- the steps of a request -------------------------------------------------------------------


async def as_task(work: Awaitable[None]) -> None:
    await work


def test_each_step_is_counted_until_the_answer_begins() -> None:
    clocks = Clocks()
    shares = shares_of(clocks, 0.1)
    account = shares.account("one")
    cycle = SimpleNamespace(begun=False)
    seen: list[object] = []

    async def work() -> None:
        clocks.compute(0.01)
        await asyncio.sleep(0)
        clocks.compute(0.02)
        with pytest.raises(KeyError):
            await failing()
        seen.append(await giving())
        cycle.begun = True
        await asyncio.sleep(0)
        clocks.compute(0.04)

    async def giving() -> str:
        await asyncio.sleep(0)
        return "given"

    async def failing() -> None:
        await asyncio.sleep(0)
        raise KeyError

    asyncio.run(as_task(shares.metered(account, work(), lambda: cycle.begun)))
    assert account.taken_s == pytest.approx(0.03)
    assert seen == ["given"]


def test_errors_and_cancellation_are_the_works_own() -> None:
    """And a cancelled request leaves no garbage."""
    shares = shares_of(Clocks(), 0.1)
    account = shares.account("one")
    ended: list[str] = []
    alive: list[weakref.ref[Clocks]] = []

    async def failing() -> None:
        await asyncio.sleep(0)
        raise ValueError("its own")

    async def endless() -> None:
        local = Clocks()
        alive.append(weakref.ref(local))
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        finally:
            ended.append("ended")

    async def run() -> None:
        with pytest.raises(ValueError, match="its own"):
            await shares.metered(account, failing(), lambda: False)
        task = asyncio.create_task(as_task(shares.metered(account, endless(), lambda: False)))
        await asyncio.sleep(0)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        del task
        await asyncio.sleep(0)
        assert alive[0]() is None

    gc.collect()
    gc.disable()
    try:
        asyncio.run(run())
    finally:
        gc.enable()
    assert ended == ["cancelled", "ended"]


# -- a server ---------------------------------------------------------------------------------


@contextmanager
def two_keys(
    make_fake_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[httpx.Client, ServerContext]]:
    """A server of two keys, of which `two` is the client's, and somebody is answered for long."""
    monkeypatch.setattr("tokendance.server.shares._MOST_S", 1e9)
    with (
        serving(make_fake_llm(), api_keys=("one", "two"), idle_timeout=60.0) as (client, server),
        server.admission.admitted("somebody"),
    ):
        client.headers["authorization"] = "Bearer two"
        yield client, server


def take_much(server: ServerContext, *tenants: str) -> None:
    """Charge tenants so much that they are held back for ever."""
    shares = server.connections.shares
    for tenant in tenants:
        shares.charge(shares.account(tenant), 1e9)


@contextmanager
def one_held_back(
    make_fake_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[httpx.Client, ServerContext]]:
    """The same, where the key `one` and who has none have taken much."""
    with two_keys(make_fake_llm, monkeypatch) as (client, server):
        assert chat(client).status_code == 200
        take_much(server, tenant_of(server, b"one"), "")
        yield client, server


def tenant_of(server: ServerContext, key: bytes) -> str:
    return server.keys.authenticate({"path": "/v1", "headers": [(b"authorization", key)]})


def open_ones(server: ServerContext) -> Iterator[Connection]:
    return iter(tuple(server.connections._open))


def num_held(server: ServerContext) -> int:
    """How many connections are held back."""
    return sum(one.phase is Phase.HELD for one in open_ones(server))


def is_held(server: ServerContext, number: int) -> bool:
    return num_held(server) == number


def test_one_key_is_held_back_and_the_other_is_not(
    make_fake_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        one_held_back(make_fake_llm, monkeypatch) as (client, server),
        connected(client) as slow,
        connected(client) as wrong,
    ):
        slow.sendall(_ASK % b"one")
        wrong.sendall(_ASK % b"wrong")
        wait_until(server, partial(is_held, server, 2))
        assert chat(client).status_code == 200
        # Whether the server is well is told at once, also to those without a key.
        assert httpx.get(client.base_url.join("/health")).status_code == 200
        assert num_held(server) == 2
        for one in (slow, wrong):
            one.settimeout(0.01)
            with pytest.raises(TimeoutError):
                one.recv(1)
            one.settimeout(60)
        server.connections.shares._share = 1e12  # all drains when the loop looks again
        assert answer_on(slow)[0] == 200
        assert answer_on(wrong)[0] == 401
        assert counted(server, "held_back_seconds_count") == 2


def test_what_a_body_holds_is_held_back_too(
    make_fake_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a request that had begun before its key had taken so much."""
    with two_keys(make_fake_llm, monkeypatch) as (client, server), connected(client) as late:
        late.sendall(_POST % (b"one", len(_BODY)))
        wait_until(server, lambda: any(one.phase is Phase.BODY for one in open_ones(server)))
        take_much(server, tenant_of(server, b"one"))
        late.sendall(_BODY)
        wait_until(server, partial(is_held, server, 1))
        server.connections.shares._share = 1e12
        assert answer_on(late)[0] == 200


def test_little_is_read_of_who_is_held_back(
    make_fake_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = _BODY.rjust(4_000_000)
    with one_held_back(make_fake_llm, monkeypatch) as (client, server), connected(client) as slow:
        slow.sendall(_POST % (b"one", len(body)))
        wait_until(server, partial(is_held, server, 1))
        sender = threading.Thread(target=slow.sendall, args=[body])
        sender.start()
        (held,) = [one for one in open_ones(server) if one.phase is Phase.HELD]
        wait_until(server, lambda: held.flow.read_paused)
        assert 2**12 < len(held.cycle.body) <= 2**12 + 2**14
        server.connections.shares._share = 1e12
        assert answer_on(slow)[0] == 200
        sender.join(60)


def test_who_goes_away_is_held_back_no_more(
    make_fake_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    with one_held_back(make_fake_llm, monkeypatch) as (client, server):
        accounts = server.connections.shares._accounts.values()
        with connected(client) as first, connected(client) as second:
            for one in (first, second):
                one.sendall(_ASK % b"one")
            wait_until(server, partial(is_held, server, 2))
        wait_until(server, lambda: not any(one.held for one in accounts))
        assert num_held(server) == 0
        assert chat(client).status_code == 200


def test_who_has_to_make_room_is_told(
    make_fake_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        one_held_back(make_fake_llm, monkeypatch) as (client, server),
        connected(client) as slow,
        connected(client) as next_one,
    ):
        for one in (slow, next_one):
            one.sendall(_ASK % b"one")
        wait_until(server, partial(is_held, server, 2))
        server.connections.most = 3
        client.close()
        wait_until(server, lambda: len(server.connections._open) == 2)
        with connected(client) as third:
            third.sendall(_ASK % b"one")
            wait_until(server, partial(is_held, server, 3))
            with connected(client) as fourth:
                fourth.sendall(_ASK % b"one")
                status, body = answer_on(slow)
                assert status == 503
                assert b"--max-connections" in body
                wait_until(server, partial(is_held, server, 3))


def test_a_server_answers_who_is_held_back_before_it_stops(
    make_fake_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When others are gone, nothing is held back any more."""
    monkeypatch.setattr("tokendance.server.shares._PRESENT_S", 0.5)
    with ExitStack() as stack:
        with one_held_back(make_fake_llm, monkeypatch) as (client, server):
            held = stack.enter_context(connected(client))
            held.sendall(_ASK % b"one")
            wait_until(server, partial(is_held, server, 1))
        assert answer_on(held)[0] == 200


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_is_a_share(share: float) -> None:
    with pytest.raises(ConfigError, match="http_share"):
        ServerSettings(http_share=share)
