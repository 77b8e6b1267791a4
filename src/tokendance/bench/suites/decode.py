"""`decode`: tokens per second of agents that read one shared run, by agents and lengths.

`dense` is the same engine with each agent's KV in one piece of its own (mode `prefix`, where the
shared text stands behind the private part and so is stored once per agent); `collective` reads
the shared run where it lies. Both decode in turn, one step each, so that they see the same machine.
"""

import random
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from tokendance.bench.arms import answer_params, load, make_engines, started_vllm
from tokendance.bench.plots import draw_lines
from tokendance.bench.settings import BenchSettings
from tokendance.bench.suite import LiveTable, Row, SuiteResult
from tokendance.bench.vllm import VLLM
from tokendance.engine.request import Request
from tokendance.errors import ConfigError
from tokendance.llm import LLM
from tokendance.options import ReuseMode
from tokendance.rounds.prompts import Prompt, private, shared
from tokendance.rounds.trace import example_trace, read_trace

BLOCK_TOKENS = 94
# (agents, shared tokens, own tokens)
FULL_SIZES = (
    (4, 2048, 512),
    (8, 2048, 512),
    (16, 2048, 512),
    (32, 2048, 512),
    (32, 512, 512),
    (32, 2048, 64),
)
TINY_SIZES = ((2, 60, 20), (3, 60, 20))
HEADLINE_SIZE = (32, 2048, 512)
_AHEAD_TOKENS = 100  # room for agents that begin to decode early
_NAMES: dict[ReuseMode, str] = {"prefix": "dense", "collective": "collective"}
_COLUMNS = {
    "agents": "agents",
    "shared": "shared",
    "own": "own",
    "mode": "mode",
    "tokens_per_s": "tokens/s",
    "step_ms": "ms a step",
    "min_ms": "min",
    "max_ms": "max",
    "vs_mode": "collective x",
}


@dataclass(frozen=True, slots=True)
class _Steps:
    """A mode's decoding steps: seconds, in order."""

    mode: str
    seconds: list[float]


def run(settings: BenchSettings, console: Console) -> SuiteResult:
    """Measure the suite; see the module."""
    sizes = list(TINY_SIZES if settings.tiny else FULL_SIZES)
    num_steps = 4 if settings.tiny else 32
    model = load(settings)
    notes = ["A tiny run: the figures mean nothing."] if settings.tiny else []
    max_context = model.shape.max_context
    for size in [size for size in sizes if size[1] + size[2] + _AHEAD_TOKENS > max_context]:
        notes.append(f"{size} is left out: the context holds {max_context} tokens.")
        sizes.remove(size)
    if not sizes:
        raise ConfigError(
            f"The context of {settings.model} ({max_context} tokens) is too short for this suite."
        )
    room = max(agents * (run + own + 200) for agents, run, own in sizes)
    longest = max(run + own + 200 for _, run, own in sizes)
    # All hold their agents' KV at the same time, so each has memory of its own.
    engines = make_engines(model, settings.engine, _NAMES, room)
    table = LiveTable(console, "decoding, all agents at once, bfloat16", _COLUMNS)
    rows: list[Row] = []
    token_bytes = model.shape.kv_bytes_per_token(model.dtype)
    with started_vllm(
        settings, console, max_context=longest, num_tokens=room, token_bytes=token_bytes
    ) as vllm:
        if vllm is not None:
            notes.append(vllm.settings)
        for size in sizes:
            prompts = make_prompts(engines["prefix"], *size, settings.seed)
            with console.status(f"{size[0]} agents: prefill, then steps in turn ..."):
                found = _in_turn(engines, prompts, num_steps)
            if vllm is not None and size in (HEADLINE_SIZE, TINY_SIZES[-1]):
                with console.status(f"{size[0]} agents in vLLM ..."):
                    found.append(_vllm_steps(vllm, engines["prefix"], prompts, num_steps))
            new = _rows(size, found)
            rows += new
            for row in new:
                table.add(row)
    headline_size = TINY_SIZES[-1] if settings.tiny else HEADLINE_SIZE
    best = {
        row["mode"]: row["vs_mode"]
        for row in rows
        if (row["agents"], row["shared"], row["own"]) == headline_size
    }
    headline = {"speedup_vs_dense_32": best.get("dense"), "speedup_vs_vllm_32": best.get("vllm")}
    return SuiteResult("decode", settings.model, rows, headline, notes)


