"""How soon the interpreter's lock changes hands between threads that want it.

A pass of the model gives the lock away at each of some hundred calls of torch, and then waits for
it while the event loop computes, or another thread that reads requests. They may keep it for 5 ms,
CPython's switch interval. For one key alone that is best: what came first is done first. But while
one key floods, it makes each pass of another's answer several times as long (docs/log.md).
"""

import sys

_USUAL_S = sys.getswitchinterval()
_QUICK_S = min(_USUAL_S, 0.0002)


def switch_quickly(quickly: bool) -> None:
    """Let a thread that computes keep the lock for 0.2 ms when another wants it, or as usual.

    It is the whole process's setting.
    """
    sys.setswitchinterval(_QUICK_S if quickly else _USUAL_S)
