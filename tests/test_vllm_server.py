"""What clients of vLLM's own API server see of TokenDance inside it."""

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from test_vllm import NUM_AGENTS, PAGE, PYTHON, ROUND, Round
from tiny_models import save_model
from vllm_server import vllm_server

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(PYTHON is None, reason="vLLM is not installed (make vllm)"),
]


class Server:
    """An API server of vLLM's, with the plug-in."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http

    def get(self, path: str) -> str:
        return self.http.get(path).raise_for_status().text

    def post(self, tokens: list[int], **body: Any) -> tuple[int, str]:
        """Status and body of a completion."""
        content = {"model": "m", "prompt": tokens, "max_tokens": 8, "temperature": 0, **body}
        answer = self.http.post("/v1/completions", json=content)
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


FLAGS = {
    "served-model-name": "m",
    "dtype": "float32",
    "max-model-len": 2048,
    "block-size": PAGE,
    "kv-cache-memory-bytes": 2**24,
    "max-num-batched-tokens": 512,
}


@contextlib.contextmanager
def serve(folder: Path, *more: str) -> Iterator[Server]:
    """Serve a tiny model."""
    save_model(folder, "llama", hidden_size=128, max_position_embeddings=2048)
    arguments = [f"--{name}={value}" for name, value in FLAGS.items()]
    arguments += ["--skip-tokenizer-init", "--enable-prompt-tokens-details", *more]
    with vllm_server(folder, folder, *arguments) as http:
        yield Server(http)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("served")) as server:
        yield server


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
    reads = {"tokendance_reads": list(range(64, 64 + len(tokens))), "do_remote_prefill": True}
    transfers = [{"kv_transfer_params": reads}, {"ec_transfer_params": reads}]
    for index, hints in enumerate([*HOSTILE, *transfers]):
        said = hints if hints in transfers else {"vllm_xargs": hints}
        body = {"cache_salt": str(index), "return_token_ids": True}
        status, text = server.post(tokens, **said, **body)
        # vLLM's own front end answers 500 where it takes a list for a dictionary.
        allowed = (200, 400, 500) if "kv_transfer_params" in hints else (200, 400)
        assert status in allowed, (hints, status, text)
        if status == 200:
            answer = json.loads(text)
            assert answer["choices"][0]["token_ids"] == expected["choices"][0]["token_ids"], hints
            assert not (answer["usage"]["prompt_tokens_details"] or {}).get("cached_tokens"), hints
    assert server.get("/health") == ""


class Streams:
    """The answers of a round's agents, as they come."""

    def __init__(self, http: httpx.Client, agents: Round, **body: Any) -> None:
        self._http = http
        self._begun = threading.Semaphore(0)
        prompts = [prompt["tokens"] for prompt in agents.add()["add"]]
        self._threads = ThreadPoolExecutor(len(prompts))
        self._answers = [self._threads.submit(self._read, prompt, body) for prompt in prompts]

    def _read(self, tokens: list[int], body: dict[str, Any]) -> list[dict[str, Any]]:
        content = {"model": "m", "prompt": tokens, "temperature": 0, "stream": True, **body}
        choices: list[dict[str, Any]] = []
        with self._http.stream("POST", "/v1/completions", json=content) as answer:
            for line in answer.raise_for_status().iter_lines():
                if line.startswith("data: {"):
                    if not choices:
                        self._begun.release()
                    choices += json.loads(line[6:])["choices"]
        return choices

    def wait_until_all_have_begun(self) -> None:
        for _ in self._answers:
            assert self._begun.acquire(timeout=60)

    def ends(self) -> list[tuple[int, str]]:
        """Of each answer: how many tokens it has, and why it ended."""
        with self._threads:
            answers = [answer.result() for answer in self._answers]
        return [
            (sum(len(choice["token_ids"]) for choice in choices), choices[-1]["finish_reason"])
            for choices in answers
        ]


NUM_SAID = 800  # long enough for others to come in between
WHOLE = [(NUM_SAID, "length")] * NUM_AGENTS
# The engine is ahead of the server that tells of it, on a busy machine by hundreds of tokens.
NUM_ABORTED = 1500


