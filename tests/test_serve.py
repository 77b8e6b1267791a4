"""`tokendance serve` with the demo model: many agents at once."""

import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from soak.client import Reply, exchange
from tokendance.rounds.trace import example_trace

AGENTS = 128
SERVE = "import sys; from tokendance.cli import main; sys.argv[0] = 'tokendance'; main()"


@contextmanager
def serve() -> Iterator[int]:
    """Run the command until it listens; its port."""
    command = [sys.executable, "-c", SERVE, "serve", "--port", "0", "--kv-budget", "2GiB"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            shown = ""
            while (found := re.search(r"127\.0\.0\.1:(\d+)/v1", shown)) is None:
                line = process.stdout.readline()
                assert line, shown
                shown += line
            yield int(found[1])
        finally:
            process.terminate()
            process.wait(60)
    assert process.returncode in (0, -15)


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

    with serve() as port:
        begun = time.perf_counter()
        replies = asyncio.run(ask_all(port))
        seconds = time.perf_counter() - begun
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
