"""vLLM's own API server with TokenDance inside, and clients as they are."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from framework_clients import PYTHON, count_tokens, run_client
from oracle import Asked
from tokendance.bench.vllm import VLLM_ENVIRONMENT
from tokendance.models import demo
from vllm_server import vllm_server

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.demo,
    pytest.mark.skipif(VLLM_ENVIRONMENT.find() is None, reason="vLLM is not installed (make vllm)"),
]
ROUNDS, AGENTS = 3, 10


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        http: a client of it.
        records: of the chat requests that were answered; see `vllm_scenarios/recording.py`.
    """

    http: httpx.Client
    records: Path

    def take_records(self) -> list[dict[str, Any]]:
        """Those that have come since, in the order of arrival."""
        lines = self.records.read_text().splitlines() if self.records.exists() else []
        self.records.write_text("")
        return sorted(map(json.loads, lines), key=lambda record: float(record["arrived"]))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    records = folder / "records.jsonl"
    with vllm_server(
        demo.checkpoint(),
        folder,
        f"--served-model-name={demo.ALIAS}",
        "--max-model-len=4096",
        "--enable-prompt-tokens-details",
        "--middleware=recording.Recorder",
        TEST_RECORDS=str(records),
    ) as http:
        yield Server(http, records)


@pytest.mark.frameworks
@pytest.mark.skipif(not PYTHON.is_file(), reason="no .venv-frameworks: make frameworks")
@pytest.mark.parametrize(
    ("client", "way"), [("openai_sdk", "streams"), ("langgraph_town", "graph")]
)
def test_clients_are_answered_and_their_words_reused(
    server: Server, client: str, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the second round on, most of what an oracle could reuse."""
    server.http.post("/reset_prefix_cache").raise_for_status()
    server.take_records()
    said = run_client(str(server.http.base_url).rstrip("/"), client, way, AGENTS, ROUNDS)
    assert len(said) == ROUNDS
    assert all(len(one) == AGENTS and all(map(str.strip, one.values())) for one in said)
    records = server.take_records()
    assert len(records) == ROUNDS * AGENTS
    assert all(record["num_prompt"] == len(record["prompt"]) for record in records)
    if way == "streams":
        assert all(record["chunks"] > 1 for record in records)
    requests = [Asked(one["prompt"], one["answer"], one["cached"]) for one in records]
    asked = [requests[first : first + AGENTS] for first in range(0, len(requests), AGENTS)]
    reused, could, prompts = count_tokens(asked)
    with capsys.disabled():
        figures = map("{} / {} / {}".format, reused, could, prompts)
        print(f"\n{client}-{way}: reused / reusable / prompt tokens {', '.join(figures)} ", end="")
    assert sum(reused[1:]) >= 0.8 * sum(could[1:])
