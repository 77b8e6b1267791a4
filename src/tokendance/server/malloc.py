"""Keeps the memory of a long-running process flat."""

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
# As many collections of what is young before one of all: hours, mostly.
_YOUNG_COLLECTIONS = 10_000
# And so many, at least, before one of all when so many looks in a row have seen nothing to do.
_FEWEST_YOUNG_COLLECTIONS = 10
_IDLE_LOOKS = 5
_IDLE_S = 1.0


def limit_arenas() -> None:
    """Let all threads allocate from two arenas; to be called before threads are started.

    By default glibc's malloc makes up to eight arenas for each core, and each keeps megabytes of
    the largest request that one of its threads has read, so the process grows for a long time
    (docs/log.md). The GIL hardly lets two threads allocate at once anyway. Settings of arenas in
    the environment take precedence. Without glibc nothing happens.
    """
    is_set = "MALLOC_ARENA_MAX" in os.environ or _TUNABLE in os.environ.get("GLIBC_TUNABLES", "")
    mallopt = _glibc_function("mallopt")
    if mallopt is not None and not is_set:
        mallopt(_M_ARENA_MAX, _ARENAS)


async def give_back_memory(every_s: float = _GIVE_BACK_S) -> None:
    """Return free memory to the system each `every_s` seconds, until cancelled.

    By itself glibc's malloc returns free memory at the end of an arena only, not before a block
    that stays allocated. Each time locks an arena for some 10 ms, longer if more is free. Without
    glibc nothing happens.
    """
    trim = _glibc_function("malloc_trim")
    while trim is not None:
        await anyio.sleep(every_s)
        try:
            await anyio.to_thread.run_sync(trim, 0)
        except RuntimeError as error:  # no thread can be started
            log.warning("free memory could not be given back: %s", error)


def _glibc_function(name: str) -> Callable[..., int] | None:
    """A function that only glibc has; None with another C library."""
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):
        return None
    return function


@contextmanager
def objects_frozen() -> Iterator[None]:
    """Exempt all objects from garbage collection; to be entered when everything is loaded.

    Libraries leave some hundred thousand objects that are never freed. A full collection would
    look at each of them, and stop the server for 0.2 s. What is made later is collected as ever
    while it is young. But a busy server keeps some ten thousand objects that are no garbage, and
    would look at all of them again and again, for 20 to 80 ms; so that is done a thousand times as
    seldom as by default, and by `collect_when_idle`.
    """
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*before[:2], _YOUNG_COLLECTIONS)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


async def collect_when_idle(
    activity: Callable[[], tuple[int, int]], every_s: float = _IDLE_S
) -> None:
    """Collect all garbage when there was nothing to do for some looks, until cancelled.

    See `objects_frozen`; nothing happens where objects are not frozen, or few have grown old.
    `activity` is how many requests have ever begun, and how many are under way.
    """
    num_idle, num_before = 0, -1
    while True:
        await anyio.sleep(every_s)
        num_begun, num_open = activity()
        num_idle = num_idle + 1 if num_open == 0 and num_begun == num_before else 0
        num_before = num_begun
        _, _, num_young = gc.get_count()
        # Asking how many objects are frozen would go through all of them, for 40 ms.
        is_frozen = gc.get_threshold()[2] == _YOUNG_COLLECTIONS
        is_worth_it = is_frozen and num_young >= _FEWEST_YOUNG_COLLECTIONS
        if num_idle >= _IDLE_LOOKS and is_worth_it:
            gc.collect()
