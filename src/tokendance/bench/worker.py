"""Another engine in a process of its own, driven by JSON lines over pipes.

Engines that ours is measured against want other versions of what we use, so they are not imported
here: `worker_main.py` runs in their environment, reads requests and writes replies, one JSON object
a line. One engine is one process, in a session of its own, so that nothing of it is
left when it is closed.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokendance.errors import BaselineError

WORKER_MAIN = Path(__file__).with_name("worker_main.py")

_TAIL_LINES = 15
# How long an engine may take to end by itself before it is killed, in seconds.
_GRACE_S = 10.0


@dataclass(frozen=True, slots=True)
class Environment:
    """Where another engine is looked for.

    Attributes:
        engine: its name, for messages.
        variable: of the process's environment, that may name a Python that has the engine.
        folder: of the environment that `make` makes in a checkout.
        target: of that `make`.
    """

    engine: str
    variable: str
    folder: str
    target: str

    @property
    def how_to_install(self) -> str:
        """What to do where there is none."""
        return (
            f"Run `make {self.target}` in a checkout of TokenDance, or set {self.variable} to the"
            f" Python of an environment that has {self.engine}."
        )

    def find(self) -> Path | None:
        """Find the Python of the environment that has the engine; None if there is none.

        It is the one that `variable` names, or that of `folder` in the current folder or in the
        checkout that this package lies in.

        Raises:
            BaselineError: The variable names no file.
        """
        if named := os.environ.get(self.variable):
            if not Path(named).is_file():
                raise BaselineError(
                    f"{self.variable} names {named}, and there is no such file."
                    " Correct it, or unset it."
                )
            return Path(named).absolute()
        # From src/tokendance/bench/worker.py up to the root of the checkout.
        for folder in (Path.cwd(), Path(__file__).absolute().parents[3]):
            # The link is not resolved: it is by its place that Python knows its environment.
            python = folder / self.folder / "bin" / "python"
            # `make` leaves the mark when all is installed.
            if python.is_file() and (folder / self.folder / ".installed").is_file():
                return python
        return None

    def require(self) -> Path:
        """What `find` finds.

        Raises:
            BaselineError: There is none; it says how to install it.
        """
        if (python := self.find()) is None:
            raise BaselineError(f"{self.engine} is not installed. {self.how_to_install}")
        return python


class Worker:
    """A process of an engine's environment that answers requests.

    Args:
        environment: of the engine.
        python: of that environment.
        scripts: what this Python runs: `worker_main.py` and the engine's script.
        variables: of the process's environment.

    Raises:
        BaselineError: The Python does not run.
    """

    def __init__(
        self,
        environment: Environment,
        python: Path,
        scripts: Sequence[Path],
        variables: Mapping[str, str],
    ) -> None:
        self._engine = environment.engine
        # A file takes whatever the engine prints, without a thread that has to empty a pipe.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._unread = b""
        try:
            self._process = subprocess.Popen(
                # Without -P, Python would take a file beside the script for the engine's package.
                [python, "-P", *scripts],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=dict(variables),
                start_new_session=True,
            )
        except OSError as error:
            self._stderr.close()
            raise BaselineError(
                f"{python} could not be run: {error}. {environment.how_to_install}"
            ) from error

    @property
    def pid(self) -> int:
        """Of the process, and of its session."""
        return self._process.pid

    def ask(self, request: Mapping[str, object], timeout_s: float) -> dict[str, Any]:
        """Send one request and wait for its reply; whatever goes wrong closes the engine.

        Raises:
            BaselineError: The engine failed, died, or did not answer in time.
        """
        if self._process.stdin is None or self._process.stdin.closed:
            raise BaselineError(f"{self._engine} is closed. Start another one.")
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._read_line(time.monotonic() + timeout_s)
        except BrokenPipeError as error:
            raise self.failed("died", ends=True) from error
        except TimeoutError as error:
            raise self.failed(
                f"did not answer {request['op']!r} within {timeout_s:g} seconds"
            ) from error
        except BaseException:
            # Ctrl-C, most likely. What the engine computes now is of no use to anybody.
            self.close(0)
            raise
        if not line:
            raise self.failed("died", ends=True)
        try:
            reply = json.loads(line)
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            raise self.failed(f"gave a reply that cannot be read: {line[:200]!r}")
        if "error" in reply:
            raise self.failed(f"failed: {reply['error']}", ends=True)
        return reply

    def _read_line(self, deadline: float) -> bytes:
        """Read a line, b"" at the end of the pipe; a TimeoutError at a time of the clock."""
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._unread:
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            chunk = os.read(pipe, 1 << 16)
            if not chunk:
                # Half a line is a reply that was cut off by its writer's death.
                return b""
            self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def failed(self, what: str, *, ends: bool = False) -> BaselineError:
        """Close the engine and return the error to raise, with the last lines of its stderr."""
        if ends:  # by itself, and it may say more until then
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE_S)
        status = self._process.poll()
        if status is not None:
            what += f" (exit status {status})"
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]
        self.close(0)
        said = "\n".join(lines) or "(nothing)"
        return BaselineError(f"{self._engine} {what}. See the last lines that it printed:\n{said}")

    def close(self, grace_s: float = _GRACE_S) -> None:
        """End the process, if need be after a time, and all that it started; may come again."""
        if self._stderr.closed:
            return
        try:
            assert self._process.stdin is not None
            # The end of its input tells the worker to end, so that the engine can tidy up.
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            if grace_s:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(grace_s)
        finally:
            # The session outlives its leader if the engine left processes behind.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._stderr.close()


def inherited_variables() -> dict[str, str]:
    """Variables of this process's environment, but those by which Python finds our packages."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }
