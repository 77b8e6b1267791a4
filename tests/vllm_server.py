"""Processes with vLLM in them: its own API server, or a script. Nothing of them is left behind."""

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import httpx

from tokendance.bench.vllm import VLLM_ENVIRONMENT, VLLMConfig, child_environment

SCENARIOS = Path(__file__).parent / "vllm_scenarios"
START_S, END_S = 300.0, 30.0
CORRECTION = "edges:3+1"  # the same in every round, so that tokens can be counted


def end(process: subprocess.Popen[bytes], grace_s: float = END_S) -> None:
    """End a process that leads a session, if need be after a time, and whatever it has started."""
    if grace_s:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _start(
    command: Sequence[str | Path], variables: Mapping[str, str], errors: IO[bytes]
) -> subprocess.Popen[bytes]:
    """Start a command that one talks to, as the leader of a session, so that `end` ends it."""
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        env=variables,
        start_new_session=True,
    )


def run(
    command: Sequence[str | Path], said: str, variables: Mapping[str, str], timeout_s: float = 600
) -> str:
    """Run a command to its end, and return what it printed. Its children end in any case.

    Args:
        command: and its arguments.
        said: its standard input.
        variables: its environment.
        timeout_s: seconds after which it is killed.
    """
    with tempfile.TemporaryFile() as errors:
        with _start(command, variables, errors) as process:
            try:
                printed, _ = process.communicate(said.encode(), timeout_s)
            finally:
                end(process, 0)
        errors.seek(0)
        assert process.returncode == 0, errors.read()[-4000:].decode(errors="replace")
        return printed.decode()


@contextlib.contextmanager
def talk(
    command: Sequence[str | Path], variables: Mapping[str, str], timeout_s: float = 600
) -> Iterator[Callable[[str], str]]:
    """Start a command that answers each line by one that begins with a brace; all else is its log.

    Args:
        command: and its arguments.
        variables: its environment.
        timeout_s: seconds after which it is killed.
    """
    with tempfile.TemporaryFile() as errors, _start(command, variables, errors) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        said, answers = process.stdin, process.stdout

        def ask(line: str) -> str:
            with contextlib.suppress(BrokenPipeError):
                said.write(line.encode() + b"\n")
                said.flush()
            for answer in answers:
                if answer.startswith(b"{"):
                    return answer.decode()
            process.wait()
            errors.seek(0)
            raise AssertionError(errors.read()[-4000:].decode(errors="replace"))

        timer = threading.Timer(timeout_s, end, (process, 0))
        timer.start()
        try:
            yield ask
            with contextlib.suppress(BrokenPipeError):
                said.close()
            process.wait(END_S)
        finally:
            timer.cancel()
            end(process, 0)


@contextlib.contextmanager
def vllm_server(
    model: Path, folder: Path, *arguments: str, plugin: bool = True, **environment: str
) -> Iterator[httpx.Client]:
    """Start it, and hand out a client when it is healthy.

    Args:
        model: folder of a checkpoint.
        folder: for its log.
        arguments: more of vLLM's.
        plugin: whether TokenDance is inside.
        environment: more variables.
    """
    python = VLLM_ENVIRONMENT.find()
    assert python is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = child_environment(python, VLLMConfig())
    variables |= {
        # As users have it: the scheduler in a process of its own.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
        "PYTHONPATH": str(SCENARIOS),
        "TOKENDANCE": str(int(plugin)),
        "TOKENDANCE_CORRECTION": CORRECTION,
    }
    settings = ["--enforce-eager", "--block-size=32", "--kv-cache-memory-bytes=500000000"]
    command: list[str | Path] = [
        python,
        "-P",
        "-m",
        "vllm.entrypoints.openai.api_server",
        f"--model={model}",
    ]
    command += ["--host=127.0.0.1", f"--port={port}", "--generation-config=vllm"]
    log = folder / "vllm.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, *settings, *arguments],
            env=variables | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as http:
            deadline = time.monotonic() + START_S
            while not _is_healthy(http):
                said = log.read_text(errors="replace")[-4000:]
                assert process.poll() is None, said
                assert time.monotonic() < deadline, said
                time.sleep(0.2)
            yield http
    finally:
        end(process)


def _is_healthy(http: httpx.Client) -> bool:
    try:
        return http.get("/health").is_success
    except httpx.TransportError:
        return False
