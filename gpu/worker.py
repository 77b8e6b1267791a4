"""The process in which parts run. A kernel that goes astray ends this process, and no other."""

import gc
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from tokendance.attention.names import AttentionName

_LONGEST_ERROR = 1500  # characters of a traceback, its end


@dataclass(frozen=True, slots=True)
class Job:
    """A part that is to be done.

    Attributes:
        part: its name.
        device: as torch names it.
        tiny: every line in seconds, and figures that mean nothing.
        attention: the backend that is measured.
        out: folder for what is too long for a line of figures.
        seconds: it may take; what it leaves out for lack of time, it says.
    """

    part: str
    device: str
    tiny: bool
    attention: AttentionName
    out: Path
    seconds: float


Figures = dict[str, Any]
Parts = Mapping[str, Callable[[Job], Iterator[Figures]]]


def load_parts() -> Parts:
    """Import the parts, and torch with them."""
    from gpu.parts import PARTS

    return PARTS


class Worker:
    """Runs jobs in a process; in another after one has failed, or had to be ended.

    After a failure nothing is known of the device's state, as that process sees it.
    """

    def __init__(self, load: Callable[[], Parts] = load_parts) -> None:
        """Start a process.

        Args:
            load: called there before the first job, for what it can run.
        """
        self._context = get_context("spawn")  # a GPU does not survive a fork
        self._load = load
        self._connection, self._process = self._start()

    def _start(self) -> tuple[Connection, SpawnProcess]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self._load), daemon=True)
        process.start()
        theirs.close()
        return ours, process

    def run(self, job: Job, limit_s: float) -> Figures:
        """Run a job, for so many seconds at most.

        Returns:
            Its figures, as far as it has found any, with a status: ok, or failed and why.
        """
        found: Figures = {"status": "ok"}
        deadline = time.monotonic() + limit_s
        with suppress(OSError):  # it is dead already, which is found out below
            self._connection.send(job)
        while True:
            message = self._receive(deadline)
            if message is None:
                return found
            if isinstance(message, str):
                break
            found |= message
        self.end()
        self._connection, self._process = self._start()
        return found | {"status": "failed", "why": message}

    def _receive(self, deadline: float) -> Figures | str | None:
        """What the process says; or what is to be said of it."""
        if not self._connection.poll(max(0.0, deadline - time.monotonic())):
            return "it took too long"
        try:
            message: Figures | str | None = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            return f"its process ended with status {self._process.exitcode}"
        return message

    def end(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.join()
        self._connection.close()


def _serve(connection: Connection, load: Callable[[], Parts]) -> None:
    """Run the jobs that come over a connection until it is closed.

    For each, figures go back as they are found, a dictionary each time; then None, or a text that
    says how it failed.
    """
    parts: Parts = {}
    while True:
        try:
            job: Job = connection.recv()
        except EOFError:
            return
        try:
            parts = parts or load()
            for figures in parts[job.part](job):
                connection.send(figures)
        except Exception:
            connection.send(traceback.format_exc()[-_LONGEST_ERROR:])
        else:
            connection.send(None)
        gc.collect()  # engines of this part, with their memory
