"""Ctrl-C while modules are imported, which takes seconds: a word, and the end."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130
"""Exit code after an interrupt: 128, and the number of the signal."""


@contextmanager
def importing() -> Iterator[None]:
    """End the process at once if it is interrupted meanwhile.

    A KeyboardInterrupt could come up anywhere in the code of others then, some of which prints it
    or makes something else of it. Nothing is open yet that would have to be closed.
    """
    default = signal.getsignal(signal.SIGINT)
    if default is not signal.default_int_handler or not _is_main():  # somebody sees to it
        yield
        return
    signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, default)


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()


def _end(*_: object) -> None:
    os.write(2, b"tokendance: Interrupted.\n")
    os._exit(INTERRUPTED)
