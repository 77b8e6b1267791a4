"""Loads sessions from disk and saves them, step by step, while the engine runs other requests.

The engine's thread waits for no disk: files are read and written, and the index is changed, on
other threads (`tier/steps.py`), and a session goes on when that is done. What its steps take on the
engine's thread is bounded, too, for all sessions together between two passes.

Any exception becomes an error of the session whose files caused it, and others are served all the
same. All of it is called on the engine's thread.
"""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from tokendance.disk.records import SessionKey
from tokendance.errors import AbortedError, StoreError, TokenDanceError
from tokendance.tier.loader import Restored
from tokendance.tier.steps import Steps, finish

log = logging.getLogger("tokendance.server")

# Time between looks at files that are being read, if there is nothing to compute.
_PAUSE_S = 0.002
# Of the steps of all sessions between two passes, but for the last of them.
_STEPS_S = 0.01

# Called when a session is loaded, or with the error if it cannot be.
OnLoaded = Callable[[TokenDanceError | None], None]
# Set when a session is on disk, to None, or to the error if it cannot be.
Saved = Future[TokenDanceError | None]


class Durable(Protocol):
    """What a `Session` and a `KeptChat` have in common."""

    @property
    def key(self) -> SessionKey | None:
        """Under which it is stored."""

    def restoring(self) -> Steps[Restored | None]:
        """Load KV that is not in memory; None if nothing is stored."""

    def go_on_writing(self) -> bool:
        """Whether files of it are still being written; `saving` would wait for them."""

    def saving(self) -> Steps[None]:
        """Make it durable as it is at the first step."""


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


def _log_error(error: TokenDanceError | None) -> None:
    if error is not None:
        log.warning("A session cannot be read, and is computed again: %s", error)


@dataclass(slots=True)
class _UnderWay:
    """A session that is being loaded or saved: the steps left, and the job that they wait for."""

    steps: Steps[Any]
    action: str
    job: Future[Any] | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether the next step has to wait."""
        return self.job is not None and not self.job.done()

    def go_on(self) -> bool:
        """Do the next step; return whether that was the last.

        Raises:
            TokenDanceError: if it failed; there are no other steps then.
        """
        with storage_errors(self.action):
            self.job = next(self.steps, None)
        return self.job is None

    def finish(self) -> None:
        """Do all that is left, and wait for the disk."""
        with storage_errors(self.action):
            finish(self.steps)


@dataclass(slots=True)
class _Loading:
    """A session that is being loaded, and who waits for it."""

    under_way: _UnderWay
    on_loaded: list[OnLoaded]


def _is_being_written(session: Durable) -> bool:
    try:
        return session.go_on_writing()
    except Exception:  # what is left is written when it is saved
        log.exception("a session could not be written in the background")
        return False


class Loader:
    """All sessions that are being loaded, or wait to be saved; one at a time is saved."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Begin without any; a test may have a clock of its own."""
        self._clock = clock
        self._loading: dict[SessionKey, _Loading] = {}
        self._to_save: deque[tuple[Durable, Saved]] = deque()
        self._saving: tuple[_UnderWay, Saved] | None = None

    def __contains__(self, session: Durable) -> bool:
        """Whether a session is being loaded."""
        return session.key in self._loading

    def __bool__(self) -> bool:
        return bool(self._loading or self._to_save or self._saving)

    def begin(self, session: Durable, on_loaded: OnLoaded = _log_error) -> None:
        """Begin to load KV of a session that is not in memory; call `on_loaded` at the end."""
        assert session.key is not None
        if session in self:
            self._loading[session.key].on_loaded.append(on_loaded)
        else:
            steps = _UnderWay(session.restoring(), "read")
            self._loading[session.key] = _Loading(steps, [on_loaded])

    def save(self, session: Durable, saved: Saved | None = None) -> None:
        """Save a session when no file of it is being written any more.

        Not if `saved` has been cancelled by then.
        """
        self._to_save.append((session, Future() if saved is None else saved))

    @property
    def pause_s(self) -> float:
        """Seconds until `go_on` should be called if there is nothing else to do."""
        under_way = [loading.under_way for loading in self._loading.values()]
        if self._saving is not None:
            under_way.append(self._saving[0])
        return _PAUSE_S if all(one.is_waiting for one in under_way) else 0.0

    def go_on(self) -> None:
        """Do steps of the sessions that need not wait, as many as there is time for."""
        until = self._clock() + _STEPS_S
        self._save_next()
        for key in list(self._loading):
            while key in self._loading and not self._loading[key].under_way.is_waiting:
                self._load_next(key)
                if self._clock() >= until:
                    return

    def _load_next(self, key: SessionKey) -> None:
        try:
            if self._loading[key].under_way.go_on():
                self._end(key, None)
        except TokenDanceError as error:
            self._end(key, error)

    def _save_next(self) -> None:
        """Do the next step of the session that is being saved, or of the next one that can be."""
        if self._saving is None:
            self._saving = self._next_to_save()
        if self._saving is None or self._saving[0].is_waiting:
            return
        steps, saved = self._saving
        try:
            if steps.go_on():
                self._saving = None
                saved.set_result(None)
        except TokenDanceError as error:
            self._saving = None
            saved.set_result(_not_saved(error))

    def _next_to_save(self) -> tuple[_UnderWay, Saved] | None:
        """Take out the first of those that wait which has all its files written."""
        for session, saved in list(self._to_save):
            if _is_being_written(session):
                continue
            self._to_save.remove((session, saved))
            if saved.set_running_or_notify_cancel():
                return _UnderWay(session.saving(), "stored"), saved
        return None

    def stop(self) -> None:
        """Stop loading, of which `on_loaded` gets an error, and save now what waits for it."""
        waiting = [self._saving] if self._saving is not None else []
        waiting += [
            (_UnderWay(session.saving(), "stored"), saved)
            for session, saved in self._to_save
            if saved.set_running_or_notify_cancel()
        ]
        self._saving = None
        self._to_save.clear()
        for key, loading in list(self._loading.items()):
            with contextlib.suppress(Exception):  # the engine may have failed
                loading.under_way.steps.close()
            self._end(key, AbortedError("The engine has stopped."))
        for steps, saved in waiting:
            try:
                steps.finish()
                saved.set_result(None)
            except TokenDanceError as error:
                saved.set_result(_not_saved(error))

    def _end(self, key: SessionKey, error: TokenDanceError | None) -> None:
        for on_loaded in self._loading.pop(key).on_loaded:
            on_loaded(error)


def _not_saved(error: TokenDanceError) -> TokenDanceError:
    log.warning("A session is not on disk; it goes on in memory: %s", error)
    return error
