"""`prefill --engine vllm`: seconds of a round's prefill, and the KV blocks that it holds.

Rounds are those of `prefill`: every agent's private part is in the prefix cache before the clock
starts, and nothing else is; the answer is one token.
"""

from functools import partial
from pathlib import Path

from rich.console import Console

from tokendance.bench.arms import load, make_engine, timed_spec, vllm_round
from tokendance.bench.inside import INSIDE, PLAIN, started_pair, time_in_turn
from tokendance.bench.plots import draw_lines
from tokendance.bench.settings import BenchSettings
from tokendance.bench.suite import LiveTable, SuiteResult, ratio
from tokendance.bench.workload import generate_workload

SIZES = (10, 25)
TINY_SIZES = (2, 3)
_COLUMNS = {
    "agents": "agents",
    "mode": "engine",
    "prompt_tokens": "prompt",
    "computed_tokens": "computed",
    "peak_blocks": "KV blocks",
    "median": "seconds",
    "min": "min",
    "max": "max",
    "vs_vllm": "times faster",
}


def run(settings: BenchSettings, console: Console) -> SuiteResult:
    """Measure the suite; see the module."""
    model = load(settings)
    sizes = TINY_SIZES if settings.tiny else SIZES
    longest = 1200 + 110 * sizes[-1]
    room = sizes[-1] * longest
    writer = make_engine(model, settings.engine, "prefix", room)
    table = LiveTable(console, "prefill of a round inside vLLM, private parts cached", _COLUMNS)
    headline: dict[str, float | None] = {}
    notes: list[str] = []
    with started_pair(
        settings.model, console, model, notes, max_context=longest, num_tokens=2 * room
    ) as engines:
        for size in sizes:
            with console.status(f"{size} agents: texts, then rounds in turn ..."):
                workload = generate_workload(writer, timed_spec(settings, size))
                run_round = partial(vllm_round, llm=writer, workload=workload, num_tokens=1)
                timed = time_in_turn(engines, run_round, settings.repeats)
            num_prompt = sum(map(len, workload.encoded(writer)))
            for name, runs in timed.items():
                faster = ratio(timed[PLAIN].seconds, runs.seconds)
                row = {"agents": size, "mode": name, "prompt_tokens": num_prompt, **runs.row()}
                table.add(row | {"vs_vllm": faster})
            headline[f"speedup_{size}"] = ratio(timed[PLAIN].seconds, timed[INSIDE].seconds)
            blocks = {name: runs.row()["peak_blocks"] for name, runs in timed.items()}
            headline[f"blocks_{size}"] = blocks[INSIDE] / blocks[PLAIN]
    return SuiteResult("prefill", settings.model, table.rows, headline, notes)


def plot(result: SuiteResult, path: Path) -> None:
    """Draw seconds by agents, a line per engine."""
    title = f"Prefill of a round inside vLLM, {result.model}"
    draw_lines(path, result.rows, "mode", "agents", "median", title=title, y_label="seconds")
