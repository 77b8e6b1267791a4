"""The time of the event loop's thread, divided among the keys whose requests it reads.

The loop and the engine take turns at one interpreter, so requests that come fast, refused ones too,
slow down every pass of the model. While several keys are answered, all requests together may take a
share of the time, and each key an even part of it. Whoever has taken more is held back before its
next request begins, and before its whole body is parsed; what one leaves goes to the others:

    one    ##########|.held.|##|.held.|##|.held.|##     has taken more
    other      #         #        #         #           begins at once

Each key has a leaky bucket: what a request's task computes until its answer begins, and reading its
bytes, fills it; the share drains it; and above some level nothing goes on. What a request takes on
other threads or in tasks of its own is not counted, nor are streams, which are as fast as the
engine. All who have no valid key are one. Nobody is held back while no other is being answered.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Coroutine, Generator, Sequence
from dataclasses import dataclass, field
from types import coroutine
from typing import Any

# What somebody may have taken beyond its part: a hundred requests that come at once begin at once.
_BURST_S = 0.25
# More than this is forgiven, so that nobody is held back for what is long past.
_MOST_S = 1.0
# Who has been answered within this time may ask again, and be slowed by what others have taken.
_PRESENT_S = 5.0
# Between two looks at what all have taken, and the longest between two at somebody held back.
_SETTLE_S = 0.005
_LONGEST_WAIT_S = 0.1


@dataclass(slots=True, eq=False)
class Account:
    """What the requests of one key have taken.

    Attributes:
        taken_s: seconds of the loop's thread, less what has drained since.
        answered_s: when one of its requests was last seen being answered, by the clock.
        held: requests that are held back, first come first served: each is done when it may go on.
        has_timer: whether the loop will look at those.
    """

    taken_s: float = 0.0
    answered_s: float = float("-inf")
    held: dict[asyncio.Future[None], None] = field(default_factory=dict)
    has_timer: bool = False


class Shares:
    """Accounts by key; all methods are called in the event loop."""

    def __init__(
        self,
        share: float,
        answered: Callable[[], Collection[str]],
        clock: Callable[[], float] = time.perf_counter,
        cpu_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        """Divide a share (0 to 1) of the time.

        `answered` are the names of those who are being answered; `cpu_clock` is how long the
        calling thread has computed. A test may have clocks of its own.
        """
        self._share = share
        self._answered = answered
        self._clock = clock
        self.cpu_clock = cpu_clock
        self._accounts: dict[str, Account] = {}
        self._settled_s = clock()

    def account(self, name: str) -> Account:
        """An account by its name: a tenant's, or "" for all who have none."""
        return self._accounts.setdefault(name, Account())

    def hold(self, account: Account) -> asyncio.Future[None] | None:
        """Hold back a request until what is returned is done; None if it may go on now.

        It has to be released if its client goes away.
        """
        self._settle()
        if not account.held and self._wait_s(account) == 0:
            return None
        held = asyncio.get_running_loop().create_future()
        account.held[held] = None
        if not account.has_timer:
            self._look_later(account)
        return held

    def release(self, account: Account, held: asyncio.Future[None]) -> None:
        """Hold back a request no longer; nothing happens to one that is not."""
        if held in account.held:
            del account.held[held]
            if not held.done():  # a server that stops may have cancelled it
                held.set_result(None)

    def charge(self, account: Account, seconds: float) -> None:
        """Note what was computed for an account."""
        account.taken_s = min(account.taken_s + seconds, _MOST_S)

    @coroutine
    def metered(
        self, account: Account, work: Coroutine[Any, Any, None], is_begun: Callable[[], bool]
    ) -> Generator[Any, Any, None]:
        """Do the work of a request; note what each step computes until `is_begun()` its answer."""
        value: Any = None
        error: BaseException | None = None
        while True:
            is_counted = not is_begun()
            begin_s = self.cpu_clock() if is_counted else 0.0
            try:
                awaited = work.send(value) if error is None else work.throw(error)
            except StopIteration:
                return
            finally:
                # An error refers to this frame, which must not refer to it: that would be garbage.
                value = error = None
                if is_counted:
                    self.charge(account, self.cpu_clock() - begin_s)
            try:
                value = yield awaited
            except BaseException as thrown:  # the work's matter, as without this
                error = thrown

    def _look_later(self, account: Account) -> None:
        account.has_timer = True
        wait_s = min(self._wait_s(account), _LONGEST_WAIT_S)
        asyncio.get_running_loop().call_later(wait_s, self._look, account)

    def _look(self, account: Account) -> None:
        """Let one begin if it may; what it takes at once is known when the loop comes back."""
        account.has_timer = False
        self._settle()
        if account.held and self._wait_s(account) == 0:
            self.release(account, next(iter(account.held)))
        if account.held:
            self._look_later(account)

    def _wait_s(self, account: Account) -> float:
        """Seconds until its next request may begin, if all goes on as it is."""
        beyond_s = account.taken_s - _BURST_S
        if beyond_s <= 0 or not any(
            self._accounts.get(name) is not account for name in self._answered()
        ):
            return 0.0
        num_taking = sum(one.taken_s > 0 for one in self._accounts.values())
        return max(_SETTLE_S, beyond_s * num_taking / self._share)

    def _settle(self) -> None:
        """Let drain what has drained since the last time."""
        now_s = self._clock()
        passed_s = now_s - self._settled_s
        if passed_s < _SETTLE_S:
            return
        self._settled_s = now_s
        for name in self._answered():
            self.account(name).answered_s = now_s
        accounts = self._accounts.values()
        since_s = now_s - _PRESENT_S
        present = {account for account in accounts if account.answered_s > since_s}
        for account in accounts:
            if present <= {account}:
                account.taken_s = 0.0  # it has taken nothing from anybody
        drain([account for account in accounts if account.taken_s > 0], passed_s * self._share)


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
