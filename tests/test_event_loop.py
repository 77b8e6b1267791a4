"""The server's event loop: a crowd of events is dealt with little by little."""

import asyncio
import selectors
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain

import pytest

from tokendance.server import event_loop
from tokendance.server.event_loop import FewAtATime, new_event_loop

Pair = tuple[socket.socket, socket.socket]
FEW = 3


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_loop, "_EVENTS_IN_A_TURN", FEW)


@pytest.fixture
def pairs() -> Iterator[list[Pair]]:
    """Ten pairs of sockets; something has come on the second of each."""
    with ExitStack() as stack:
        made = [socket.socketpair() for _ in range(10)]
        for pair in made:
            for one in pair:
                stack.enter_context(one)
                one.setblocking(False)
            pair[0].send(b"x")
        yield made


@pytest.fixture
def selector(pairs: list[Pair]) -> Iterator[FewAtATime]:
    """Waits for the second of each pair, of which the data is the number."""
    with FewAtATime() as made:
        for number, (_, second) in enumerate(pairs):
            made.register(second, selectors.EVENT_READ, number)
        yield made


def told(selector: FewAtATime) -> list[int]:
    return [key.data for key, _ in selector.select(0)]


def test_all_are_told_of_before_any_is_told_of_again(selector: FewAtATime) -> None:
    for _ in range(2):  # nobody reads, so all of them happen again
        turns = [told(selector) for _ in range(4)]
        assert [len(turn) for turn in turns] == [3, 3, 3, 1]
        assert sorted(chain(*turns)) == list(range(10))


def test_it_does_not_wait_while_it_has_something_to_tell(
    selector: FewAtATime, pairs: list[Pair]
) -> None:
    told(selector)
    for _, second in pairs:
        second.recv(1)
    # They may have been told of all the same; who reads again finds nothing.
    assert [len(selector.select(None)) for _ in range(3)] == [3, 3, 1]
    assert selector.select(0.01) == []


def test_what_is_not_awaited_any_more_is_not_told_of(
    selector: FewAtATime, pairs: list[Pair]
) -> None:
    first = set(told(selector))
    gone, changed, taken = sorted(set(range(10)) - first)[:3]
    selector.unregister(pairs[gone][1])
    selector.modify(pairs[changed][1], selectors.EVENT_READ, "changed")
    # The number of a file that was closed is another's soon.
    selector.unregister(pairs[taken][1])
    selector.register(pairs[taken][1].fileno(), selectors.EVENT_READ, "another")
    later = [told(selector) for _ in range(2)]
    assert set(chain(*later)) == set(range(10)) - first - {gone, changed, taken}
    again = [told(selector) for _ in range(3)]  # from the system, with all that is awaited now
    assert {"changed", "another"} <= set(chain(*again))


def test_timers_are_due_between_the_events_of_a_crowd(pairs: list[Pair]) -> None:
    turns: list[int] = [0]  # events in each turn of the loop
    num_before_timer: list[int] = []

    async def count() -> None:
        loop = asyncio.get_running_loop()

        def read(number: int) -> None:
            pairs[number][1].recv(1)
            loop.remove_reader(pairs[number][1])
            turns[-1] += 1

        for number, (_, second) in enumerate(pairs):
            loop.add_reader(second, read, number)
        loop.call_later(0, lambda: num_before_timer.append(sum(turns)))
        while sum(turns) < len(pairs):
            await asyncio.sleep(0)
            turns.append(0)

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(asyncio.wait_for(count(), 30))
    assert sum(turns) == len(pairs)
    assert max(turns) == FEW
    assert num_before_timer[0] <= FEW
