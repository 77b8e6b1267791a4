"""vLLM's own API server in a process of its own, with TokenDance inside it or without."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from tokendance.bench.vllm import VLLMConfig, child_environment, find_vllm

SCENARIOS = Path(__file__).parent / "vllm_scenarios"
START_S, END_S = 300.0, 30.0


def end(process: subprocess.Popen[bytes], grace_s: float = END_S) -> None:
    """End a process that leads a session, and whatever it has started."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


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
    python = find_vllm()
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
