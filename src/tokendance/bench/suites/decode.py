"""`decode`: tokens per second of agents that read one shared run, by agents and lengths.

`dense` is the same engine with each agent's KV in one piece of its own (mode `prefix`, where the
shared text stands behind the private part and so is stored once per agent); `collective` reads
the shared run where it lies. Both decode in turn, one step each, so that they see the same machine.
"""

import random
import statistics
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from tokendance.bench.arms import (
    AHEAD_TOKENS,
    DecodingRound,
    context_too_short,
    load,
    make_engines,
    prompts_around,
    started_vllm,
)
from tokendance.bench.plots import draw_lines
from tokendance.bench.settings import BenchSettings
from tokendance.bench.suite import LiveTable, SuiteResult, in_turn
from tokendance.bench.vllm import VLLM
from tokendance.bench.workload import TOWN, read_people
from tokendance.llm import LLM
from tokendance.options import ReuseMode
from tokendance.rounds.prompts import Prompt

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


def run(settings: BenchSettings, console: Console) -> SuiteResult:
    """Measure the suite; see the module."""
    sizes = list(TINY_SIZES if settings.tiny else FULL_SIZES)
    num_steps = 4 if settings.tiny else 32
    headline_size = TINY_SIZES[-1] if settings.tiny else HEADLINE_SIZE
    model = load(settings)
    notes = []
    max_context = model.shape.max_context
    for size in [size for size in sizes if size[1] + size[2] + AHEAD_TOKENS > max_context]:
        notes.append(f"{size} is left out: the context holds {max_context} tokens.")
        sizes.remove(size)
    if not sizes:
        raise context_too_short(model)
    room = max(agents * (num_shared + num_own + 200) for agents, num_shared, num_own in sizes)
    longest = max(num_shared + num_own + 200 for _, num_shared, num_own in sizes)
    # All hold their agents' KV at the same time, so each has memory of its own.
    engines = make_engines(model, settings.engine, _NAMES, room)
    encoder = engines["prefix"]
    table = LiveTable(console, "decoding, all agents at once, bfloat16", _COLUMNS)
    with started_vllm(
        settings, console, model, notes, max_context=longest, num_tokens=room
    ) as vllm:
        for size in sizes:
            agents, num_shared, num_own = size
            prompts = make_prompts(encoder, *size, settings.seed)
            with console.status(f"{agents} agents: prefill, then steps in turn ..."):
                seconds = _time_steps(engines, prompts, num_steps)
            if vllm is not None and size == headline_size:
                with console.status(f"{agents} agents in vLLM ..."):
                    seconds["vllm"] = _time_vllm_steps(vllm, encoder, prompts, num_steps)
            ours_s = statistics.median(seconds["collective"])
            for mode, steps_s in seconds.items():
                median = statistics.median(steps_s)
                table.add(
                    {
                        "agents": agents,
                        "shared": num_shared,
                        "own": num_own,
                        "mode": mode,
                        "tokens_per_s": agents / median,
                        "step_ms": 1000 * median,
                        "min_ms": 1000 * min(steps_s),
                        "max_ms": 1000 * max(steps_s),
                        "vs_mode": median / ours_s,
                    }
                )
    best = {
        row["mode"]: row["vs_mode"]
        for row in table.rows
        if (row["agents"], row["shared"], row["own"]) == headline_size
    }
    headline = {"speedup_vs_dense_32": best.get("dense"), "speedup_vs_vllm_32": best.get("vllm")}
    return SuiteResult("decode", settings.model, table.rows, headline, notes)


def make_prompts(llm: LLM, agents: int, num_shared: int, num_own: int, seed: int) -> list[Prompt]:
    """Prompts of real text with exact lengths: own tokens, then shared ones, then a last own one.

    Each agent's own text is a shuffle of the example town's lines, and so is the shared text.
    """
    rng = random.Random(seed)
    lines = [line for person in read_people(TOWN) for line in person.system.split("\n")]

    def text(length: int) -> list[int]:
        ids: list[int] = []
        while len(ids) < length:
            ids += llm.encoder.text_ids(" ".join(rng.sample(lines, len(lines)))).tolist()
        return ids[:length]

    return prompts_around(text(num_shared), [text(num_own) for _ in range(agents)])


def _time_steps(
    engines: Mapping[str, LLM], prompts: list[Prompt], num_steps: int
) -> dict[str, list[float]]:
    """Seconds of each mode's decoding steps, in turn; the first two of each do not count."""
    rounds = {
        name: DecodingRound(engines[mode], prompts, num_steps + 2) for mode, name in _NAMES.items()
    }
    steps = {name: decoding.step for name, decoding in rounds.items()}
    seconds = in_turn(steps, num_steps, warm_up=2)
    for decoding in rounds.values():
        decoding.close()
    return seconds


def _time_vllm_steps(vllm: VLLM, llm: LLM, prompts: list[Prompt], num_steps: int) -> list[float]:
    """Seconds per step of vLLM, its prefix cache filled: a long answer's time less a short one's.

    Both calls find the prompts in the cache, so what differs is the decoding.
    """
    ids = [llm.encoder.encode(prompt).token_ids.tolist() for prompt in prompts]
    vllm.reset()
    vllm.run(ids, 1)
    short = sorted(vllm.run(ids, 1).seconds for _ in range(3))
    long = sorted(vllm.run(ids, 1 + num_steps).seconds for _ in range(3))
    return [(b - a) / num_steps for a, b in zip(short, long, strict=True)]


def plot(result: SuiteResult, path: Path) -> None:
    """Draw tokens per second by agents, at the longest shared run."""
    _, num_shared, num_own = max((row["agents"], row["shared"], row["own"]) for row in result.rows)
    rows = [row for row in result.rows if (row["shared"], row["own"]) == (num_shared, num_own)]
    title = f"Decoding, {num_shared} shared and {num_own} own tokens, {result.model}"
    draw_lines(
        path, rows, "mode", "agents", "tokens_per_s", title=title, y_label="tokens per second"
    )
