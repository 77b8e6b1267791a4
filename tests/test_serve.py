"""`tokendance serve` as a process of its own: many agents at once, and how it stops."""

import asyncio
import json
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from conftest import is_thorough, num_threads
from soak.client import Reply, exchange
from tokendance.rounds.trace import example_trace

AGENTS = 128 if is_thorough() else 32
SERVE = "import sys; from tokendance.cli import main; sys.argv[0] = 'tokendance'; main()"


@contextmanager
def serve(*options: str) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """Run the command until it listens; its port, and the process."""
    command = [sys.executable, "-c", SERVE, "serve", "--port", "0", *options]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            assert process.stdout is not None
            shown = ""
            while (found := re.search(r"127\.0\.0\.1:(\d+)/v1", shown)) is None:
                line = process.stdout.readline()
                assert line, shown
                shown += line
            yield int(found[1]), process
        finally:
            process.terminate()
            process.wait(60)


def bodies() -> list[bytes]:
    """A round: about 400 tokens that all read, and 50 to 150 of each agent's own."""
    rng = random.Random(0)
    words = re.findall("[a-z]+", example_trace().read_text(encoding="utf-8"))
    news = [" ".join(rng.choices(words, k=60)) for _ in range(5)]
    found: list[bytes] = []
    for index in range(AGENTS):
        own = " ".join(rng.choices(words, k=rng.randint(35, 110)))
        messages = [
            {"role": "system", "content": f"You are number {index}. {own}"},
            *({"role": "assistant", "name": "Bo", "content": one} for one in news),
            {"role": "user", "content": "What do you say?"},
        ]
        body = {"model": "smollm2-135m", "messages": messages, "max_tokens": 8, "temperature": 0}
        found.append(json.dumps(body).encode())
    return found


@pytest.mark.demo
def test_a_large_round_at_once_is_answered_by_the_real_model() -> None:
    async def ask_all(port: int) -> list[Reply | None]:
        headers = {"content-type": "application/json"}
        path = "/v1/chat/completions"
        asked = [exchange(port, "POST", path, body, headers) for body in bodies()]
        async with asyncio.timeout(900):
            return await asyncio.gather(*asked)

    with serve("--kv-budget", "2GiB", "--threads", str(num_threads())) as (port, process):
        begun = time.perf_counter()
        replies = asyncio.run(ask_all(port))
        seconds = time.perf_counter() - begun
    assert process.returncode in (0, -signal.SIGTERM)
    assert all(reply is not None and reply.status == 200 for reply in replies)
    usages = [json.loads(reply.body)["usage"] for reply in replies if reply is not None]
    prompts = [usage["prompt_tokens"] for usage in usages]
    reused = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    print(
        f"{seconds:.1f} s for {AGENTS} agents with {min(prompts)} to {max(prompts)} tokens each; "
        f"reused: {sum(reused)} of {sum(prompts)}, {statistics.median(reused)} in the middle"
    )
    # Shared are 5 blocks of some 80 tokens, of which the edges are computed again.
    assert sum(count > 300 for count in reused) >= AGENTS - 8


@pytest.fixture
def endless(model_folder: Callable[..., Path]) -> str:
    """A model that may be asked for as many tokens as nobody waits for."""
    return str(model_folder("llama", max_position_embeddings=2**17))


@contextmanager
def endless_answer(port: int, model: str) -> Iterator[Iterator[str]]:
    """The lines of a stream that has begun, and does not end by itself."""
    body = {"model": model, "prompt": "so", "max_tokens": 10**5, "ignore_eos": True, "stream": True}
    url = f"http://127.0.0.1:{port}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=60) as answer:
        lines = (line for line in answer.iter_lines() if line)
        next(lines)
        yield lines


def test_each_signal_is_the_next_stage(endless: str) -> None:
    """What is under way is finished; who waits is told; who never asks is cut off."""
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n"
        "content-type: application/json\r\nexpect: 100-continue\r\n\r\n"
    )
    with serve("--model", endless, "--drain", "60") as (port, process):
        close_output(process)
        assert process.stderr is not None
        with (
            socket.create_connection(("127.0.0.1", port), timeout=60) as silent,
            endless_answer(port, endless) as lines,
        ):
            silent.sendall(head.encode())
            assert b"100 Continue" in silent.recv(1000)  # its body is waited for
            process.send_signal(signal.SIGINT)
            while "finishing what is under way" not in (line := process.stderr.readline()):
                assert line
            next(lines)
            process.send_signal(signal.SIGINT)
            assert_told_at_last(lines)
            process.send_signal(signal.SIGINT)
            assert_it_ended(process)


def test_who_waits_is_told_when_there_is_no_more_time(endless: str) -> None:
    with serve("--model", endless, "--drain", "1") as (port, process):
        close_output(process)
        with endless_answer(port, endless) as lines:
            process.send_signal(signal.SIGINT)
            assert_told_at_last(lines)
        assert_it_ended(process)


def close_output(process: subprocess.Popen[str]) -> None:
    """As in a pipe whose end has gone with the same Ctrl-C."""
    assert process.stdout is not None
    process.stdout.close()


def assert_told_at_last(lines: Iterator[str]) -> None:
    *_, last = lines
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["type"], error["message"]) == ("server_error", "The server is stopping.")


def assert_it_ended(process: subprocess.Popen[str]) -> None:
    assert process.wait(60) == 130
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