def make_prompts(llm: LLM, agents: int, num_shared: int, num_own: int, seed: int) -> list[Prompt]:
    """Prompts of real text with exact lengths: own tokens, then shared ones, then a last own one.

    Each agent's own text is a shuffle of the example town's lines, and so is the shared text.
    """
    rng = random.Random(seed)
    lines = [
        line
        for agent in read_trace(example_trace()).agents.values()
        for line in agent.system.split("\n")
    ]

    def text(length: int) -> list[int]:
        ids: list[int] = []
        while len(ids) < length:
            ids += llm.encoder.text_ids(" ".join(rng.sample(lines, len(lines)))).tolist()
        return ids[:length]

    run = text(num_shared)
    blocks = [shared(run[at : at + BLOCK_TOKENS]) for at in range(0, num_shared, BLOCK_TOKENS)]
    prompts = []
    for index in range(agents):
        own = text(num_own)
        # The private part differs in length, as agents' do, and the sum of both ends is `num_own`.
        last = 1 + index % (num_own // 4)
        parts = [private(own[last:]), *blocks, private(own[:last])]
        prompts.append(Prompt(parts, agent=f"agent {index}"))
    return prompts


class _Decoding:
    """A round that has its first tokens, and goes on a step at a time.

    Agents whose prompt is done early decode while the others' prompts are computed, so they are a
    few tokens ahead.
    """

    def __init__(self, llm: LLM, prompts: list[Prompt], num_steps: int) -> None:
        """Compute the prompts."""
        self._engine = llm.engine
        self._engine.forget()
        round_id = self._engine.new_round_id()
        params = answer_params(num_steps + _AHEAD_TOKENS)
        self._requests: list[Request] = [
            llm.make_request(prompt, params, round_id, str(index))
            for index, prompt in enumerate(prompts)
        ]
        self._engine.add(self._requests)
        while any(request.first_token_s is None for request in self._requests):
            self._engine.tick()

    def step(self) -> float:
        """Seconds of one step that makes a token for every agent."""
        before = self._num_generated()
        start = time.perf_counter()
        self._engine.tick()
        seconds = time.perf_counter() - start
        assert self._num_generated() - before == len(self._requests), "an agent is done too early"
        return seconds

    def _num_generated(self) -> int:
        return sum(len(request.generated) for request in self._requests)

    def close(self) -> None:
        """Take the requests back."""
        for request in self._requests:
            self._engine.abort(request)


def _in_turn(engines: Mapping[str, LLM], prompts: list[Prompt], num_steps: int) -> list[_Steps]:
    """Decode in turn, a step each; the first two steps of each do not count."""
    rounds = {mode: _Decoding(engines[mode], prompts, num_steps + 2) for mode in _NAMES}
    seconds: dict[ReuseMode, list[float]] = {mode: [] for mode in rounds}
    for turn in range(num_steps + 2):
        for mode, one in rounds.items():
            found = one.step()
            if turn >= 2:
                seconds[mode].append(found)
    for one in rounds.values():
        one.close()
    return [_Steps(_NAMES[mode], found) for mode, found in seconds.items()]


def _vllm_steps(vllm: VLLM, llm: LLM, prompts: list[Prompt], num_steps: int) -> _Steps:
    """Seconds per step of vLLM, its prefix cache filled: a long answer's time less a short one's.

    Both calls find the prompts in the cache, so what differs is the decoding.
    """
    ids = [llm.encoder.encode(prompt).token_ids.tolist() for prompt in prompts]
    vllm.reset()
    vllm.run(ids, 1)
    short = [vllm.run(ids, 1).seconds for _ in range(3)]
    long = [vllm.run(ids, 1 + num_steps).seconds for _ in range(3)]
    return _Steps(
        "vllm", [(b - a) / num_steps for a, b in zip(sorted(short), sorted(long), strict=True)]
    )


def _rows(size: tuple[int, int, int], found: list[_Steps]) -> list[Row]:
    agents, num_shared, num_own = size
    ours = next(steps for steps in found if steps.mode == "collective")
    ours_s = statistics.median(ours.seconds)
    rows: list[Row] = []
    for steps in found:
        median = statistics.median(steps.seconds)
        rows.append(
            {
                "agents": agents,
                "shared": num_shared,
                "own": num_own,
                "mode": steps.mode,
                "tokens_per_s": agents / median,
                "step_ms": 1000 * median,
                "min_ms": 1000 * min(steps.seconds),
                "max_ms": 1000 * max(steps.seconds),
                "vs_mode": median / ours_s,
            }
        )
    return rows


def plot(result: SuiteResult, path: Path) -> None:
    """Draw tokens per second by agents, at the longest shared run."""
    _, num_shared, num_own = max((row["agents"], row["shared"], row["own"]) for row in result.rows)
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in result.rows:
        if (row["shared"], row["own"]) == (num_shared, num_own):
            lines.setdefault(row["mode"], []).append((row["agents"], row["tokens_per_s"]))
    draw_lines(
        path,
        lines,
        title=f"Decoding, {num_shared} shared and {num_own} own tokens, {result.model}",
        x_label="agents",
        y_label="tokens per second",
    )
