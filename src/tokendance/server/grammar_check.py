"""Has grammars tried in another process before they come into this one; see `grammar_process`."""

import contextlib
import hashlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tokendance.server import grammar_process
from tokendance.server.errors import ApiError
from tokendance.server.settings import ServerSettings
from tokendance.units import format_bytes

log = logging.getLogger("tokendance.server")

# Grammars that are known to be good, by hash. The least recently used is forgotten.
_MAX_KNOWN = 4096
# Longest time that a request waits for others' grammars, and that the process takes to start.
_MAX_WAIT_S = 10.0
_START_S = 60.0
# Beyond the time after which the system ends a process that tries a grammar.
_GRACE_S = 2.0
_STEP_S = 0.02
# One level of a schema takes up to 10 kB. Here there is twice as much as where it was tried.
_LEVEL_BYTES = 2**15
_LEAST_STACK = 2**23


class GrammarChecker:
    """Tries grammars, each once for a tenant, in processes that may die of it. Thread-safe."""

    def __init__(self, settings: ServerSettings, tokenizer: Callable[[], dict[str, Any]]) -> None:
        """Prepare to try grammars of a tokenizer.

        Args:
            settings: with the limits.
            tokenizer: makes what `grammar_process.make_tokenizer` is given; called once.
        """
        self._seconds = settings.schema_timeout
        self._memory_bytes = settings.schema_memory_bytes
        self._stack_bytes = max(_LEAST_STACK, _LEVEL_BYTES * settings.max_schema_depth)
        self._tokenizer = tokenizer
        self._process: _Process | None = None
        self._process_lock = threading.Lock()
        self._lock = threading.Lock()  # for what is known, and the turns
        self._known: OrderedDict[bytes, None] = OrderedDict()
        self._places = threading.BoundedSemaphore(settings.schema_processes)
        # One grammar of a tenant at a time, so that it leaves places to others.
        self._turns: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    @property
    def stack_bytes(self) -> int:
        """Stack on which a grammar that was found good may be compiled."""
        return 2 * self._stack_bytes

    def error_of(self, grammar: str, tenant: str) -> str | None:
        """What is wrong with a grammar; None if it may be compiled in this process.

        Raises:
            ApiError: 503 if the grammars of others took too long; 500 if none can be tried.
        """
        key = hashlib.sha256(f"{tenant}\0{grammar}".encode()).digest()
        if self._is_known(key):
            return None
        with self._turn(tenant):
            if self._is_known(key):  # by now: agents of a round ask for the same
                return None
            error = self._try(grammar)
            if error is None:
                self._note(key)
        return error

    def _is_known(self, key: bytes) -> bool:
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
            return key in self._known

    def _note(self, key: bytes) -> None:
        with self._lock:
            self._known[key] = None
            if len(self._known) > _MAX_KNOWN:
                self._known.popitem(last=False)

    def close(self) -> None:
        """End the process; it is started again if it is needed."""
        with self._process_lock:
            self._drop_process()

    def start(self) -> None:
        """Start the process, so that the first who needs it does not wait."""
        with self._process_lock:
            self._ready_process()

    @contextmanager
    def _turn(self, tenant: str) -> Iterator[None]:
        with self._lock:
            turn = self._turns[tenant]
        with contextlib.ExitStack() as stack:
            for one in (turn, self._places):
                if not one.acquire(timeout=_MAX_WAIT_S):
                    message = "Too many schemas are being checked. Ask again in a moment."
                    raise ApiError(503, message, headers={"Retry-After": "5"})
                stack.callback(one.release)
            yield

    def _try(self, grammar: str) -> str | None:
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                self._send_handle(theirs)
            ours.settimeout(self._seconds + _GRACE_S)
            begun_s = time.monotonic()
            try:
                limits = {"seconds": self._seconds, "memory_bytes": self._memory_bytes}
                limits |= {"stack_bytes": self._stack_bytes, "step_seconds": _STEP_S}
                grammar_process.send(ours, {"grammar": grammar, **limits})
                error: str | None = grammar_process.receive(ours)["error"]
            except (OSError, EOFError):
                limit = f"{format_bytes(self._memory_bytes)} (--schema-memory)"
                if time.monotonic() - begun_s >= self._seconds:  # its own clock ended it
                    limit = f"{self._seconds:g} s (--schema-timeout)"
                return f"It takes more than {limit} to compile."
        return error

    def _send_handle(self, connection: socket.socket) -> None:
        """Have a process forked that reads from a socket."""
        with self._process_lock:
            for _ in range(2):
                process = self._ready_process()
                with contextlib.suppress(OSError):
                    socket.send_fds(process.control, [b"\0"], [connection.fileno()])
                    return
                log.error("the process that tries schemas has ended, and is started again")
                self._drop_process()
        raise ApiError(500, "Schemas cannot be checked.")

    def _ready_process(self) -> "_Process":
        if self._process is None:
            self._process = _Process(self._tokenizer())
        return self._process

    def _drop_process(self) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None


class _Process:
    """The process from which others are forked."""

    def __init__(self, tokenizer: dict[str, Any]) -> None:
        """Start it, and wait until it has read the tokenizer.

        Raises:
            ApiError: 500 if it does not start.
        """
        self.control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", grammar_process.__file__],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                # An arena of each thread grows by a page at a time, which takes far longer.
                env=os.environ | {"MALLOC_ARENA_MAX": "1"},
            )
        self.control.settimeout(_START_S)
        try:
            grammar_process.send(self.control, tokenizer)
            grammar_process.receive(self.control)
        except (OSError, EOFError) as error:
            self.close()
            raise ApiError(500, "Schemas cannot be checked: no process starts.") from error

    def close(self) -> None:
        """End it."""
        self.control.close()
        self._process.kill()
        self._process.wait()
