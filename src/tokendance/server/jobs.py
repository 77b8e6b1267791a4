"""A job: one answer that somebody waits for, and what happens to it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tokendance.disk.records import SessionKey
from tokendance.engine.request import Request
from tokendance.engine.sampling import TokenLogprobs
from tokendance.outputs import Output
from tokendance.rounds.segments import Salt


@dataclass(frozen=True, slots=True)
class NewTokens:
    """Tokens that a job has said since the last event.

    Attributes:
        token_ids: one or more.
        logprobs: of each, if asked for.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """A job is done, or has failed; nothing follows."""

    output: Output


Event = NewTokens | Finished


@dataclass(frozen=True, slots=True)
class RoundKey:
    """A round that clients have named.

    Attributes:
        tenant: whose.
        name: as the client calls it.
    """

    tenant: Salt
    name: str


@dataclass(slots=True, eq=False)
class Job:
    """One answer that somebody waits for.

    Attributes:
        request: for the engine; its prompt may be cut into segments anew before it starts.
        listen: called with each event.
        key: of the round that it belongs to, if a client named one.
        round_size: requests of that round, if the client says.
        marked: whether the client said which parts are shared.
        session: whose KV is kept, if the client named one.
        arrived_s: clock time.
        num_sent: tokens that were told to the listener; the worker writes it.
        alone: whether it started in a round of one; the worker writes it.
    """

    request: Request
    listen: Callable[[Event], None]
    key: RoundKey | None = None
    round_size: int | None = None
    marked: bool = False
    session: SessionKey | None = None
    arrived_s: float = field(default_factory=time.perf_counter)
    num_sent: int = 0
    alone: bool = True
