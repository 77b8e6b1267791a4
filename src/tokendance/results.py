"""Files of results: written whole or not at all, in UTF-8, and tried before the work begins.

A file gets its content under a temporary name beside it, and then its own, so whatever happens the
old file or the new one is there. Devices, pipes and this process's own streams, such as
/dev/stdout, are written to as they are.
"""

import contextlib
import errno
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokendance.errors import ConfigError

_TRIAL = b"\n" * 4096  # on a full disk there is no room for it


def check_writable(path: Path, advice: str) -> None:
    """Find out that results can be written before the work, not after it. Leaves nothing.

    Args:
        path: of the file.
        advice: what to do if it cannot be written; a sentence.

    Raises:
        ConfigError: if it cannot be written.
    """
    with _errors_told(path, advice):
        if _is_special(path):
            _try_special(path)
            return
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        with _temporary_beside(path) as (handle, _):
            _write(handle, _TRIAL)


def write_result(path: Path, text: str, advice: str) -> None:
    """Write a file of results in place of what is there; where a link leads, if it is one.

    Args:
        path: of the file.
        text: its content. Half a character is written as JSON escapes it.
        advice: what to do if it cannot be written; a sentence.

    Raises:
        ConfigError: if it cannot be written; what was there before still is.
    """
    content = text.encode("utf-8", "backslashreplace")
    with _errors_told(path, advice):
        if _is_special(path):
            with _opened_special(path) as handle:
                _write(handle, content)
        else:
            with _temporary_beside(path) as (handle, temporary):
                _write(handle, content)
                os.fsync(handle)
                try:
                    temporary.replace(_target(path))
                except OSError:  # it is mounted, or another user's in a folder of all
                    path.write_bytes(content)


@contextmanager
def _errors_told(path: Path, advice: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}. {advice}") from error


def _write(handle: int, content: bytes) -> None:
    while content:
        content = content[os.write(handle, content) :]


def _target(path: Path) -> Path:
    """Where a path leads in the end."""
    try:
        return path.resolve()
    except RuntimeError as error:  # in place of what the system says of links in a circle
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from error


@contextmanager
def _temporary_beside(path: Path) -> Iterator[tuple[int, Path]]:
    """A new file beside another, with its permissions; removed at the end if it is still there."""
    target = _target(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.fchmod(handle, stat.S_IMODE(target.stat().st_mode))
        yield handle, temporary
    finally:
        os.close(handle)
        temporary.unlink(missing_ok=True)


# -- what is no plain file ------------------------------------------------------------------------


def _is_special(path: Path) -> bool:
    """Whether a path leads to something that cannot be replaced by a file."""
    return _own_stream(path) is not None or (path.exists() and not path.is_file())


def _own_stream(path: Path) -> int | None:
    """The handle of this process's output or errors, if a path leads to what they lead to."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, AttributeError):  # not all have handles
            if os.path.samestat(path.stat(), os.fstat(stream.fileno())):
                return stream.fileno()
    return None


@contextmanager
def _opened_special(path: Path) -> Iterator[int]:
    handle = _own_stream(path)
    if handle is not None:
        sys.stdout.flush()
        yield handle
        return
    handle = os.open(path, os.O_WRONLY | os.O_NOCTTY)
    try:
        yield handle
    finally:
        os.close(handle)


def _try_special(path: Path) -> None:
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    if path.is_fifo():
        return  # opening it would wait for a reader
    with _opened_special(path) as handle:
        if path.is_char_device() and not os.isatty(handle):
            _write(handle, b"\n")  # /dev/full lets itself be opened; a document may begin with this
