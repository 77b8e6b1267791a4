"""Sessions that are read from disk while the engine goes on."""

import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from tokendance.disk.records import SessionKey
from tokendance.errors import AbortedError, StoreError, TokenDanceError
from tokendance.tier.loader import Restoring

log = logging.getLogger("tokendance.server")

# Where all wait for the disk, and there is nothing to compute.
_PAUSE_S = 0.002


def _tell_nobody(error: TokenDanceError | None) -> None:
    if error is not None:
        log.warning("A session cannot be read, and is computed again: %s", error)


def _told(error: Exception) -> TokenDanceError:
    """What is wrong with one session is no reason to serve no other."""
    if isinstance(error, TokenDanceError):
        return error
    log.error("a session could not be read", exc_info=error)
    return StoreError("The session could not be read. The server's log says why.")


@dataclass(slots=True)
class _Reading:
    """A session that is being read.

    Attributes:
        steps: what is left to do.
        file: that was being read when it was last looked at.
        waiting: called at its end, with what was wrong.
    """

    steps: Restoring
    waiting: list[Callable[[TokenDanceError | None], None]]
    file: Future[Any] | None = None


class Readings:
    """All sessions that are being read. All methods are called on the engine's thread."""

    def __init__(self) -> None:
        """Begin with none."""
        self._readings: dict[SessionKey, _Reading] = {}

    def __contains__(self, key: SessionKey | None) -> bool:
        return key in self._readings

    def __bool__(self) -> bool:
        return bool(self._readings)

    def begin(
        self,
        key: SessionKey,
        restoring: Callable[[], Restoring | None],
        ended: Callable[[TokenDanceError | None], None] = _tell_nobody,
    ) -> None:
        """Begin to read a session; if it is being read already, wait with the others.

        Args:
            key: of the session.
            restoring: says how, or that there is nothing to read.
            ended: called at the end, with what was wrong.
        """
        if key in self._readings:
            self._readings[key].waiting.append(ended)
            return
        try:
            steps = restoring()
        except Exception as error:
            ended(_told(error))
            return
        if steps is None:
            ended(None)
        else:
            self._readings[key] = _Reading(steps, [ended])

    @property
    def pause_s(self) -> float:
        """How long nothing has to be done, if the engine has nothing to compute either."""
        files = [one.file for one in self._readings.values()]
        return _PAUSE_S if all(file is not None and not file.done() for file in files) else 0.0

    def go_on(self) -> None:
        """Do a step for each session whose file is there."""
        for key, one in list(self._readings.items()):
            if one.file is not None and not one.file.done():
                continue
            try:
                one.file = next(one.steps)
            except StopIteration:
                self._end(key, None)
            except Exception as error:
                self._end(key, _told(error))

    def stop(self) -> None:
        """Read no further; who waits is told."""
        for key, one in list(self._readings.items()):
            with contextlib.suppress(Exception):  # of an engine that has failed
                one.steps.close()
            self._end(key, AbortedError("The engine has stopped."))

    def _end(self, key: SessionKey, error: TokenDanceError | None) -> None:
        for ended in self._readings.pop(key).waiting:
            ended(error)
