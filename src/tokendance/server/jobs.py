"""Jobs: one for each answer that a client waits for, with its events and its text."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from tokenizers.decoders import DecodeStream

from tokendance.engine.request import Request
from tokendance.engine.stops import find_stop
from tokendance.executor.step import TokenLogprobs
from tokendance.outputs import Output
from tokendance.rounds.segments import Salt
from tokendance.server.kept_chats import KeptChat


@dataclass(frozen=True, slots=True)
class NewTokens:
    """Tokens generated since the last event, one or more; log-probabilities if asked for."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]


# The last event is the output: the job is done or has failed.
Event = NewTokens | Output


@dataclass(frozen=True, slots=True)
class RoundKey:
    """A round that a tenant's clients have named."""

    tenant: Salt
    name: str


@dataclass(slots=True, eq=False)
class Job:
    """One answer that a client waits for.

    Attributes:
        request: for the engine; discovery may cut its prompt into other segments before it begins.
        on_event: called with each event, on the engine's thread.
        in_parts: whether that is called with new tokens, too, and not with the output alone.
        key: of its round, if the client has named one.
        round_size: number of requests of that round, if the client has given it.
        marked: whether the client has marked shared parts of the prompt.
        chat: the session that keeps its KV, if the client has named one.
        num_sent: tokens sent to `on_event` so far; the dispatcher writes it.
        is_alone: whether it began as the only job of its round; the dispatcher writes it.
    """

    request: Request
    on_event: Callable[[Event], None]
    in_parts: bool = False
    key: RoundKey | None = None
    round_size: int | None = None
    marked: bool = False
    chat: KeptChat | None = None
    num_sent: int = 0
    is_alone: bool = True


@dataclass(frozen=True, slots=True)
class Delta:
    """New text and tokens of one of several answers.

    Attributes:
        index: of the answer.
        text: new text; may be empty while a character is incomplete.
        token_ids: new tokens.
        logprobs: of each new token, if asked for.
        output: the whole answer when it is done, else None.
    """

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    output: Output | None = None


class Mailbox:
    """Brings events from the engine's thread into an event loop.

    It wakes the loop once for all that is put there before it looks, since each time that the
    engine's thread wakes it, it gives up the interpreter's lock and has to wait for it again.
    """

    def __init__(self) -> None:
        self._events: deque[Callable[[], None]] = deque()
        self._is_announced = False

    def put(self, loop: asyncio.AbstractEventLoop, take: Callable[[], None]) -> None:
        """Have the loop, the same one each time, call something soon; on any thread."""
        self._events.append(take)
        if not self._is_announced:
            self._is_announced = True
            try:
                loop.call_soon_threadsafe(self._empty)
            except RuntimeError:  # the loop is closed: there is nobody to notify
                self._events.clear()
                self._is_announced = False

    def _empty(self) -> None:
        # First, so that what comes from now on is seen below, or announced.
        self._is_announced = False
        while self._events:
            self._events.popleft()()


class Listener:
    """Brings events of several jobs into the event loop that runs now."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._loop = asyncio.get_running_loop()
        self._mailbox = mailbox
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    def of(self, index: int) -> Callable[[Event], None]:
        """What job `index` calls with its events, on the engine's thread."""

        def put(event: Event) -> None:
            self._mailbox.put(self._loop, partial(self._events.put_nowait, (index, event)))

        return put

    async def _until_done(self, num_jobs: int) -> AsyncIterator[tuple[int, Event]]:
        while num_jobs > 0:
            index, event = await self._events.get()
            num_jobs -= isinstance(event, Output)
            yield index, event

    async def outputs(self, num_jobs: int) -> AsyncIterator[tuple[int, Output]]:
        """Index and output of each job as it ends, until all are done."""
        async for index, event in self._until_done(num_jobs):
            if isinstance(event, Output):
                yield index, event

    async def deltas(self, jobs: Mapping[int, Job], tokenizer: object) -> AsyncIterator[Delta]:
        """New text and tokens of the answers of jobs `in_parts`, until all are done."""
        streams = {
            i: TextStream(tokenizer, job.request.params.stop, job.request.params.min_tokens)
            for i, job in jobs.items()
        }
        async for index, event in self._until_done(len(jobs)):
            if isinstance(event, NewTokens):
                text = streams[index].add(event.token_ids)
                yield Delta(index, text, event.token_ids, event.logprobs)
            else:
                yield Delta(index, streams[index].finish(event.text), output=event)


class TextStream:
    """Decodes an answer token by token, and holds back what may be the beginning of a stop text."""

    def __init__(self, tokenizer: object, stop: Sequence[str], num_free: int = 0) -> None:
        """Begin an answer.

        Args:
            tokenizer: a fast one of transformers.
            stop: texts that end the answer.
            num_free: of so many first tokens they do not.
        """
        self._backend = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stop = stop
        self._keep = max((len(text) for text in stop), default=1) - 1
        self._text = ""
        self._num_free = num_free  # tokens that are left of them
        self._free_text = 0  # characters of them
        self._num_sent = 0
        self._has_failed = False

    def add(self, token_ids: Sequence[int]) -> str:
        """Decode new tokens; return new text that is certainly part of the answer."""
        if self._has_failed:
            return ""
        try:
            for token in token_ids:
                self._text += self._decoder.step(self._backend, token) or ""
                if self._num_free > 0:
                    self._num_free -= 1
                    self._free_text = len(self._text)
        except Exception:  # bytes that begin no character: `finish` supplies the rest
            self._has_failed = True
            return ""
        found = find_stop(self._text, self._stop, self._free_text)
        certain = len(self._text) - self._keep
        if found is not None:
            certain = min(certain, found[0])
        return self._send(self._text[: max(self._num_sent, certain)])

    def finish(self, text: str) -> str:
        """Return the rest of the answer, whose whole text is known now."""
        if not text.startswith(self._text[: self._num_sent]) and not self._has_failed:
            text = self._text  # decoded as a whole it begins otherwise; what was sent stays
        return self._send(text)

    def _send(self, text: str) -> str:
        new = text[self._num_sent :]
        self._num_sent = max(self._num_sent, len(text))
        return new
