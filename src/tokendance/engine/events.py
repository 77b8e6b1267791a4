"""What an engine tells of: frozen events, and who listens to them.

Metrics, figures of rounds, logs, recordings and pictures are observers. None keeps books beside
the engine's, and none sees a tensor.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from tokendance.collector.plan import RequestPlan
from tokendance.engine.request import Request, RequestId, make_output
from tokendance.outputs import Output
from tokendance.rounds.segments import EncodedPrompt
from tokendance.store.entries import RoundId, RunId


@dataclass(frozen=True, slots=True)
class Event:
    """Something that has happened, at a clock time in seconds."""

    time_s: float


@dataclass(frozen=True, slots=True)
class Admitted(Event):
    """A request has memory, and begins (anew, if it was admitted before).

    Attributes:
        request: which.
        round_id: of its round.
        agent: whose it is.
        prompt: what it reads.
        in_round: whether it belongs to those that may share; shadows and lone prompts do not.
        plan: what it takes, owns, corrects and computes.
        runs: numbers of the runs that it owns, in the order of `plan.runs`: sources of other
            plans refer to them.
    """

    request: RequestId
    round_id: RoundId
    agent: str
    prompt: EncodedPrompt
    in_round: bool
    plan: RequestPlan
    runs: tuple[RunId, ...]

    @classmethod
    def of(cls, request: Request, now: float) -> "Admitted":
        """That a request which has its memory begins now."""
        assert request.plan is not None
        assert request.allocation is not None
        return cls(
            now,
            request.id,
            request.round_id,
            request.agent,
            request.prompt,
            request.in_round,
            request.plan,
            request.allocation.owned_runs,
        )


@dataclass(frozen=True, slots=True)
class RoundStarted(Event):
    """The first requests of a round were admitted.

    Attributes:
        added_s: when the first of its requests was added.
        round_id: which.
        num_requests: that have been added, those that wait included.
        admitted: those that begin now, in their order.
    """

    added_s: float
    round_id: RoundId
    num_requests: int
    admitted: tuple[Admitted, ...]


@dataclass(frozen=True, slots=True)
class StepDone(Event):
    """A forward pass has ended.

    Attributes:
        seconds: that it took.
        cpu_seconds: that the thread which called it computed meanwhile.
        num_tokens: that it computed, by request.
        num_running: requests, before any of them ended.
        num_waiting: requests.
        resident_pages: distinct pages that the running requests of each round held.
    """

    seconds: float
    cpu_seconds: float
    num_tokens: Mapping[RequestId, int]
    num_running: int
    num_waiting: int
    resident_pages: Mapping[RoundId, int]


@dataclass(frozen=True, slots=True)
class FirstToken(Event):
    """A request has its first token; its prompt is computed."""

    request: RequestId
    round_id: RoundId


@dataclass(frozen=True, slots=True)
class Finished(Event):
    """A request is done, or has failed.

    Attributes:
        request: which.
        round_id: of its round.
        output: what the caller gets.
        arrived_s: clock time at which it came.
        first_token_s: clock time of its first token, if it had one.
        reused_segments: whether it read segments of another context.
        silent: see `engine.request.Request`; nobody waits for it.
    """

    request: RequestId
    round_id: RoundId
    output: Output
    arrived_s: float
    first_token_s: float | None
    reused_segments: bool
    silent: bool

    @classmethod
    def of(cls, request: Request) -> "Finished":
        """That a request has ended."""
        assert request.finished_s is not None
        assert request.arrived_s is not None
        return cls(
            request.finished_s,
            request.id,
            request.round_id,
            make_output(request),
            request.arrived_s,
            request.first_token_s,
            request.plan is not None and bool(request.plan.uses),
            request.silent,
        )


@dataclass(frozen=True, slots=True)
class Compared(Event):
    """A mirror that is done was computed again, exactly: how far it was from that.

    Attributes:
        request: the mirror.
        round_id: of its round.
        num_tokens: of its answer, compared.
        kl_next: KL divergence of the first of them, in nats.
        kl: mean over all of them.
        top1: share of them at which both put the same token first.
    """

    request: RequestId
    round_id: RoundId
    num_tokens: int
    kl_next: float
    kl: float
    top1: float


@dataclass(frozen=True, slots=True)
class Evicted(Event):
    """Entries gave way to make room.

    Attributes:
        num_entries: pages of prompts and cached segments.
    """

    num_entries: int


class EngineObserver(Protocol):
    """Listens to an engine, on the engine's thread: it has to be quick, and may not raise."""

    def on_event(self, event: Event) -> None:
        """Take an event."""
        ...
