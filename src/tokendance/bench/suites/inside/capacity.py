"""`capacity --engine vllm`: the most agents whose round stays within a time.

As in `capacity`: from prompts to the last of 32 answer tokens each, private parts in the prefix
cache before.
"""

from pathlib import Path

from rich.console import Console

from tokendance.bench.arms import load, make_engine, timed_spec, vllm_round
from tokendance.bench.inside import INSIDE, PLAIN, started_pair
from tokendance.bench.plots import draw_bars
from tokendance.bench.settings import BenchSettings
from tokendance.bench.suite import LiveTable, SuiteResult
from tokendance.bench.suites.capacity import ANSWER_TOKENS, Search, largest_round
from tokendance.bench.vllm import VLLM
from tokendance.bench.workload import generate_workload

_COLUMNS = {
    "mode": "engine",
    "limit": "limit",
    "agents": "agents",
    "seconds": "seconds",
    "next_seconds": "one size more",
}


def run(settings: BenchSettings, console: Console) -> SuiteResult:
    """Measure the suite; see the module."""
    model = load(settings)
    objective_s, limit, longest = largest_round(model, tiny=settings.tiny)
    writer = make_engine(model, settings.engine, "prefix", limit * longest)
    with console.status(f"The model writes the blocks of {limit} agents ..."):
        workload = generate_workload(writer, timed_spec(settings, limit))
    table = LiveTable(console, f"most agents within {objective_s:.0f} s, inside vLLM", _COLUMNS)
    notes: list[str] = []
    agents: dict[str, int] = {}
    with started_pair(
        settings.model,
        console,
        model,
        notes,
        max_context=longest,
        num_tokens=limit * longest // 2,
    ) as engines:
        for name, vllm in engines.items():

            def measure(size: int, vllm: VLLM = vllm) -> float:
                return vllm_round(vllm, writer, workload.head(size), ANSWER_TOKENS).seconds

            measure(2)  # warms up
            search = Search(measure, objective_s, limit)
            with console.status(f"{name}: looking for the largest round in time ..."):
                agents[name] = search.largest()
            table.add({"mode": name, **search.row(agents[name])})
    headline: dict[str, float | None] = {
        "agents_vllm": agents[PLAIN],
        "agents_inside": agents[INSIDE],
        "ratio": agents[INSIDE] / agents[PLAIN] if agents[PLAIN] else None,
    }
    return SuiteResult("capacity", settings.model, table.rows, headline, notes)


def plot(result: SuiteResult, path: Path) -> None:
    """Draw agents by engine."""
    title = f"Most agents inside vLLM, {result.model}"
    draw_bars(path, result.rows, "mode", "limit", "agents", title=title, y_label="agents")
