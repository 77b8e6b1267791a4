"""The mailbox: all that is put there comes, in its order, with few wake-ups of the event loop."""

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from tokendance.server.jobs import Mailbox


class CountingLoop:
    """An event loop that counts how often it is woken from another thread."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.num_calls = 0

    def call_soon_threadsafe(self, call: Callable[[], Any]) -> None:
        self.num_calls += 1
        self.loop.call_soon_threadsafe(call)


def test_one_call_brings_all_that_was_put_before_the_loop_looked() -> None:
    async def run() -> None:
        mailbox, loop = Mailbox(), CountingLoop()
        came: list[int] = []
        for turn in range(2):
            for number in range(100):
                mailbox.put(loop, partial(came.append, number))  # type: ignore[arg-type]
            assert loop.num_calls == turn + 1
            await asyncio.sleep(0.01)
        assert came == [*range(100), *range(100)]

    asyncio.run(run())


def test_nothing_is_lost_or_overtaken_between_threads() -> None:
    async def run() -> None:
        mailbox, loop = Mailbox(), asyncio.get_running_loop()
        came: list[tuple[int, int]] = []
        done = asyncio.Event()
        num_threads, num_events = 4, 3000

        def take(event: tuple[int, int]) -> None:
            came.append(event)
            if len(came) == num_threads * num_events:
                done.set()

        def put_all(thread: int) -> None:
            for number in range(num_events):
                mailbox.put(loop, partial(take, (thread, number)))

        threads = [threading.Thread(target=put_all, args=[thread]) for thread in range(num_threads)]
        for one in threads:
            one.start()
        await asyncio.wait_for(done.wait(), 60)
        for thread in range(num_threads):
            assert [event for event in came if event[0] == thread] == [
                (thread, number) for number in range(num_events)
            ]

    asyncio.run(run())


def test_a_closed_loop_is_nobodys() -> None:
    mailbox, loop = Mailbox(), asyncio.new_event_loop()
    loop.close()
    mailbox.put(loop, lambda: None)

    async def another() -> list[int]:
        came: list[int] = []
        mailbox.put(asyncio.get_running_loop(), lambda: came.append(1))
        await asyncio.sleep(0.01)
        return came

    assert asyncio.run(another()) == [1]
