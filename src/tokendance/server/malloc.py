"""How the memory of a process stays flat that serves for weeks."""

import ctypes
import gc
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import anyio
import anyio.to_thread

log = logging.getLogger("tokendance.server")

_M_ARENA_MAX = -8  # in malloc.h of glibc
_TUNABLE = "glibc.malloc.arena_max"
_ARENAS = 2
_GIVE_BACK_S = 30.0


def limit_arenas() -> None:
    """Have all threads take memory from a few arenas; to be called before any are started.

    Otherwise glibc's malloc makes up to eight for each core, and each keeps megabytes of the
    largest request that its threads have read: the process grows until all have met one
    (docs/log.md). Python's lock lets hardly two threads allocate at once anyway. What the
    environment says of arenas goes first. With another malloc than glibc's nothing happens.
    """
    is_set = "MALLOC_ARENA_MAX" in os.environ or _TUNABLE in os.environ.get("GLIBC_TUNABLES", "")
    mallopt = _glibc_function("mallopt")
    if mallopt is not None and not is_set:
        mallopt(_M_ARENA_MAX, _ARENAS)


async def give_back_memory(every_s: float = _GIVE_BACK_S) -> None:
    """Return free memory to the system again and again, until cancelled.

    By itself glibc's malloc returns what is free at the end of an arena, and not what lies before a
    block that stays for long. Each time takes some 10 ms, more where more is free, in which nobody
    else can allocate in the same arena. With another malloc nothing happens.
    """
    trim = _glibc_function("malloc_trim")
    while trim is not None:
        await anyio.sleep(every_s)
        try:
            await anyio.to_thread.run_sync(trim, 0)
        except RuntimeError as error:  # no more threads
            log.warning("free memory could not be given back: %s", error)


def _glibc_function(name: str) -> Callable[..., int] | None:
    """A function that glibc has beyond the standard; None on macOS, with musl, on Windows."""
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):
        return None
    return function


@contextmanager
def objects_frozen() -> Iterator[None]:
    """Exempt all objects from garbage collection; to be entered when everything is loaded.

    Libraries leave some hundred thousand objects that stay for good. A full collection looks at
    each of them, for 0.2 s, in the middle of somebody's round.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
