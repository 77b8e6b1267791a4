"""The engine's loop: the only one. Whoever has requests calls `tick` until they are done.

An offline caller ticks until its round has ended; the server's thread ticks for ever. What else has
to be done between two steps hangs on the loop: shadows, and writing to disk in the background.
"""

import itertools
import logging
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tokendance.engine.engine import Engine
from tokendance.engine.events import EngineObserver, Event
from tokendance.engine.request import Request
from tokendance.engine.tenants import TenantRules
from tokendance.errors import EngineError, StepError
from tokendance.options import EngineOptions
from tokendance.outputs import Progress
from tokendance.rounds.discovery import EarlierPrompt
from tokendance.rounds.segments import EncodedPrompt, Salt
from tokendance.store.entries import RoundId
from tokendance.store.pages import Holder

log = logging.getLogger("tokendance.engine")


class Attachment(Protocol):
    """Hangs on the loop, and is called on its thread."""

    def after_step(self, now: float, requests: Collection[Request]) -> None:
        """Do what there is to do; called at the end of each tick.

        Args:
            now: clock time.
            requests: of rounds that were under way when the tick began, also those that have ended.
        """
        ...

    def due_s(self) -> float | None:
        """Clock time at which `after_step` has something to do though no request comes."""
        ...


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """How an engine is doing.

    Attributes:
        num_running: requests that are computed.
        num_waiting: requests in the queue.
        num_pages: of KV memory.
        resident_pages: that running requests hold.
        stored_pages: that can be found again; running requests may hold them, too.
        num_rounds: of which somebody waits or runs.
    """

    num_running: int
    num_waiting: int
    num_pages: int
    resident_pages: int
    stored_pages: int
    num_rounds: int


class EngineLoop:
    """An engine as all others see it. Not safe for several threads at once.

    Attributes:
        options: it was made with.
        kv_bytes_per_token: of KV.
        page_bytes: of KV.
    """

    def __init__(self, engine: Engine, options: EngineOptions, kv_bytes_per_token: int) -> None:
        """Drive an engine."""
        self._engine = engine
        self._attachments: list[Attachment] = []
        self._round_ids = itertools.count()
        self._num_failures = 0  # of forward passes, in a row
        self.options = options
        self.kv_bytes_per_token = kv_bytes_per_token
        self.page_bytes = kv_bytes_per_token * options.page_size

    def new_round_id(self) -> RoundId:
        """Return an id for requests that belong together."""
        return RoundId(next(self._round_ids))

    def attach(self, attachment: Attachment) -> None:
        """Call something after each step from now on."""
        self._attachments.append(attachment)

    def detach(self, attachment: Attachment) -> None:
        """Call it no more; nothing happens if it is not called any more."""
        if attachment in self._attachments:
            self._attachments.remove(attachment)

    def observe(self, observer: EngineObserver) -> None:
        """Tell an observer what happens from now on."""
        self._engine.observe(observer)

    def emit(self, event: Event) -> None:
        """Tell all observers of something that happened beside the engine."""
        self._engine.emit(event)

    # -- requests -------------------------------------------------------------------------------

    def set_tenants(self, rules: TenantRules) -> None:
        """Say what is kept for each tenant, before there is any request.

        Raises:
            ConfigError: if there is too little KV memory for that.
        """
        self._engine.set_tenants(rules)

    def add(self, requests: Sequence[Request]) -> None:
        """Queue requests that arrive together; those of a running round join it."""
        self._engine.add(requests)

    def abort(self, request: Request, why: str = "The request was taken back.") -> None:
        """End a request; the others go on. Does nothing if it is done."""
        self._engine.abort(request, why)

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return self._engine.has_work

    @property
    def can_compute(self) -> bool:
        """Whether a tick would compute something, as far as one can tell before it."""
        return self._engine.can_compute

    def due_s(self) -> float | None:
        """Clock time at which a tick has something to do though no request comes; None: never."""
        due = [attachment.due_s() for attachment in self._attachments]
        return min((time_s for time_s in due if time_s is not None), default=None)

    def tick(self, now: float | None = None) -> None:
        """Compute one step, if there is anything to compute, and do what hangs on the loop.

        A failed forward pass fails its requests, and the engine goes on; not so when the next one
        fails, too.

        Args:
            now: clock time; that of `time.perf_counter` if left out.

        Raises:
            EngineError: if two forward passes in a row have failed; the engine is to be given up.
        """
        requests = self._engine.open_requests()
        if self._engine.has_work:
            try:
                self._engine.step()
                self._num_failures = 0
            except StepError as error:
                self._num_failures += 1
                if self._num_failures > 1:
                    raise EngineError(f"The engine has failed twice in a row: {error}") from error
                log.exception("a forward pass has failed; other requests go on")
                self._engine.check_integrity()
        now = time.perf_counter() if now is None else now
        for attachment in list(self._attachments):
            try:
                attachment.after_step(now, requests)
            except Exception:  # requests are served without it
                log.exception("what hangs on the loop has failed, and is called no more")
                self.detach(attachment)

    def run(
        self,
        requests: Sequence[Request],
        progress: Progress | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Add requests, and tick until they are done.

        Args:
            requests: to run, beside all others that wait or run.
            progress: told after each tick how many of them are done with a phase.
            check: called after each tick; these requests are taken back if it raises, as they are
                if `progress` does, or an interrupt comes.
        """
        self.add(requests)
        try:
            while any(request.finish_reason is None for request in requests):
                self.tick()
                check()
                if progress is not None:
                    _report(requests, progress)
        except BaseException:
            for request in requests:
                self.abort(request)
            raise

    # -- KV -------------------------------------------------------------------------------------

    def seconds_per_token(self) -> float | None:
        """Of the last large pass over prompts; None before there was one."""
        return self._engine.seconds_per_token

    def num_kept(self, salt: Salt) -> int:
        """Pages that are kept for others when KV of a tenant is read from disk."""
        return self._engine.scheduler.num_kept(salt)

    def num_cached(self, prompt: EncodedPrompt) -> int:
        """How many tokens at the beginning of a prompt have KV that its round may reuse."""
        return len(self._engine.store.match_slots(prompt.prefix_hashes))

    def recall(self, prompts: Iterable[EarlierPrompt], salt: Salt) -> None:
        """Offer parts of earlier prompts for reuse, as far as their KV is still there."""
        self._engine.store.recall(prompts, salt)

    def forget(self) -> None:
        """Forget all KV but what running requests hold."""
        self._engine.store.clear()

    def status(self) -> EngineStatus:
        """How it is doing."""
        pool, scheduler = self._engine.store.pool, self._engine.scheduler
        return EngineStatus(
            len(scheduler.running),
            scheduler.num_waiting,
            pool.num_pages,
            pool.num_held(Holder.REQUEST),
            pool.num_held(Holder.INDEX),
            self._engine.num_rounds,
        )

    def check_integrity(self) -> None:
        """Assert that page counts, indexes and running requests agree."""
        self._engine.check_integrity()


def _report(requests: Sequence[Request], progress: Progress) -> None:
    ended = sum(request.finish_reason is not None for request in requests)
    begun = sum(
        request.finish_reason is not None or request.first_token_s is not None
        for request in requests
    )
    if begun < len(requests):
        progress("prefill", begun)
    else:
        progress("decode", ended)
