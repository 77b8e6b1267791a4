"""What a serving process does about its memory, each in a process of its own."""

import os
import platform
import subprocess
import sys

import pytest

glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc",
    reason="other C libraries manage memory otherwise",
)

# So many threads are there at once, and each takes some memory; then malloc counts its arenas.
_COUNT_ARENAS = """
import ctypes, threading
from tokendance.server.malloc import limit_arenas
limit_arenas()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
together = threading.Barrier(8)
def take():
    together.wait()
    libc.malloc(ctypes.c_size_t(1000))
    together.wait()
threads = [threading.Thread(target=take) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
libc.fdopen.restype = ctypes.c_void_p
out = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, out)
libc.fflush(out)
"""

# Of the pieces of memory that are taken the last is kept, and all before it are freed.
_FREE_BEFORE_A_PIECE = """
import anyio, anyio.from_thread, ctypes
from pathlib import Path
from tokendance.server import malloc
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
def resident_pages():
    return int(Path("/proc/self/statm").read_text().split()[1])
blocks = [libc.malloc(ctypes.c_size_t(50_000)) for _ in range(1000)]
for block in blocks: ctypes.memset(block, 1, 50_000)
for block in blocks[:-1]: libc.free(block)
async def once():
    trim = malloc._glibc_function("malloc_trim")
    with anyio.CancelScope() as scope:
        def trim_and_end(pad):
            trim(pad)
            anyio.from_thread.run_sync(scope.cancel)
        malloc._glibc_function = lambda _: trim_and_end
        await malloc.give_back_memory(every_s=0.0)
anyio.run(anyio.sleep, 0)  # imports what it needs
before = resident_pages()
anyio.run(once)
print(before - resident_pages())
"""


def num_arenas(environment: dict[str, str]) -> int:
    command = [sys.executable, "-c", _COUNT_ARENAS]
    clean = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    done = subprocess.run(command, env=clean | environment, capture_output=True, check=True)
    return done.stdout.count(b"<heap nr=")


@glibc
def test_threads_share_arenas_unless_told_otherwise() -> None:
    assert num_arenas({}) == 2
    assert num_arenas({"MALLOC_ARENA_MAX": "5"}) == 5
    assert num_arenas({"GLIBC_TUNABLES": "glibc.malloc.arena_max=5"}) == 5


@glibc
def test_what_is_free_goes_back_to_the_system() -> None:
    command = [sys.executable, "-c", _FREE_BEFORE_A_PIECE]
    done = subprocess.run(command, capture_output=True, check=True)
    assert int(done.stdout) * os.sysconf("SC_PAGE_SIZE") > 0.9 * 1000 * 50_000


def test_what_is_there_is_not_collected_for_a_while() -> None:
    script = """
import gc
from tokendance.server.malloc import objects_frozen
with objects_frozen():
    assert gc.get_freeze_count() > 1000
    assert len(gc.get_objects()) < 1000
assert gc.get_freeze_count() == 0
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_garbage_is_collected_when_there_is_nothing_to_do() -> None:
    script = """
import anyio, gc, weakref
from tokendance.server import malloc
class Circle:
    def __init__(self): self.itself = self
async def run(num_open, num_begun=0):
    circle = Circle()
    gone = weakref.ref(circle)
    for _ in range(10):
        gc.collect(1)  # what is not young any more is left to a full collection
    del circle
    looks = iter(range(20))
    with anyio.CancelScope() as scope:
        def activity():
            if gone() is None or (look := next(looks, None)) is None:
                scope.cancel()
                return 0, 1
            return look * num_begun, num_open
        await malloc.collect_when_idle(activity, every_s=0.0)
    return gone() is None
with malloc.objects_frozen():
    assert not anyio.run(run, 1)
    assert not anyio.run(run, 0, 1)  # short ones, which are over at each look
    assert anyio.run(run, 0)
assert not anyio.run(run, 0)  # it would look at all that was loaded
"""
    subprocess.run([sys.executable, "-c", script], check=True)
