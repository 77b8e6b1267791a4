"""Makes vectors on a thread of its own, so that neither the engine nor the event loop waits for it.

    embed(tenant, texts) -> [ queue of the tenant ] -> pass -> pass -> ... -> vectors

Each pass takes texts of one tenant, as many as have few tokens together; then it is the next
tenant's turn. What nobody waits for any more is left out.
"""

import asyncio
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from tokendance.models.embedders import Embedder, Vectors
from tokendance.server.errors import ApiError

log = logging.getLogger("tokendance.server")

# Tokens of a pass, padding included: so few that tenants take turns quickly, and so many that a
# pass is worth its while. A longer text has a pass for itself.
_PASS_TOKENS = 1024
_STOP_S = 10.0


@dataclass(slots=True, eq=False)
class _Request:
    texts: Sequence[Sequence[int]]
    future: "Future[Vectors]" = field(default_factory=Future)
    vectors: list[Vectors] = field(default_factory=list)  # of the first texts
    num_done: int = 0


class EmbeddingThread:
    """See the module. Public methods may be called on any thread."""

    def __init__(self, embedder: Embedder) -> None:
        """Prepare to use an embedder, which nothing else may run then."""
        self.embedder = embedder
        self._queues: OrderedDict[str, deque[_Request]] = OrderedDict()  # by tenant, next first
        self._changed = threading.Condition()
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name="embeddings", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Refuse all that is not done, and end the thread."""
        with self._changed:
            self._is_stopped = True
            requests = [request for queue in self._queues.values() for request in queue]
            self._queues.clear()
            self._changed.notify()
        for request in requests:
            _fail(request, _stopped())
        self._thread.join(_STOP_S)

    async def embed(self, tenant: str, texts: Sequence[Sequence[int]]) -> Vectors:
        """Vectors of a tenant's texts; float32 (len(texts), size).

        Raises:
            ApiError: 503 if the thread has stopped.
        """
        request = _Request(texts)
        with self._changed:
            if self._is_stopped:
                raise _stopped()
            self._queues.setdefault(tenant, deque()).append(request)
            self._changed.notify()
        return await asyncio.wrap_future(request.future)

    def _run(self) -> None:
        while (chosen := self._next_pass()) is not None:
            texts = [text for _, of_request in chosen for text in of_request]
            try:
                vectors = self.embedder.embed(texts)
            except Exception as error:
                log.exception("vectors could not be made")
                for request, _ in chosen:
                    self._drop(request)
                    _fail(request, error)
                continue
            for request, of_request in chosen:
                self._take(request, vectors[: len(of_request)])
                vectors = vectors[len(of_request) :]

    def _next_pass(self) -> list[tuple[_Request, Sequence[Sequence[int]]]] | None:
        """Wait for texts; some of one tenant, by request. None at the end."""
        with self._changed:
            while not self._is_stopped:
                while self._queues:
                    tenant, queue = self._queues.popitem(last=False)
                    while queue and (queue[0].future.done() or _is_done(queue[0])):
                        queue.popleft()
                    if queue:
                        self._queues[tenant] = queue  # behind the others
                        return _choose(queue)
                self._changed.wait()
        return None

    def _take(self, request: _Request, vectors: Vectors) -> None:
        """Take vectors of a request's next texts."""
        request.vectors.append(vectors)
        request.num_done += len(vectors)
        if _is_done(request):
            with suppress(InvalidStateError):  # nobody waits any more, or it was told why not
                request.future.set_result(np.concatenate(request.vectors))

    def _drop(self, request: _Request) -> None:
        with self._changed:
            request.num_done = len(request.texts)


def _is_done(request: _Request) -> bool:
    return request.num_done == len(request.texts)


def _choose(queue: deque[_Request]) -> list[tuple[_Request, Sequence[Sequence[int]]]]:
    """The first texts of a tenant that fit a pass, one at least, by request."""
    chosen: list[tuple[_Request, Sequence[Sequence[int]]]] = []
    count, longest = 0, 0
    for request in queue:
        if request.future.done():
            continue  # nobody waits for it
        texts = []
        for text in request.texts[request.num_done :]:
            longest = max(longest, len(text))
            if count and (count + 1) * longest > _PASS_TOKENS:
                break
            count += 1
            texts.append(text)
        if texts:
            chosen.append((request, texts))
        if len(texts) < len(request.texts) - request.num_done:
            break
    return chosen


def _fail(request: _Request, error: Exception) -> None:
    with suppress(InvalidStateError):
        request.future.set_exception(error)


def _stopped() -> ApiError:
    message = "The server is stopping. Ask another, or later."
    return ApiError(503, message, headers={"Retry-After": "5"})
