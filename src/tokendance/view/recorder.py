"""Records what an engine tells of its rounds, within bounds.

On the engine's thread an event is put into a queue, and that is all. Whoever wants to see the
rounds has them made of the queue, on another thread or between two rounds:

    engine ─ on_event ─▶ queue ─ reading ─▶ rounds (`view.rounds`) ─▶ document (`view.document`)
"""

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from tokendance.collector.estimate import PrefixEstimate
from tokendance.engine.events import (
    Admitted,
    Compared,
    Event,
    Finished,
    FirstToken,
    RoundStarted,
    StepDone,
)
from tokendance.engine.request import RequestId
from tokendance.rounds.segments import Salt
from tokendance.store.entries import RoundId
from tokendance.view.rounds import RecordedRound, Runs, Segments, StoredBytes

_HIDDEN_ROUNDS = 16
_ESTIMATED_PAGES = 400_000  # of prefix caching, for each tenant: some 60 MB


@dataclass(frozen=True, slots=True)
class RecordLimits:
    """How much is kept.

    Attributes:
        max_rounds: the oldest give way to new ones.
        max_tokens: likewise; of texts that are kept, each counted once.
        max_pieces: likewise; of bars, 24 bytes each. A prompt has a few for each block it reads.
        max_events: that wait to be read; the oldest are lost, and counted.
    """

    max_rounds: int = 200
    max_tokens: int = 8_000_000
    max_pieces: int = 2_000_000
    max_events: int = 100_000


class _Queued(NamedTuple):
    event: Event
    stored: StoredBytes | None


