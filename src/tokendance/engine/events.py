"""What an engine tells of: frozen events, and who listens to them.

Metrics, figures of rounds, logs, recordings and pictures are observers. None keeps books beside
the engine's, and none sees a tensor.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from tokendance.collector.plan import RequestPlan
from tokendance.engine.request import RequestId
from tokendance.outputs import Output
from tokendance.store.entries import RoundId, RunId


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request has memory, and begins (anew, if it was admitted before).

    Attributes:
        time_s: clock time.
        request: which.
        round_id: of its round.
        agent: whose it is.
        plan: what it takes, owns, corrects and computes.
        runs: numbers of the runs that it owns, in the order of `plan.runs`: sources of other
            plans refer to them.
    """

    time_s: float
    request: RequestId
    round_id: RoundId
    agent: str
    plan: RequestPlan
    runs: tuple[RunId, ...]


@dataclass(frozen=True, slots=True)
class RoundStarted:
    """The first requests of a round were admitted.

    Attributes:
        time_s: clock time.
        added_s: when the first of its requests was added.
        round_id: which.
        num_requests: that have been added, those that wait included.
        admitted: those that begin now, in their order.
    """

    time_s: float
    added_s: float
    round_id: RoundId
    num_requests: int
    admitted: tuple[Admitted, ...]


@dataclass(frozen=True, slots=True)
class StepDone:
    """A forward pass has ended.

    Attributes:
        time_s: clock time of its end.
        seconds: that it took.
        num_tokens: that it computed, by request.
        num_running: requests, before any of them ended.
        num_waiting: requests.
        resident_pages: distinct pages that the running requests of each round held.
    """

    time_s: float
    seconds: float
    num_tokens: Mapping[RequestId, int]
    num_running: int
    num_waiting: int
    resident_pages: Mapping[RoundId, int]


@dataclass(frozen=True, slots=True)
class FirstToken:
    """A request has its first token; its prompt is computed."""

    time_s: float
    request: RequestId
    round_id: RoundId


@dataclass(frozen=True, slots=True)
class Finished:
    """A request is done, or has failed.

    Attributes:
        time_s: clock time.
        request: which.
        round_id: of its round.
        output: what the caller gets.
        arrived_s: clock time at which it came.
        first_token_s: clock time of its first token, if it had one.
        reused_segments: whether it read segments of another context.
        is_last: whether no other request of its round is waiting or running.
    """

    time_s: float
    request: RequestId
    round_id: RoundId
    output: Output
    arrived_s: float
    first_token_s: float | None
    reused_segments: bool
    is_last: bool


@dataclass(frozen=True, slots=True)
class Evicted:
    """Entries gave way to make room.

    Attributes:
        time_s: clock time.
        num_entries: pages of prompts and cached segments.
    """

    time_s: float
    num_entries: int


Event = RoundStarted | Admitted | StepDone | FirstToken | Finished | Evicted


class EngineObserver(Protocol):
    """Listens to an engine, on the engine's thread: it has to be quick, and may not raise."""

    def on_event(self, event: Event) -> None:
        """Take an event."""
        ...
