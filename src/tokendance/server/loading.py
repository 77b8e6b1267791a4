"""Sessions on their way from and to disk, while the engine goes on with others.

What is wrong with one session's files is no reason to serve no other: whatever is raised here
becomes an error of that session. All of it is called on the engine's thread.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from tokendance.disk.records import SessionKey
from tokendance.errors import AbortedError, StoreError, TokenDanceError
from tokendance.tier.loader import Restoring

log = logging.getLogger("tokendance.server")

# Where all wait for the disk, and there is nothing to compute.
_PAUSE_S = 0.002

# Called when a session is loaded, with what was wrong.
OnLoaded = Callable[[TokenDanceError | None], None]


class Durable(Protocol):
    """What a `Session` and a `KeptChat` have in common."""

    @property
    def key(self) -> SessionKey | None:
        """Under which it is stored."""

    def restoring(self) -> Restoring | None:
        """Read what memory lacks of its KV, in steps; None where nothing is stored."""

    def save(self) -> None:
        """Make it durable as it is now."""


@contextmanager
def storage_errors(action: str) -> Iterator[None]:
    """Where a session is "read" or "stored": raise a StoreError in place of unexpected errors."""
    try:
        yield
    except TokenDanceError:
        raise
    except Exception as error:
        log.exception("a session could not be %s", action)
        raise StoreError(
            f"The session could not be {action}. The server's log says why."
        ) from error


def try_to_save(session: Durable) -> TokenDanceError | None:
    """Bring a session to disk; return what was wrong, if it goes on in memory only."""
    try:
        with storage_errors("stored"):
            session.save()
    except TokenDanceError as error:
        log.warning("A session is not on disk; it goes on in memory: %s", error)
        return error
    return None


def _log_error(error: TokenDanceError | None) -> None:
    if error is not None:
        log.warning("A session cannot be read, and is computed again: %s", error)


@dataclass(slots=True)
class _Loading:
    """A session that is being loaded: the steps that are left, and the file that is being read."""

    steps: Restoring
    on_loaded: list[OnLoaded]
    file: Future[Any] | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether the next step has to wait for the file."""
        return self.file is not None and not self.file.done()


class Loader:
    """All sessions that are being loaded."""

    def __init__(self) -> None:
        self._loading: dict[SessionKey, _Loading] = {}

    def __contains__(self, session: Durable) -> bool:
        return session.key in self._loading

    def __bool__(self) -> bool:
        return bool(self._loading)

    def begin(self, session: Durable, on_loaded: OnLoaded = _log_error) -> None:
        """Begin to load what memory lacks of a session's KV; at the end `on_loaded` is called."""
        assert session.key is not None
        if session in self:
            self._loading[session.key].on_loaded.append(on_loaded)
            return
        try:
            with storage_errors("read"):
                steps = session.restoring()
        except TokenDanceError as error:
            on_loaded(error)
            return
        if steps is None:
            on_loaded(None)
        else:
            self._loading[session.key] = _Loading(steps, [on_loaded])

    @property
    def pause_s(self) -> float:
        """How long nothing has to be done, if the engine has nothing to compute either."""
        return _PAUSE_S if all(loading.is_waiting for loading in self._loading.values()) else 0.0

    def go_on(self) -> None:
        """Do a step for each session whose file is there."""
        for key, loading in list(self._loading.items()):
            if loading.is_waiting:
                continue
            try:
                with storage_errors("read"):
                    loading.file = next(loading.steps, None)
            except TokenDanceError as error:
                self._end(key, error)
            else:
                if loading.file is None:
                    self._end(key, None)

    def stop(self) -> None:
        """Load no further; who waits is told."""
        for key, loading in list(self._loading.items()):
            with contextlib.suppress(Exception):  # of an engine that has failed
                loading.steps.close()
            self._end(key, AbortedError("The engine has stopped."))

    def _end(self, key: SessionKey, error: TokenDanceError | None) -> None:
        for on_loaded in self._loading.pop(key).on_loaded:
            on_loaded(error)
