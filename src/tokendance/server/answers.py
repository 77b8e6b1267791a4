"""An answer on its way to a client: jobs, their events, and the text that they spell."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from tokenizers.decoders import DecodeStream

from tokendance.executor.step import TokenLogprobs
from tokendance.outputs import Output
from tokendance.server.engine_thread import EngineThread
from tokendance.server.jobs import Done, Event, Job, NewTokens


@dataclass(frozen=True, slots=True)
class Delta:
    """What one of several answers has said since the last time.

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


class Listener:
    """Brings events of several jobs from the engine's thread into the event loop."""

    def __init__(self) -> None:
        """Listen in the loop that runs now."""
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    def of(self, index: int) -> Callable[[Event], None]:
        """What job `index` calls with its events."""
        return partial(self.put, index)

    def put(self, index: int, event: Event) -> None:
        """Take an event; called on the engine's thread."""
        # A loop that has closed has nobody left who would listen.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

    async def get(self) -> tuple[int, Event]:
        """Wait for the next event of any job."""
        return await self._events.get()


class TextStream:
    """Turns tokens into text piece by piece, and keeps back what may become a stop text."""

    def __init__(self, tokenizer: object, stop: Sequence[str]) -> None:
        """Begin an answer.

        Args:
            tokenizer: of transformers, a fast one.
            stop: texts that end the answer and are not part of it.
        """
        self._backend = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stop = stop
        self._keep = max((len(text) for text in stop), default=1) - 1
        self._text = ""
        self._num_sent = 0
        self._is_lost = False

    def add(self, token_ids: Sequence[int]) -> str:
        """Take tokens; return what is certain to be in the answer."""
        if self._is_lost:
            return ""
        try:
            for token in token_ids:
                self._text += self._decoder.step(self._backend, token) or ""
        except Exception:  # bytes that no character begins with: the end supplies what is missing
            self._is_lost = True
            return ""
        stops = [at for at in map(self._text.find, self._stop) if at >= 0]
        certain = min([len(self._text) - self._keep, *stops])
        return self._send(self._text[: max(self._num_sent, certain)])

    def finish(self, text: str) -> str:
        """Return what is left of the whole answer."""
        if not text.startswith(self._text[: self._num_sent]) and not self._is_lost:
            text = self._text  # a tokenizer that spells the whole otherwise than its parts
        return self._send(text)

    def _send(self, text: str) -> str:
        new = text[self._num_sent :]
        self._num_sent = max(self._num_sent, len(text))
        return new


async def deltas(
    listener: Listener, jobs: Mapping[int, Job], tokenizer: object, *, spelt: bool = True
) -> AsyncIterator[Delta]:
    """What the jobs say, by their numbers, until all are done.

    Args:
        listener: of the jobs.
        jobs: by their numbers.
        tokenizer: see `TextStream`.
        spelt: whether the text of each piece is wanted.
    """
    streams = {
        index: TextStream(tokenizer, job.request.params.stop)
        for index, job in jobs.items()
        if spelt
    }
    left = len(jobs)
    while left:
        index, event = await listener.get()
        if isinstance(event, NewTokens):
            text = streams[index].add(event.token_ids) if spelt else ""
            yield Delta(index, text, event.token_ids, event.logprobs)
        elif isinstance(event, Done):
            left -= 1
            text = streams[index].finish(event.output.text) if spelt else ""
            yield Delta(index, text, output=event.output)


@contextmanager
def taken_back(worker: EngineThread, jobs: Sequence[Job]) -> Iterator[None]:
    """Take jobs back when the one who waits for them has gone; no matter to those that are done."""
    try:
        yield
    finally:
        worker.cancel(jobs)
