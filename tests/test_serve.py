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

from soak.client import Reply, exchange
from tokendance.rounds.trace import example_trace

AGENTS = 128
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
def test_a_round_of_128_at_once_is_answered_by_the_real_model() -> None:
    async def ask_all(port: int) -> list[Reply | None]:
        headers = {"content-type": "application/json"}
        path = "/v1/chat/completions"
        asked = [exchange(port, "POST", path, body, headers) for body in bodies()]
        async with asyncio.timeout(900):
            return await asyncio.gather(*asked)

    with serve("--kv-budget", "2GiB") as (port, process):
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


@pytest.mark.parametrize(("drain_s", "num_signals"), [(60, 2), (1, 1)])
def test_who_waits_is_told_when_there_is_no_more_time(
    model_folder: Callable[..., Path], drain_s: int, num_signals: int
) -> None:
    folder = str(model_folder("llama", max_position_embeddings=2**17))
    body = {"model": folder, "prompt": "so", "max_tokens": 10**5, "ignore_eos": True}
    with serve("--model", folder, "--drain", str(drain_s)) as (port, process):
        assert process.stdout is not None
        process.stdout.close()  # as in a pipe whose end has gone with the same Ctrl-C
        url = f"http://127.0.0.1:{port}/v1/completions"
        with httpx.stream("POST", url, json=body | {"stream": True}, timeout=60) as answer:
            lines = (line for line in answer.iter_lines() if line)
            next(lines)
            interrupt(process, num_signals)
            *_, last = lines
        assert_it_ended(process)
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["type"], error["message"]) == ("server_error", "The server is stopping.")


def test_who_never_asks_is_cut_off(model_folder: Callable[..., Path]) -> None:
    head = "POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n"
    with (
        serve("--model", str(model_folder("llama")), "--drain", "60") as (port, process),
        socket.create_connection(("127.0.0.1", port)) as connection,
    ):
        connection.sendall(head.encode())
        time.sleep(0.5)
        interrupt(process, 3)
        assert_it_ended(process)


def interrupt(process: subprocess.Popen[str], times: int) -> None:
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)


def assert_it_ended(process: subprocess.Popen[str]) -> None:
    assert process.wait(40) == 130
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
