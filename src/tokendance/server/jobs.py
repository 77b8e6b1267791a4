"""A job: one answer that somebody waits for, and what happens to it."""

from collections.abc import Callable
from dataclasses import dataclass

from tokendance.engine.request import Request
from tokendance.executor.step import TokenLogprobs
from tokendance.outputs import Output
from tokendance.rounds.segments import Salt
from tokendance.server.kept_chats import KeptChat


@dataclass(frozen=True, slots=True)
class NewTokens:
    """One or more tokens generated since the last event; with log-probabilities if asked for."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]


# The output comes last, when a job is done or has failed.
Event = NewTokens | Output


@dataclass(frozen=True, slots=True)
class RoundKey:
    """A round that a tenant's clients have named."""

    tenant: Salt
    name: str


@dataclass(slots=True, eq=False)
class Job:
    """One answer that somebody waits for.

    Attributes:
        request: for the engine; its prompt may be cut into segments anew before it starts.
        on_event: called with each event, on the engine's thread.
        key: of the round that it belongs to, if a client has named one.
        round_size: requests of that round, if the client says.
        marked: whether the client said which parts are shared.
        chat: whose KV is kept, if the client has named a session.
        num_sent: tokens that `on_event` was called with; the dispatcher writes it.
        is_alone: whether it started in a round of one; the dispatcher writes it.
    """

    request: Request
    on_event: Callable[[Event], None]
    key: RoundKey | None = None
    round_size: int | None = None
    marked: bool = False
    chat: KeptChat | None = None
    num_sent: int = 0
    is_alone: bool = True
