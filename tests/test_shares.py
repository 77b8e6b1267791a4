"""The time of the event loop's thread is divided among those who ask."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import chat, serving, wait_until
from test_connections import HALF_HEAD, answer_on, closed, connected, counted, crowd
from tokendance import LLM
from tokendance.errors import ConfigError
from tokendance.server.connections import Phase, Reason
from tokendance.server.context import ServerContext
from tokendance.server.settings import ServerSettings
from tokendance.server.shares import Account, Shares, drain

MakeLLM = Callable[..., LLM]

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


def shares_of(clocks: Clocks, share: float, *, is_busy: bool = True) -> Shares:
    return Shares(share, lambda: is_busy, lambda: clocks.now_s, lambda: clocks.computed_s)


@pytest.mark.parametrize(
    ("names", "is_busy", "waits"),
    [
        (["one", "two"], True, True),
        (["one"], True, False),  # nobody else asks
        (["one", "two"], False, False),  # there is nothing to slow down
    ],
)
def test_who_has_taken_most_waits(names: list[str], *, is_busy: bool, waits: bool) -> None:
    async def come() -> None:
        clocks = Clocks()
        shares = shares_of(clocks, 0.1, is_busy=is_busy)
        for name in names[1:]:
            shares.account(name)
        for _ in range(100):  # requests of 5 ms, without a pause
            account = shares.account("one")
            if shares.turn(account) is not None:
                break
            clocks.compute(0.005)
            shares.charge(account, 0.005)
        assert bool(account.waiting) is waits
        for name in names[1:]:
            assert shares.turn(shares.account(name)) is None
        for account in shares._accounts.values():
            for turn in tuple(account.waiting):
                shares.leave(account, turn)

    asyncio.run(come())


def test_it_gets_its_share_and_others_theirs_at_once() -> None:
    """Two who ask without end get half of the share each; who asks little never waits."""
    clocks = Clocks()
    answered = {"one": 0, "two": 0}
    waited: list[bool] = []
    cost_s, share = 0.01, 0.2

    async def ask(shares: Shares, name: str) -> None:
        account = shares.account(name)
        turn = shares.turn(account)
        if turn is not None:
            await turn
        clocks.compute(cost_s)
        shares.charge(account, cost_s)
        answered[name] = answered.get(name, 0) + 1

    async def flood(shares: Shares, name: str) -> None:
        while clocks.now_s < 60:
            await ask(shares, name)
            await asyncio.sleep(0)

    async def little(shares: Shares) -> None:
        last = 0.0
        while clocks.now_s < 60:
            if clocks.now_s - last > 1:
                last = clocks.now_s
                waited.append(shares.turn(shares.account("little")) is not None)
                shares.charge(shares.account("little"), cost_s)
            await asyncio.sleep(0)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        # Timers of the loop go by the same clock, which goes on when nothing else does.
        loop.time = lambda: clocks.now_s  # type: ignore[method-assign]
        shares = shares_of(clocks, share)

        async def idle() -> None:
            while clocks.now_s < 61:
                clocks.now_s += 0.001
                await asyncio.sleep(0)

        floods = [flood(shares, name) for name in ("one", "two") for _ in range(4)]
        await asyncio.gather(idle(), little(shares), *floods)

    asyncio.run(asyncio.wait_for(run(), 100))
    total_s = sum(answered.values()) * cost_s
    # The bursts at the beginning are on top, and what is measured too late.
    assert 0.15 * 60 < total_s < share * 60 + 1.5
    assert answered["one"] == pytest.approx(answered["two"], rel=0.1)
    assert len(waited) > 20
    assert not any(waited)


def test_who_asks_no_more_is_forgotten() -> None:
    clocks = Clocks()
    shares = shares_of(clocks, 0.1)
    shares.charge(shares.account("one"), 0.2)
    shares.account("two")
    clocks.now_s = 1.0
    shares.account("one")
    assert set(shares._accounts) == {"one", "two"}
    clocks.now_s = 10.5
    shares.account("one")
    assert set(shares._accounts) == {"one"}


def test_what_is_long_past_is_forgiven() -> None:
    shares = shares_of(Clocks(), 0.1)
    account = shares.account("one")
    shares.charge(account, 1000.0)
    assert account.taken_s == 0.5


# -- the steps of a request -------------------------------------------------------------------


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
    assert account.num_open == 0
    assert seen == ["given"]


async def as_task(work: object) -> None:
    await work  # type: ignore[misc]


def test_errors_and_cancellation_are_the_works_own() -> None:
    shares = shares_of(Clocks(), 0.1)
    account = shares.account("one")
    ended: list[str] = []

    async def failing() -> None:
        await asyncio.sleep(0)
        raise ValueError("its own")

    async def endless() -> None:
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
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert ended == ["cancelled", "ended"]
    assert account.num_open == 0


# -- a server ---------------------------------------------------------------------------------


@contextmanager
def short_of_time(
    make_fake_llm: MakeLLM, **settings: object
) -> Iterator[tuple[httpx.Client, ServerContext]]:
    """A server on which the key `one` has taken so much that it waits for long, and `two` asks."""
    fields = {"api_keys": ("one", "two"), "http_share": 0.01, "idle_timeout": 60.0, **settings}
    with serving(make_fake_llm(), **fields) as (client, server):
        client.headers["authorization"] = "Bearer two"
        shares = server.connections.shares
        with server.admission.admitted("somebody, who is answered for long"):
            assert chat(client).status_code == 200
            one = server.keys.authenticate({"path": "/v1", "headers": [(b"authorization", b"one")]})
            shares.charge(shares.account(one), 1000.0)
            yield client, server


def in_turn(server: ServerContext) -> int:
    """How many connections wait for their turn."""
    return sum(one.phase is Phase.TURN for one in tuple(server.connections._open))


def is_in_turn(server: ServerContext, number: int) -> bool:
    return in_turn(server) == number


def test_one_key_waits_and_the_other_does_not(make_fake_llm: MakeLLM) -> None:
    with short_of_time(make_fake_llm) as (client, server), connected(client) as slow:
        slow.sendall(_ASK % b"one")
        wait_until(server, lambda: in_turn(server) == 1)
        assert chat(client).status_code == 200
        wrong = client.get("/v1/models", headers={"authorization": "Bearer wrong"})
        assert wrong.status_code == 401
        assert in_turn(server) == 1
        slow.settimeout(0.01)
        with pytest.raises(TimeoutError):
            slow.recv(1)
        slow.settimeout(60)
        for account in server.connections.shares._accounts.values():
            account.taken_s = 0.0
        assert answer_on(slow)[0] == 200
        assert counted(server, "turn_wait_seconds_count") == 1


def test_who_goes_away_waits_no_more(make_fake_llm: MakeLLM) -> None:
    with short_of_time(make_fake_llm) as (client, server):
        accounts = server.connections.shares._accounts
        with connected(client) as first, connected(client) as second:
            for one in (first, second):
                one.sendall(_ASK % b"one")
            wait_until(server, lambda: in_turn(server) == 2)
        wait_until(server, lambda: not any(one.waiting for one in accounts.values()))
        assert in_turn(server) == 0
        assert chat(client).status_code == 200


def test_who_waits_for_a_turn_gives_way_last(make_fake_llm: MakeLLM) -> None:
    """To those who say nothing it does not, and to others it does: nobody is locked out."""
    with short_of_time(make_fake_llm, max_connections=8) as (client, server), ExitStack() as stack:
        waiting = [stack.enter_context(connected(client)) for _ in range(4)]
        for one in waiting:
            one.sendall(_ASK % b"one")
        wait_until(server, lambda: in_turn(server) == 4)
        with crowd(client.base_url.port or 0, 20, HALF_HEAD):
            wait_until(server, lambda: closed(server, Reason.DISPLACED) >= 17)
            assert in_turn(server) == 4
        wait_until(server, lambda: len(server.connections._open) == 4)  # the client's own is gone
        for number in (5, 6, 7, 8):
            stack.enter_context(connected(client)).sendall(_ASK % b"one")
            wait_until(server, partial(is_in_turn, server, number))
        stack.enter_context(connected(client)).sendall(_ASK % b"one")
        status, body = answer_on(waiting[0])
        assert status == 503
        assert b"--max-connections" in body
        assert chat(client).status_code == 200


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_is_a_share(share: float) -> None:
    with pytest.raises(ConfigError, match="http_share"):
        ServerSettings(http_share=share)
