"""`decode --engine vllm`: tokens per second while all agents decode.

The prompts are those of `decode`. A long answer's time less a short one's, so that what differs is
the decoding; both find their prompts in place.
"""

import statistics
from pathlib import Path

from rich.console import Console

from tokendance.bench.arms import context_too_short, load, make_engine
from tokendance.bench.inside import INSIDE, PLAIN, started_pair
from tokendance.bench.plots import draw_lines
from tokendance.bench.settings import BenchSettings
from tokendance.bench.suite import LiveTable, SuiteResult, in_turn, ratio
from tokendance.bench.suites.decode import HEADLINE_SIZE, TINY_SIZES, make_prompts
from tokendance.bench.vllm import VLLM

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
    size = TINY_SIZES[-1] if settings.tiny else HEADLINE_SIZE
    num_steps = 4 if settings.tiny else 32
    agents, num_shared, num_own = size
    longest = num_shared + num_own + 200
    if longest > model.shape.max_context:
        raise context_too_short(model)
    encoder = make_engine(model, settings.engine, "prefix", longest)
    prompts = [
        encoder.encoder.encode(prompt).token_ids.tolist()
        for prompt in make_prompts(encoder, *size, settings.seed)
    ]
    notes: list[str] = []
    with (
        started_pair(
            settings.model,
            console,
            model,
            notes,
            max_context=longest,
            num_tokens=2 * agents * longest,
        ) as engines,
        console.status(f"{agents} agents: prefill, then answers in turn ..."),
    ):
        for vllm in engines.values():
            vllm.reset()
            vllm.run(prompts, 1)
        kinds = {
            name: (lambda vllm=vllm: _step_seconds(vllm, prompts, num_steps))
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


def _step_seconds(vllm: VLLM, prompts: list[list[int]], num_steps: int) -> float:
    short, long = vllm.run(prompts, 1).seconds, vllm.run(prompts, 1 + num_steps).seconds
    return (long - short) / num_steps


def plot(result: SuiteResult, path: Path) -> None:
    """Draw tokens per second by agents."""
    title = f"Decoding inside vLLM, {result.model}"
    draw_lines(path, result.rows, "mode", "agents", "tokens_per_s", title=title, y_label="tokens/s")
