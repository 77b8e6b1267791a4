"""The time of the event loop's thread, divided among those who ask.

The loop and the engine take turns at one interpreter, so requests that come fast, refused ones too,
slow down every pass of the model. While several ask and something is being computed, their requests
have a share of the time together, which is divided evenly. Whoever has taken more than its part
waits before its next request begins; what one leaves of its part goes to the others:

    one    ##########|.wait.|##|.wait.|##|.wait.|##     has taken more
    other      #         #        #         #           begins at once

Who asks alone never waits. Each has a leaky bucket: what its requests compute until their answers
begin fills it, the share drains it, and above some level nothing new begins. (Time that a request
spends elsewhere, in the engine or on the disk, is not counted here, nor are streams, which are as
fast as the engine.)
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Generator, Sequence
from dataclasses import dataclass, field
from types import coroutine
from typing import Any

# What somebody may have taken beyond its part: a hundred requests that come at once begin at once.
_BURST_S = 0.25
# More than this is forgiven, so that nobody is kept waiting for what is long past.
_MOST_S = 2 * _BURST_S
# Whoever has asked within this time is one of several.
_PRESENT_S = 10.0
# Between two looks at what all have taken, at who has gone, and at somebody who waits.
_SETTLE_S = 0.005
_FORGET_S = 1.0
_LONGEST_WAIT_S = 0.1


@dataclass(slots=True, eq=False)
class Account:
    """What somebody who asks has taken.

    Attributes:
        taken_s: seconds of the loop's thread, less what has drained since.
        num_open: requests that have begun and are not answered.
        asked_s: when the last one came, by the clock.
        waiting: those that may not begin yet, first come first served.
        is_looked_at: whether a timer sees to those.
    """

    taken_s: float = 0.0
    num_open: int = 0
    asked_s: float = 0.0
    waiting: dict[asyncio.Future[None], None] = field(default_factory=dict)
    is_looked_at: bool = False


class Shares:
    """Accounts of all who ask, by name; all methods are called in the event loop."""

    def __init__(
        self,
        share: float,
        is_busy: Callable[[], bool],
        clock: Callable[[], float] = time.perf_counter,
        cpu_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        """Divide a share (0 to 1) of the time while `is_busy()`, and all of it otherwise.

        `cpu_clock` is how long the calling thread has computed; a test may have clocks of its own.
        """
        self._share = share
        self._is_busy = is_busy
        self._clock, self._cpu_clock = clock, cpu_clock
        self._accounts: dict[str, Account] = {}
        self._settled_s = self._forgot_s = clock()

    def account(self, name: str) -> Account:
        """The account of somebody who asks something now."""
        self._settle()
        account = self._accounts.setdefault(name, Account())
        account.asked_s = self._clock()
        return account

    def turn(self, account: Account) -> asyncio.Future[None] | None:
        """What is done when the next request may begin; None if it may now."""
        if not account.waiting and self._wait_s(account) == 0:
            return None
        turn = asyncio.get_running_loop().create_future()
        account.waiting[turn] = None
        if not account.is_looked_at:
            self._look_later(account)
        return turn

    def leave(self, account: Account, turn: asyncio.Future[None]) -> None:
        """End a turn that nobody waits for any more."""
        if turn in account.waiting:
            del account.waiting[turn]
            if not turn.done():  # a server that stops may have cancelled it
                turn.set_result(None)

    def charge(self, account: Account, seconds: float) -> None:
        """Note what was computed for somebody."""
        account.taken_s = min(account.taken_s + seconds, _MOST_S)

    @coroutine
    def metered(
        self, account: Account, work: Coroutine[Any, Any, None], is_begun: Callable[[], bool]
    ) -> Generator[Any, Any, None]:
        """Do the work of a request; note what each step computes until `is_begun()` its answer."""
        account.num_open += 1
        step: Callable[[Any], Any] = work.send
        given: Any = None
        try:
            while True:
                is_counted = not is_begun()
                begin_s = self._cpu_clock() if is_counted else 0.0
                try:
                    awaited = step(given)
                except StopIteration:
                    return
                finally:
                    if is_counted:
                        self.charge(account, self._cpu_clock() - begin_s)
                try:
                    step, given = work.send, (yield awaited)
                except BaseException as error:  # the work's matter, as without this
                    step, given = work.throw, error
        finally:
            account.num_open -= 1

    def _look_later(self, account: Account) -> None:
        account.is_looked_at = True
        wait_s = min(self._wait_s(account), _LONGEST_WAIT_S)
        asyncio.get_running_loop().call_later(wait_s, self._look, account)

    def _look(self, account: Account) -> None:
        """Let one begin if it may; what it takes at once is known when the loop comes back."""
        self._settle()
        account.is_looked_at = False
        if account.waiting and self._wait_s(account) == 0:
            self.leave(account, next(iter(account.waiting)))
        if account.waiting:
            self._look_later(account)

    def _wait_s(self, account: Account) -> float:
        """Seconds until its next request may begin, if all goes on as it is."""
        beyond_s = account.taken_s - _BURST_S
        if beyond_s <= 0:
            return 0.0
        return max(_SETTLE_S, beyond_s * len(self._in_debt()) / self._rate())

    def _rate(self) -> float:
        """Seconds that drain in a second."""
        return self._share if len(self._accounts) > 1 and self._is_busy() else 1.0

    def _in_debt(self) -> list[Account]:
        return [account for account in self._accounts.values() if account.taken_s > 0]

    def _settle(self) -> None:
        """Let drain what has drained since the last time, and forget who asks no more."""
        now_s = self._clock()
        passed_s = now_s - self._settled_s
        if passed_s < _SETTLE_S:
            return
        self._settled_s = now_s
        drain(self._in_debt(), passed_s * self._rate())
        if now_s - self._forgot_s >= _FORGET_S:
            self._forgot_s = now_s
            self._forget(now_s)

    def _forget(self, now_s: float) -> None:
        self._accounts = {
            name: account
            for name, account in self._accounts.items()
            if account.taken_s > 0
            or account.num_open
            or account.waiting
            or now_s - account.asked_s < _PRESENT_S
        }


def drain(accounts: Sequence[Account], seconds: float) -> None:
    """Take seconds from what accounts have taken: evenly, and never more than one has.

    So whoever has little is down to nothing first, and the others divide the rest (max-min
    fairness, by filling with water).
    """
    left = sorted(accounts, key=lambda account: account.taken_s)
    for index, account in enumerate(left):
        part = min(account.taken_s, seconds / (len(left) - index))
        account.taken_s -= part
        seconds -= part
