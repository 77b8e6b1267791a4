"""Where a thread was in its long pauses: its stack, looked at all the time by another thread.

    #0  ..............................................  a look, every few milliseconds
                    <------ pause ------>
                    #1      #2    #2   #3               what the report is made of

A look is a stack and the time that the thread has computed so far, so that a frame that computes
can be told from one that waits. Nobody can look while one C function keeps the interpreter's lock:
such a gap counts for the stack that is seen when it ends, and collections of garbage, which are
the longest of these, are noted by themselves.
"""

import gc
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

_EVERY_S = 0.004
_NUM_LOOKS = 500
_NUM_SHOWN = 4
_DEPTH = 9


@dataclass(frozen=True, slots=True)
class _Look:
    """What a thread was at: by `time.perf_counter`, seconds that it has computed, its frames."""

    time_s: float
    computed_s: float
    frames: tuple[str, ...]


class Stacks:
    """Looks at some threads of this process."""

    def __init__(self) -> None:
        self._looks: dict[int, deque[_Look]] = {}
        self._collections: deque[tuple[float, float, int, int]] = deque(maxlen=200)
        self._begun_s = 0.0
        self._is_over = threading.Event()

    @contextmanager
    def looking(self, names: set[str]) -> Iterator["Stacks"]:
        """Look at all threads of these names meanwhile."""
        gc.callbacks.append(self._note_collection)
        thread = threading.Thread(target=self._look_on, args=(names,), name="stacks", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._is_over.set()
            thread.join()
            gc.callbacks.remove(self._note_collection)

    def _note_collection(self, phase: str, info: dict[str, int]) -> None:
        now = time.perf_counter()
        if phase == "start":
            self._begun_s = now
        else:
            seconds, thread = now - self._begun_s, threading.get_ident()
            self._collections.append((now, seconds, info["generation"], thread))

    def _look_on(self, names: set[str]) -> None:
        while not self._is_over.wait(_EVERY_S):
            frames = sys._current_frames()
            for thread in threading.enumerate():
                if thread.name not in names or thread.ident not in frames:
                    continue
                clock = time.pthread_getcpuclockid(thread.ident)
                look = _Look(
                    time.perf_counter(), time.clock_gettime(clock), _names(frames[thread.ident])
                )
                looks = self._looks.setdefault(thread.ident, deque(maxlen=_NUM_LOOKS))
                looks.append(look)

    def report(self, begin_s: float, end_s: float) -> str:
        """Where the calling thread was between two times, most computing first."""
        thread = threading.get_ident()
        waited: defaultdict[tuple[str, ...], float] = defaultdict(float)
        computed: defaultdict[tuple[str, ...], float] = defaultdict(float)
        before: _Look | None = None
        for look in list(self._looks.get(thread, ())):
            if before is not None and begin_s <= look.time_s <= end_s + _EVERY_S:
                waited[look.frames] += look.time_s - max(before.time_s, begin_s)
                computed[look.frames] += look.computed_s - before.computed_s
            before = look
        most = sorted(computed, key=computed.__getitem__, reverse=True)[:_NUM_SHOWN]
        lines = [
            f"  {1000 * waited[frames]:.0f} ms, computing {1000 * computed[frames]:.0f}: "
            + " < ".join(frames)
            for frames in most
        ]
        lines += [
            f"  {1000 * seconds:.0f} ms: garbage of generation {generation}"
            + (" on another thread" if collector != thread else "")
            for time_s, seconds, generation, collector in list(self._collections)
            if begin_s <= time_s <= end_s and seconds > 0.001
        ]
        return "\n".join(lines)


def _names(frame: FrameType | None) -> tuple[str, ...]:
    """Functions of a stack and the lines they are at, the innermost first."""
    names: list[str] = []
    while frame is not None and len(names) < _DEPTH:
        names.append(f"{frame.f_code.co_qualname}:{frame.f_lineno}")
        frame = frame.f_back
    return tuple(names)
