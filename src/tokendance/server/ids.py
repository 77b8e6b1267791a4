"""Ids that nobody can guess."""

import secrets
from collections import deque

_NUM_BYTES = 12
# Drawn at once: each call of the system lets another thread have the interpreter, for as long as it
# may keep it.
_NUM_DRAWN = 256

_drawn: deque[str] = deque()


def new_id() -> str:
    """Return 24 hexadecimal digits, new each time. Thread-safe."""
    while True:
        try:
            return _drawn.popleft()
        except IndexError:
            digits = secrets.token_hex(_NUM_BYTES * _NUM_DRAWN)
            step = 2 * _NUM_BYTES
            _drawn.extend(digits[at : at + step] for at in range(0, len(digits), step))
