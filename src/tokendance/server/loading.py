"""Loads sessions from disk step by step, while the engine runs other requests, and saves them.

The engine's thread waits for no disk: files are read and written on other threads, and a session is
loaded or saved when they are there.

Any exception becomes an error of the session whose files caused it, and others are served all the
same. All of it is called on the engine's thread.
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

# Time between looks at files that are being read, if there is nothing to compute.
_PAUSE_S = 0.002

# Called when a session is loaded, or with the error if it cannot be.
OnLoaded = Callable[[TokenDanceError | None], None]


class Durable(Protocol):
    """What a `Session` and a `KeptChat` have in common."""

    @property
    def key(self) -> SessionKey | None:
        """Under which it is stored."""

    def restoring(self) -> Restoring | None:
        """Load KV that is not in memory, in steps; None if nothing is stored."""

    def go_on_writing(self) -> bool:
        """Whether files of it are still being written; `save` would wait for them."""

    def save(self) -> None:
        """Make it durable as it is now."""


@contextmanager
def storage_errors(action: str) -> Iterator[None]:
    """Raise StoreError in place of unexpected exceptions; `action` is "read" or "stored"."""
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
    """Save a session to disk; return the error if that fails, and it stays in memory only."""
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
    """A session that is being loaded: the steps left, and the file that is being read."""

    steps: Restoring
    on_loaded: list[OnLoaded]
    file: Future[Any] | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether the next step has to wait for a file."""
        return self.file is not None and not self.file.done()


def _is_being_written(session: Durable) -> bool:
    try:
        return session.go_on_writing()
    except Exception:  # what is left is written when it is saved
        log.exception("a session could not be written in the background")
        return False


class Loader:
    """All sessions that are being loaded, or wait to be saved."""

    def __init__(self) -> None:
        self._loading: dict[SessionKey, _Loading] = {}
        self._to_save: list[tuple[Durable, Callable[[], object]]] = []

    def __contains__(self, session: Durable) -> bool:
        """Whether a session is being loaded."""
        return session.key in self._loading

    def __bool__(self) -> bool:
        return bool(self._loading or self._to_save)

    def begin(self, session: Durable, on_loaded: OnLoaded = _log_error) -> None:
        """Begin to load KV of a session that is not in memory; call `on_loaded` at the end."""
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

    def when_written(self, session: Durable, save: Callable[[], object]) -> None:
        """Call a function that saves a session when it has to wait for no file any more."""
        self._to_save.append((session, save))

    @property
    def pause_s(self) -> float:
        """Seconds until `go_on` should be called if there is nothing else to do."""
        return _PAUSE_S if all(loading.is_waiting for loading in self._loading.values()) else 0.0

    def go_on(self) -> None:
        """Do a step for each session whose file has been read, and save those that are written."""
        written = [one for one in self._to_save if not _is_being_written(one[0])]
        if written:  # one at a time, since others wait meanwhile
            self._to_save.remove(written[0])
            written[0][1]()
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
        """Stop loading, of which `on_loaded` gets an error, and save now what waits for it."""
        waiting, self._to_save = self._to_save, []
        for _, save in waiting:
            save()
        for key, loading in list(self._loading.items()):
            with contextlib.suppress(Exception):  # the engine may have failed
                loading.steps.close()
            self._end(key, AbortedError("The engine has stopped."))

    def _end(self, key: SessionKey, error: TokenDanceError | None) -> None:
        for on_loaded in self._loading.pop(key).on_loaded:
            on_loaded(error)