class Recorder:
    """An `EngineObserver` that keeps the last rounds. `on_event` runs on the engine's thread.

    Attributes:
        limits: how much is kept.
    """

    def __init__(
        self,
        stored: Callable[[], StoredBytes],
        *,
        page_size: int,
        page_bytes: int,
        limits: RecordLimits | None = None,
    ) -> None:
        """Record nothing yet.

        Args:
            stored: says on the engine's thread what can be found again; asked when a request ends.
            page_size: tokens of a page, for what prefix caching would compute.
            page_bytes: bytes of a page of KV memory.
            limits: how much is kept.
        """
        self.limits = limits or RecordLimits()
        self._stored = stored
        self._page_size = page_size
        self._page_bytes = page_bytes
        self._events: deque[_Queued] = deque(maxlen=self.limits.max_events)
        self._num_lost = 0
        self._lock = threading.Lock()  # of all below
        self._rounds: dict[RoundId, RecordedRound] = {}
        self._round_of: dict[RequestId, RoundId] = {}  # of requests that run
        self._segments = Segments()
        self._runs = Runs()
        self._estimates: dict[Salt, PrefixEstimate] = {}
        self._num_rounds: Counter[Salt] = Counter()  # so far, of each tenant; likewise the next
        self._num_dropped: Counter[Salt] = Counter()

    # -- on the engine's thread -------------------------------------------------------------------

    def on_event(self, event: Event) -> None:
        """See `EngineObserver`."""
        if len(self._events) == self.limits.max_events:
            self._num_lost += 1
        stored = self._stored() if isinstance(event, Finished) else None
        self._events.append(_Queued(event, stored))

    # -- on any thread ----------------------------------------------------------------------------

    @contextmanager
    def reading(self) -> Iterator["Recorded"]:
        """Make rounds of what has happened since; they stay as they are until the end."""
        with self._lock:
            for _ in range(len(self._events)):  # and not of what happens meanwhile
                self._take(*self._events.popleft())
            self._drop_oldest()
            yield Recorded(
                tuple(one for one in self._rounds.values() if one.is_shown),
                self._segments,
                self._runs,
                self._num_dropped,
                self._num_lost,
            )

    def digest(self) -> None:
        """Do what `reading` does of what has happened since, so that the queue does not fill."""
        if self._events:
            with self.reading():
                pass

    def _take(self, event: Event, stored: StoredBytes | None) -> None:
        if isinstance(event, RoundStarted):
            started = self._round(event.round_id)
            started.added_s, started.num_requests = event.added_s, event.num_requests
        elif isinstance(event, Admitted):
            if event.in_round:
                self._admit(event)
        elif isinstance(event, StepDone):
            self._take_step(event)
        elif isinstance(event, FirstToken):
            if event.round_id in self._rounds:
                self._rounds[event.round_id].take_first_token(event)
        elif isinstance(event, Finished):
            self._round_of.pop(event.request, None)
            # What fails at once does so before its round begins.
            self._finish(self._round(event.round_id), event, stored)
        elif isinstance(event, Compared) and event.round_id in self._rounds:
            self._rounds[event.round_id].take_comparison(event)

    def _round(self, round_id: RoundId) -> RecordedRound:
        if round_id not in self._rounds:
            self._rounds[round_id] = RecordedRound(round_id)
        return self._rounds[round_id]

    def _admit(self, event: Admitted) -> None:
        joined = self._round(event.round_id)
        if not joined.number:
            self._num_rounds[event.prompt.salt] += 1
            joined.number = self._num_rounds[event.prompt.salt]
            joined.salt = event.prompt.salt
        self._round_of[event.request] = event.round_id
        joined.admit(event, self._segments, self._runs)

    def _take_step(self, event: StepDone) -> None:
        rounds: dict[RoundId, dict[RequestId, int]] = {}
        for request, num_tokens in event.num_tokens.items():
            round_id = self._round_of.get(request)
            if round_id is not None:
                rounds.setdefault(round_id, {})[request] = num_tokens
        for round_id, of_round in rounds.items():
            if round_id in self._rounds:
                resident = event.resident_pages.get(round_id, 0) * self._page_bytes
                self._rounds[round_id].take_step(event, of_round, resident)

    def _finish(self, ended: RecordedRound, event: Finished, stored: StoredBytes | None) -> None:
        ended.finish(event)
        if stored is not None:
            ended.stored = stored
        if ended.is_done:
            self._segments.remember_answers(ended)
            for salt, prompts in ended.take_prompts().items():
                estimate = self._estimates.setdefault(
                    salt, PrefixEstimate(self._page_size, max_pages=_ESTIMATED_PAGES)
                )
                ended.prefix_tokens += estimate.add_round(prompts)

    def _drop_oldest(self) -> None:
        """Keep within the limits; the newest round stays in any case."""
        hidden = [one for one in self._rounds.values() if not one.is_shown]
        for index, one in enumerate(hidden):
            # Of those that never began, a few are kept: they may.
            if (one.num_requests and one.is_done) or index < len(hidden) - _HIDDEN_ROUNDS:
                del self._rounds[one.round_id]
        limits, segments = self.limits, self._segments
        num_pieces = sum(one.num_pieces for one in self._rounds.values())
        while len(self._rounds) > 1 and (
            len(self._rounds) > limits.max_rounds
            or segments.num_tokens > limits.max_tokens
            or num_pieces > limits.max_pieces
        ):
            oldest = self._rounds.pop(next(iter(self._rounds)))
            num_pieces -= oldest.num_pieces
            if oldest.salt is not None:
                self._num_dropped[oldest.salt] += 1
            for agent in oldest.agents.values():
                self._round_of.pop(agent.request, None)
                self._segments.release(agent)
        self._runs.keep(self._rounds)


@dataclass(frozen=True, slots=True)
class Recorded:
    """What is kept, at one moment.

    Attributes:
        rounds: in the order in which they began.
        segments: that they have read.
        runs: that they have computed or read.
        num_dropped: rounds of each tenant that had to give way.
        num_lost: events that nobody has read in time; some figures are too small then.
    """

    rounds: tuple[RecordedRound, ...]
    segments: Segments
    runs: Runs
    num_dropped: Mapping[Salt, int]
    num_lost: int