@pytest.mark.parametrize(
    ("calls", "outcome"),
    [
        (["/reset_prefix_cache?reset_running_requests=true"], "computed anew"),
        (["/pause?mode=keep", "/resume"], "computed anew"),
        (["/pause?mode=wait", "/resume"], "answered"),
        (["/pause?mode=abort", "/resume"], "aborted"),
        (["/sleep?level=0&mode=keep", "/wake_up?tags=scheduling"], "answered"),
        (["/sleep?level=1&mode=keep", "/wake_up"], "computed anew"),
        (["/sleep?level=1&mode=wait", "/wake_up"], "answered"),
        (["/sleep?level=1&mode=abort", "/wake_up"], "aborted"),
        (["/abort_requests"], "aborted"),
    ],
    ids=lambda value: value[0][1:] if isinstance(value, list) else "",
)
def test_whoever_pauses_or_resets_harms_nobody(
    calls: list[str], outcome: str, server: Server
) -> None:
    """While owner and mirrors decode; all pages are free after that, and rounds go on."""
    agents = Round(40)
    body = {"max_tokens": NUM_SAID, "ignore_eos": True, "return_token_ids": True}
    preemptions = 'vllm:num_preemptions_total{engine="0",model_name="m"}'
    before = server.metric(preemptions)
    num_asked = NUM_ABORTED if outcome == "aborted" else NUM_SAID
    running = Streams(server.http, agents, vllm_xargs=NAMED, **{**body, "max_tokens": num_asked})
    running.wait_until_all_have_begun()
    first, *others = calls
    said = server.http.post(first, json={})
    assert said.status_code == 200, said.text
    if others:
        coming = Streams(server.http, Round(41), vllm_xargs=NAMED, **body)
        for path in others:
            server.http.post(path).raise_for_status()
        assert coming.ends() == WHOLE
    ends = running.ends()
    if outcome == "aborted":
        assert {why for _, why in ends} == {"abort"}
        assert all(count < NUM_ABORTED for count, _ in ends)
    else:
        assert ends == WHOLE
    usages = server.post_round(Round(42), vllm_xargs=NAMED)
    details = [usage["prompt_tokens_details"] or {} for usage in usages]
    least, *mirrors = sorted(detail.get("cached_tokens") or 0 for detail in details)
    assert least == 0
    # A little less where a block has an edge more, of one of the long answers.
    assert min(mirrors) >= 0.8 * REUSED
    # vLLM tells some of what it has counted with a later step; who comes may be preempted, too.
    preempted = server.metric(preemptions) - before
    assert preempted <= (2 * NUM_AGENTS if outcome == "computed anew" else 0)
    assert server.http.post("/reset_prefix_cache").json() == {"success": True}


def test_what_differs_in_its_salt_shares_nothing(server: Server) -> None:
    tokens = Round(50).add()["add"][0]["tokens"]

    def num_cached(**body: Any) -> int:
        usage = _usage(server.post(tokens, **body)[1])
        return int((usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0)

    assert num_cached(cache_salt="a") == 0
    assert num_cached(cache_salt="b") == 0
    assert num_cached() == 0
    assert num_cached(cache_salt="a") == num_cached() == len(tokens) - 1
    # vLLM's own prefix cache finds whole blocks, and leaves a token to be computed.
    exact = {"vllm_xargs": {"reuse": "exact"}}
    assert num_cached(cache_salt="b", **exact) == (len(tokens) - 1) // PAGE * PAGE
    assert num_cached(cache_salt="c", **exact) == 0


def test_what_does_not_fit_is_served_as_vllm_does_and_said_once(tmp_path: Path) -> None:
    reason = "others are told of KV (KV events)"
    events = json.dumps({"enable_kv_cache_events": True, "publisher": "null"})
    with serve(tmp_path, f"--kv-events-config={events}") as server:
        assert server.metric(f'tokendance:plain_vllm{{reason="{reason}"}}') == 1
        usages = server.post_round(Round(60), vllm_xargs=NAMED)
        details = [usage["prompt_tokens_details"] or {} for usage in usages]
        assert not any(detail.get("cached_tokens") for detail in details)
        assert server.metric('tokendance:rounds_total{engine="0"}') == 0
    log = (tmp_path / "vllm.log").read_text(errors="replace")
    assert log.count(f"vLLM runs without TokenDance: {reason}.") == 1
