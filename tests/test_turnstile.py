"""A crowd of requests is let in little by little."""

import asyncio
import itertools

from starlette.types import Receive, Scope, Send

from tokendance.server.turnstile import STEP_S, Turnstile


def test_a_crowd_lets_others_go_on() -> None:
    now = 0.0
    begun: list[int] = []
    seen: list[int] = []  # how many had begun, each time that others had their turn

    async def app(scope: Scope, _: Receive, __: Send) -> None:
        nonlocal now
        begun.append(scope["number"])
        now += STEP_S / 4

    async def others() -> None:
        while len(begun) < 20:
            seen.append(len(begun))
            await asyncio.sleep(0)

    async def come() -> None:
        door = Turnstile(app, lambda: now)
        crowd = [door({"number": number}, None, None) for number in range(20)]  # type: ignore[arg-type]
        await asyncio.gather(others(), *crowd)

    asyncio.run(asyncio.wait_for(come(), 60))
    assert begun == list(range(20))
    steps = [after - before for before, after in itertools.pairwise(seen)]
    assert len(steps) >= 3
    assert max(steps) <= 5
