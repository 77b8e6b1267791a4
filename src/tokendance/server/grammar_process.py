"""Tries grammars in processes of their own, which may run out of stack, memory or time.

    python -P grammar_process.py    (its standard input is a socket of the server)

The server's process sends what this one needs to know of the tokenizer, once. When it is told
"ready", it sends one end of a new socket for each grammar. A process is forked for it, which knows
the tokenizer already and nothing of any other grammar: it reads the grammar from that socket,
compiles it, follows it for some tokens, and writes what it has found. If it dies, the socket ends
without an answer.

This file is run as a script and imports nothing of ours, so that the process is small and starts
quickly. `grammar_check.py` is the server's side.
"""

import contextlib
import json
import os
import random
import resource
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import llguidance

Result = TypeVar("Result")

# How far a grammar is followed, at random.
_STEPS = 48
_ALLOWED = b"\xc8"  # of a byte for each token, as llguidance writes them
# Memory of a lexer: 1 to 2 kB for each of its states.
_MAX_LEXER_STATES = 50_000
_MOST_ERROR = 300
_LENGTH = struct.Struct("!I")


def make_tokenizer(given: dict[str, Any]) -> "llguidance.LLTokenizer":
    """The tokenizer of a model.

    Args:
        given: its `spec`, JSON of tokenizers, the number of tokens `n_vocab`, and those that end an
            answer, `eos_token`.

    Raises:
        ValueError: if it cannot be read.
    """
    return llguidance.LLTokenizer(
        given["spec"], n_vocab=given["n_vocab"], eos_token=given["eos_token"]
    )


def make_matcher(tokenizer: "llguidance.LLTokenizer", grammar: str) -> "llguidance.LLMatcher":
    """Compile a grammar, within limits that are the same in all processes; see `error_of`.

    Needs stack for each level of a schema, and ends the process where there is not enough.
    """
    limits = llguidance.LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)
    return llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)


def error_of(matcher: "llguidance.LLMatcher") -> str | None:
    """Why a grammar has failed, if it has, in one line."""
    if not matcher.is_error():
        return None
    # What is between these lines shows the pattern, and what follows them the whole grammar.
    first, *others = matcher.get_error().replace("<non-verbose/>", "").splitlines()
    error = " ".join([first, *[line for line in others if line.startswith("error: ")]]).strip()
    if "Current row has" in error:  # what llguidance advises is for those who write grammars
        return "An object has too many optional properties, or a place too many alternatives."
    return f"{error[:_MOST_ERROR].rstrip('.')}."


def on_stack(stack_bytes: int, work: Callable[[], Result]) -> Result:
    """Do something on a thread of its own that has so much stack, and return what it returns."""
    done: Future[Result] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    with _stack_size:
        before = threading.stack_size(stack_bytes)
        try:
            threading.Thread(target=run, name="grammar").start()
        finally:
            threading.stack_size(before)
    return done.result()


_stack_size = threading.Lock()  # it is one for the whole process


def send(connection: socket.socket, document: Any) -> None:
    """Write a JSON document to a socket, its length first."""
    data = json.dumps(document).encode()
    connection.sendall(_LENGTH.pack(len(data)) + data)


def receive(connection: socket.socket) -> Any:
    """Read a JSON document from a socket.

    Raises:
        EOFError: if the socket ends before.
        TimeoutError: if the socket has a timeout, and it is over.
    """
    (length,) = _LENGTH.unpack(_receive_bytes(connection, _LENGTH.size))
    return json.loads(_receive_bytes(connection, length))


def _receive_bytes(connection: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = connection.recv(min(count - len(data), 2**20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


# -- the process ------------------------------------------------------------------------------


def main() -> None:
    """Fork a process for each grammar, until the server's end of the socket is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which closes it
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for these processes
    server = socket.socket(fileno=sys.stdin.fileno())
    with contextlib.suppress(EOFError):
        tokenizer = make_tokenizer(receive(server))
        send(server, "ready")
        while True:
            _, handles, _, _ = socket.recv_fds(server, 1, 1)
            if not handles:
                return
            with socket.socket(fileno=handles[0]) as connection:
                if os.fork() == 0:
                    server.close()
                    _answer(tokenizer, connection)


def _answer(tokenizer: "llguidance.LLTokenizer", connection: socket.socket) -> None:
    """Try one grammar, and end the process."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # for its last words
        given = receive(connection)
        _limit(given["seconds"], given["memory_bytes"] + given["stack_bytes"])

        def work() -> str | None:
            matcher = make_matcher(tokenizer, given["grammar"])
            return error_of(matcher) or _follow(matcher, given["step_seconds"])

        send(connection, {"error": on_stack(given["stack_bytes"], work)})
    finally:
        os._exit(0)


def _limit(seconds: float, memory_bytes: int) -> None:
    """Have the system end this process after so long, or when it takes so much more memory."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    with contextlib.suppress(OSError, ValueError):  # not every system says, or limits
        with open("/proc/self/statm") as statm:
            size = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + memory_bytes, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _follow(matcher: "llguidance.LLMatcher", step_seconds: float) -> str | None:
    """What is wrong with a grammar along one of its answers."""
    chooser = random.Random(0)
    for _ in range(_STEPS):
        begun = time.thread_time()
        allowed = matcher.compute_logit_bias()
        token = allowed.find(_ALLOWED, chooser.randrange(len(allowed)))
        if token < 0:
            token = allowed.find(_ALLOWED)
        if not matcher.is_stopped() and token >= 0:
            matcher.consume_token(token)
        if error := error_of(matcher):
            return error
        took = time.thread_time() - begun
        if took > step_seconds:
            return f"One token takes {1000 * took:.0f} ms, and may take {1000 * step_seconds:.0f}."
        if matcher.is_stopped() or token < 0:
            return None
    return None


if __name__ == "__main__":
    main()
