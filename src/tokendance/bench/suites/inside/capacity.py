"""`capacity --engine vllm`: the most agents whose round stays within a time.

As in `capacity`: from prompts to the last of 32 answer tokens each, private parts in the prefix
cache before. The time is shorter, as each engine is asked a dozen times. Clients name the blocks,
so that the edges of each are corrected. What each engine is found to serve then runs in turn.
"""

from functools import partial
from pathlib import Path

from rich.console import Console

from tokendance.bench.arms import context_too_short, load, make_engine, timed_spec
from tokendance.bench.inside import PLAIN, TAGGED, rounds, started_pair, time_in_turn
from tokendance.bench.plots import draw_bars
from tokendance.bench.settings import BenchSettings
from tokendance.bench.suite import LiveTable, SuiteResult, spread
from tokendance.bench.suites.capacity import ANSWER_TOKENS, Search
from tokendance.bench.workload import generate_workload

OBJECTIVE_S = 5.0
LIMIT, TINY_LIMIT = 40, 4  # most agents that are tried
_COLUMNS = {
    "mode": "vLLM",
    "limit": "limit",
    "agents": "agents",
    "seconds": "seconds",
    "next_seconds": "one size more",
    "median": "in turn",
    "min": "min",
    "max": "max",
    "blocks": "KV blocks",
}


def run(settings: BenchSettings, console: Console) -> SuiteResult:
    """Measure the suite; see the module."""
    model = load(settings)
    limit = TINY_LIMIT if settings.tiny else LIMIT
    longest = 1200 + 110 * limit
    if longest > model.shape.max_context:
        raise context_too_short(model)
    notes: list[str] = []
    with started_pair(
        settings.model,
        console,
        model,
        notes,
        max_context=longest,
        num_tokens=limit * longest // 2,  # half of them fit without sharing
    ) as engines:
        writer = make_engine(model, settings.engine, "prefix", limit * longest // 2)
        with console.status(f"The model writes the blocks of {limit} agents ..."):
            workload = generate_workload(writer, timed_spec(settings, limit))

        def seconds(name: str, size: int) -> float:
            return rounds(engines, writer, workload.head(size), ANSWER_TOKENS)[name]().seconds

        searches: dict[str, Search] = {}
        agents: dict[str, int] = {}
        for name in (PLAIN, TAGGED):
            with console.status(f"{name}: looking for the largest round in time ..."):
                seconds(name, 2)  # warms up
                searches[name] = Search(partial(seconds, name), OBJECTIVE_S, limit)
                agents[name] = searches[name].largest()
            console.print(f"{name}: {agents[name]} agents.")
        with console.status("Both in turn ..."):
            timed = time_in_turn(
                {
                    name: rounds(engines, writer, workload.head(size), ANSWER_TOKENS)[name]
                    for name, size in agents.items()
                    if size > 0
                },
                settings.repeats,
                warm_up=0,
            )
    table = LiveTable(console, f"most agents within {OBJECTIVE_S:.0f} s, inside vLLM", _COLUMNS)
    for name, search in searches.items():
        row = {"mode": name, **search.row(agents[name])}
        if name in timed:
            runs = timed[name]
            assert runs.last is not None
            row |= {**spread(runs.seconds), "blocks": runs.last.peak_blocks}
        table.add(row)
    headline: dict[str, float | None] = {
        "agents_plain": agents[PLAIN],
        "agents_inside": agents[TAGGED],
        "ratio": agents[TAGGED] / agents[PLAIN] if agents[PLAIN] else None,
    }
    return SuiteResult("capacity", settings.model, table.rows, headline, notes)


def plot(result: SuiteResult, path: Path) -> None:
    """Draw agents by kind."""
    title = f"Most agents inside vLLM, {result.model}"
    draw_bars(path, result.rows, "mode", "limit", "agents", title=title, y_label="agents")
