"""`decode --engine vllm`: tokens per second while all agents decode.

Lengths are those of `decode`; tokens are random, so that agents have nothing in common but the run
that all read. Clients say nothing of it. A step is a long answer's time less a short one's: both
find their prompts in place, so what differs is the decoding.
"""

import random
import statistics
from functools import partial
from pathlib import Path

from rich.console import Console

from tokendance.bench.arms import context_too_short, load
from tokendance.bench.inside import INSIDE, PLAIN, started_pair
from tokendance.bench.plots import draw_lines
from tokendance.bench.settings import BenchSettings
from tokendance.bench.suite import LiveTable, SuiteResult, in_turn, ratio
from tokendance.bench.suites.decode import HEADLINE_SIZE, TINY_SIZES
from tokendance.bench.vllm import VLLM
from tokendance.errors import BaselineError

_COLUMNS = {
    "agents": "agents",
    "shared": "shared",
    "own": "own",
    "mode": "vLLM",
    "tokens_per_s": "tokens/s",
    "step_ms": "ms a step",
    "min_ms": "min",
    "max_ms": "max",
    "vs_plain": "times faster",
}


def run(settings: BenchSettings, console: Console) -> SuiteResult:
    """Measure the suite; see the module."""
    model = load(settings)
    agents, num_shared, num_own = TINY_SIZES[-1] if settings.tiny else HEADLINE_SIZE
    num_steps = 4 if settings.tiny else 32
    longest = num_shared + num_own + num_steps + 8
    if longest > model.shape.max_context:
        raise context_too_short(model)
    prompts = _make_prompts(agents, num_shared, num_own, model.shape.vocab_size, settings.seed)
    notes: list[str] = []
    with started_pair(
        settings.model,
        console,
        model,
        notes,
        max_context=longest,
        num_tokens=2 * agents * longest,
    ) as engines:
        for name, vllm in engines.items():
            with console.status(f"{name}: the prefill of {agents} agents ..."):
                vllm.reset()
                vllm.run(prompts, 1)
        with console.status("Answers in turn ..."):
            kinds = {
                name: partial(_step_seconds, vllm, prompts, num_steps)
                for name, vllm in engines.items()
            }
            seconds = in_turn(kinds, settings.repeats)
    table = LiveTable(console, "decoding inside vLLM, all agents at once", _COLUMNS)
    for name, steps_s in seconds.items():
        median = statistics.median(steps_s)
        table.add(
            {
                "agents": agents,
                "shared": num_shared,
                "own": num_own,
                "mode": name,
                "tokens_per_s": agents / median,
                "step_ms": 1000 * median,
                "min_ms": 1000 * min(steps_s),
                "max_ms": 1000 * max(steps_s),
                "vs_plain": ratio(seconds[PLAIN], steps_s),
            }
        )
    headline: dict[str, float | None] = {"speedup": ratio(seconds[PLAIN], seconds[INSIDE])}
    return SuiteResult("decode", settings.model, table.rows, headline, notes)


def _make_prompts(
    agents: int, num_shared: int, num_own: int, vocabulary: int, seed: int
) -> list[list[int]]:
    """Own tokens, then the shared ones, then own ones again: another number for each."""
    rng = random.Random(seed)

    def draw(count: int) -> list[int]:
        return rng.choices(range(10, vocabulary), k=count)

    shared = draw(num_shared)
    prompts = []
    for index in range(agents):
        own, last = draw(num_own), 1 + index % (num_own // 4)
        prompts.append([*own[last:], *shared, *own[:last]])
    return prompts


def _step_seconds(vllm: VLLM, prompts: list[list[int]], num_steps: int) -> float:
    """Seconds of a step.

    Raises:
        BaselineError: if anything but the answers was computed in the difference.
    """
    short, long = vllm.run(prompts, 1), vllm.run(prompts, 1 + num_steps)
    num_computed = long.computed_tokens - short.computed_tokens
    if num_computed != num_steps * len(prompts):
        raise BaselineError(
            f"vLLM computed {num_computed} tokens in {num_steps} steps of {len(prompts)} agents, so"
            " it did not find all prompts in place, and the time is not that of decoding."
        )
    return (long.seconds - short.seconds) / num_steps


def plot(result: SuiteResult, path: Path) -> None:
    """Draw tokens per second by agents."""
    title = f"Decoding inside vLLM, {result.model}"
    draw_lines(path, result.rows, "mode", "agents", "tokens_per_s", title=title, y_label="tokens/s")
