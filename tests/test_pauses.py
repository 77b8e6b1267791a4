"""How long the engine's thread and the event loop were held up, as metrics have it."""

import asyncio
import time

import pytest
from prometheus_client import CollectorRegistry

from tokendance.server.pauses import EngineWatch, Pauses, watch_event_loop


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make(clock: Clock) -> tuple[Pauses, CollectorRegistry]:
    registry = CollectorRegistry()
    return Pauses("engine", "What held it up.", registry, clock), registry


def test_the_longest_of_the_last_minute() -> None:
    clock = Clock()
    pauses, registry = make(clock)
    assert pauses.longest() == 0
    for now, seconds, longest in (
        (0, 0.1, 0.1),
        (30, 0.5, 0.5),
        (61, 0.2, 0.5),  # of the minute before
        (119, 0.1, 0.5),
        (121, 0.1, 0.2),
        (400, 0.05, 0.05),
    ):
        clock.now = now
        pauses.note(seconds, seconds / 4)
        assert pauses.longest_computing() == longest / 4
        assert registry.get_sample_value("tokendance_engine_longest_pause_seconds") == longest
    clock.now = 1000
    assert pauses.longest() == 0
    assert registry.get_sample_value("tokendance_engine_pause_seconds_count") == 6
    below = registry.get_sample_value("tokendance_engine_pause_seconds_bucket", {"le": "0.1"})
    assert below == 4


def test_passes_and_waiting_are_no_pauses() -> None:
    clock = Clock()
    pauses, registry = make(clock)
    cpu = Clock()
    watch = EngineWatch(pauses, clock, cpu)

    def total() -> float:
        found = registry.get_sample_value("tokendance_engine_pause_seconds_sum")
        assert found is not None
        return found

    clock.now = 10
    watch.rest()  # from the beginning on
    clock.now = 20
    watch.wake()
    clock.now = 23
    cpu.now = 1.5
    watch.passed(23, 2, 1.25)
    assert total() == pytest.approx(1)
    assert pauses.longest_computing() == 0.25
    clock.now = 27
    watch.passed(27, 3.5, 0)
    assert total() == pytest.approx(1.5)
    clock.now = 29
    watch.rest()
    assert total() == pytest.approx(3.5)
    assert pauses.longest() == 2
    assert pauses.longest_computing() == 0.25
    cpu.now = 7  # of waiting, nobody asks
    clock.now = 99
    watch.wake()
    watch.rest()
    assert pauses.longest() == 2


def test_an_event_loop_that_is_held_up_shows_it() -> None:
    pauses = Pauses("event_loop", "What held it up.", CollectorRegistry())

    async def hold() -> None:
        watching = asyncio.create_task(watch_event_loop(pauses))
        while pauses.longest() == 0:
            await asyncio.sleep(0)
        begun = time.perf_counter()
        while time.perf_counter() - begun < 0.1:
            pass
        while pauses.longest() < 0.05:
            await asyncio.sleep(0)
        watching.cancel()

    asyncio.run(asyncio.wait_for(hold(), 60))
