"""What clients of vLLM's own API server see of TokenDance inside it: usage, metrics, refusals."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from test_vllm import PAGE, PYTHON, ROUND, Round
from tiny_models import save_model
from vllm_server import vllm_server

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(PYTHON is None, reason="vLLM is not installed (make vllm)"),
]


class Server:
    """An API server of vLLM's, with the plug-in."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def get(self, path: str) -> str:
        return self._http.get(path).raise_for_status().text

    def post(self, tokens: list[int], **body: Any) -> tuple[int, str]:
        """Status and body of a completion."""
        content = {"model": "m", "prompt": tokens, "max_tokens": 8, "temperature": 0, **body}
        answer = self._http.post("/v1/completions", json=content)
        return answer.status_code, answer.text

    def post_round(self, agents: Round, **body: Any) -> list[dict[str, Any]]:
        """Usage of each agent of a round."""
        prompts = [prompt["tokens"] for prompt in agents.add()["add"]]
        with ThreadPoolExecutor(len(prompts)) as threads:
            answers = list(threads.map(lambda tokens: self.post(tokens, **body), prompts))
        assert [status for status, _ in answers] == [200] * len(prompts), answers
        return [_usage(text) for _, text in answers]

    def metric(self, name: str) -> float:
        pattern = re.compile(rf"^{re.escape(name)} (\S+)$", re.MULTILINE)
        found = pattern.search(self.get("/metrics"))
        assert found, name
        return float(found[1])


def _usage(text: str) -> dict[str, Any]:
    """Of an answer, whole or streamed."""
    if text.startswith("data:"):
        events = [line[6:] for line in text.splitlines() if line.startswith("data: {")]
        usages = [json.loads(event).get("usage") for event in events]
        return dict(next(usage for usage in reversed(usages) if usage))
    return dict(json.loads(text)["usage"])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    save_model(folder, "llama", hidden_size=128)
    flags = {
        "served-model-name": "m",
        "dtype": "float32",
        "max-model-len": 512,
        "block-size": PAGE,
        "kv-cache-memory-bytes": 2**24,
        "max-num-batched-tokens": 512,
    }
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    arguments += ["--skip-tokenizer-init", "--enable-prompt-tokens-details"]
    with vllm_server(folder, folder, *arguments) as http:
        yield Server(http)


NAMED = {"round": "r", "round_size": 6}
REUSED = len(ROUND.shared) - 4


@pytest.mark.parametrize("streams", [False, True])
def test_usage_and_metrics_are_those_of_the_clients_prompts(server: Server, streams: bool) -> None:
    agents = Round(10 + streams)
    name = 'tokendance:{}_total{{engine="0"}}'
    tokens = ("prompt_tokens", "computed_tokens", "reused_tokens", "corrected_tokens")
    counters = ("rounds", "mirrors", *tokens)
    before = {counter: server.metric(name.format(counter)) for counter in counters}
    vllms = server.metric('vllm:prompt_tokens_total{engine="0",model_name="m"}')
    body: dict[str, Any] = {"vllm_xargs": NAMED}
    if streams:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    usages = server.post_round(agents, **body)
    lengths = [len(prompt["tokens"]) for prompt in agents.add()["add"]]
    assert [usage["prompt_tokens"] for usage in usages] == lengths
    details = [usage["prompt_tokens_details"] or {} for usage in usages]
    assert sorted(detail.get("cached_tokens") or 0 for detail in details) == [0, *[REUSED] * 5]
    counted = {name_: server.metric(name.format(name_)) - before[name_] for name_ in counters}
    assert counted == {
        "rounds": 1,
        "mirrors": 5,
        "prompt_tokens": sum(lengths),
        "computed_tokens": sum(lengths) - 5 * REUSED,
        "reused_tokens": 5 * REUSED,
        "corrected_tokens": 5 * 4,
    }
    after = server.metric('vllm:prompt_tokens_total{engine="0",model_name="m"}')
    assert after - vllms == sum(lengths)
    assert server.metric('tokendance:plain_vllm{reason=""}') == 0


HOSTILE: list[dict[str, Any]] = [
    {"round": ""},
    {"round": "x" * 257},
    {"round": 7, "round_size": 3},
    {"round": "r", "round_size": -1},
    {"round": "r", "round_size": 1e308},
    {"round_size": 2},
    {"blocks": [5]},
    {"blocks": [9, 3]},
    {"blocks": [-4, 3]},
    {"blocks": [0, 10**9]},
    {"blocks": ["a", "b"]},
    {"blocks": 0.5},
    {"reuse": ["exact"]},
    {"tokendance_reads": [1, 2, 3], "reads": [1], "pages": [1, 2], "positions": [4]},
    {"kv_transfer_params": [1, 2]},
]


def test_hostile_hints_harm_nobody(server: Server) -> None:
    """Each is answered or refused, and the engine goes on."""
    tokens = ROUND.add()["add"][0]["tokens"]
    expected = json.loads(server.post(tokens, cache_salt="x", return_token_ids=True)[1])
    for index, hints in enumerate(HOSTILE):
        body = {"vllm_xargs": hints, "cache_salt": str(index), "return_token_ids": True}
        status, text = server.post(tokens, **body)
        # vLLM's own front end answers 500 where it takes a list for a dictionary.
        allowed = (200, 400, 500) if "kv_transfer_params" in hints else (200, 400)
        assert status in allowed, (hints, status, text)
        if status == 200:
            answer = json.loads(text)
            assert answer["choices"][0]["token_ids"] == expected["choices"][0]["token_ids"], hints
            assert not (answer["usage"]["prompt_tokens_details"] or {}).get("cached_tokens"), hints
    assert server.get("/health") == ""
