"""The standard streams of the command line, whatever they lead to."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tokendance.errors import ConfigError


class _ToldOutput:
    """Standard output that says in a sentence why it cannot be written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text.

        Raises:
            ConfigError: if it cannot be written.
            BrokenPipeError: if nobody reads it any more.
        """
        with _errors_told():
            return self._stream.write(text)

    def flush(self) -> None:
        """Write what waits; raises the same."""
        with _errors_told():
            self._stream.flush()


@contextmanager
def _errors_told() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ConfigError(
            f"Standard output cannot be written: {error.strerror}. Send it elsewhere."
        ) from error


@contextmanager
def standard_streams() -> Iterator[None]:
    """Let nothing that is printed meanwhile end in a traceback.

    What their encoding lacks is written as an escape. A `ConfigError` says why standard output
    cannot be written; a `BrokenPipeError` that nobody reads it is the caller's.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    stdout = sys.stdout
    if stdout is None:  # it was closed, and what is printed goes nowhere
        yield
        return
    sys.stdout = _ToldOutput(stdout)
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout = stdout
        for stream in (sys.stdout, sys.stderr):
            _drop_what_is_left(stream)


def _drop_what_is_left(stream: TextIO) -> None:
    """Let a stream that cannot be written lead nowhere: Python flushes it once more at its end."""
    try:
        stream.flush()
    except OSError:
        with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
