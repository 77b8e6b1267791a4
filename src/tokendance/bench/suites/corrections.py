"""`corrections`: what corrections cost and buy, by the number of agents and the order of blocks.

The default follows what was measured of the model (`fidelity/balanced.py`); beside it are a fixed
correction, none, and `pic`. For each round: the KL from full computation over forced answers of a
few of its agents, who read all of its blocks, in the same dtype; and the seconds of the prefill of
all its agents, whose private parts are in the store. Texts are the same in every round of a
workload; a smaller round has the first agents and blocks of a larger one.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console

from tokendance.bench.arms import load, make_engine, run_checked
from tokendance.bench.plots import draw_lines
from tokendance.bench.settings import BenchSettings
from tokendance.bench.suite import LiveTable, Row, SuiteResult, in_turn
from tokendance.bench.workload import Order, RoundWorkload, WorkloadSpec, write_texts
from tokendance.collector.correction import DEFAULT_CORRECTION, USUAL_EDGES
from tokendance.fidelity.measure import Reference, measure_fidelity, reference_answers
from tokendance.llm import LLM
from tokendance.models.loader import LoadedModel
from tokendance.options import ReuseMode

PIC: ReuseMode = "pic-batched"
KINDS = (PIC, "none", USUAL_EDGES.spec, DEFAULT_CORRECTION)
ORDERS: tuple[Order, ...] = ("same", "permuted", "own-first")
_COLUMNS = {
    "agents": "agents",
    "order": "order",
    "kind": "correction",
    "corrected": "corrected",
    "computed": "computed",
    "seconds": "seconds",
    "kl_next": "KL next",
    "kl": "KL",
    "top1": "top-1",
    "kl_vs_pic": "KL / pic",
}


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is measured."""

    spec: WorkloadSpec  # of the largest round
    agents: tuple[int, ...]  # of each round
    readers: int = 6  # agents whose answers are compared, at most
    tokens: int = 24  # of each forced answer
    repeats: int = 3  # of each timed round; those that take long are timed once
    repeats_up_to: int = 10  # agents


def _make_plan(settings: BenchSettings) -> _Plan:
    spec = WorkloadSpec(50, source=settings.source, seed=settings.seed)
    if settings.tiny:
        small = replace(spec, agents=3, block_tokens=40, private_tokens=(40, 80))
        return _Plan(small, (2, 3), readers=3, tokens=4, repeats=1)
    return _Plan(spec, (2, 5, 10, 25, 50))


def run(settings: BenchSettings, console: Console) -> SuiteResult:
    """Measure the suite; see the module. `settings.repeats` is the number of workloads.

    Returns:
        A row for each (agents, order, kind), each figure the mean over the workloads.
    """
    plan, model = _make_plan(settings), load(settings)
    found: dict[tuple[int, Order, str], list[Row]] = {}
    for seed in range(plan.spec.seed, plan.spec.seed + settings.repeats):
        with console.status("") as status:
            for row in _measure(replace(plan.spec, seed=seed), plan, model, settings):
                status.update(f"seed {seed}: {row['agents']} agents, {row['order']} ...")
                found.setdefault((row["agents"], row["order"], row["kind"]), []).append(row)
    table = LiveTable(console, "What corrections cost and buy", _COLUMNS)
    rows = [_mean(of_workloads) for of_workloads in found.values()]
    pic = {(row["agents"], row["order"]): row["kl"] for row in rows if row["kind"] == PIC}
    for row in rows:
        table.add(row | {"kl_vs_pic": _ratio(row["kl"], pic[row["agents"], row["order"]])})
    notes = [
        f"Over {settings.repeats} workloads of {settings.source}, in {model.precision}.",
        f"KL in nats over forced answers of {plan.readers} agents of each round, over those that "
        "reuse; seconds of the prefill of all agents.",
    ]
    return SuiteResult("corrections", settings.model, table.rows, _headline(table.rows), notes)


def _measure(
    spec: WorkloadSpec, plan: _Plan, model: LoadedModel, settings: BenchSettings
) -> Iterator[Row]:
    """Rows of one workload."""
    # Private parts once, and what all read and answer for each agent.
    longest = spec.private_tokens[1] + spec.agents * (spec.block_tokens + 30) + 400
    room = 2 * spec.agents * longest
    exact = make_engine(model, settings.engine, "prefix", room)
    texts = write_texts(exact, spec)
    engines = {
        kind: make_engine(model, settings.engine, PIC, room)
        if kind == PIC
        else make_engine(model, settings.engine, "collective", room, correction=kind)
        for kind in KINDS
    }
    for agents in plan.agents:
        for order in ORDERS:
            whole = texts.arrange(order).head(agents)
            heard = whole.head(min(agents, plan.readers), agents)
            answers = reference_answers(exact, heard.prompts(), plan.tokens)
            repeats = plan.repeats if agents <= plan.repeats_up_to else 1
            seconds = _times(engines, whole, repeats)
            for kind, llm in engines.items():
                yield {
                    "agents": agents,
                    "order": order,
                    "kind": kind,
                    **_fidelity(llm, whole, heard, answers),
                    **seconds[kind],
                }


def _times(engines: Mapping[str, LLM], workload: RoundWorkload, repeats: int) -> dict[str, Row]:
    """Seconds of a round's prefill, and the tokens that it computes, by kind."""
    computed: dict[str, int] = {}

    def prefill_s(kind: str) -> float:
        llm = engines[kind]
        workload.warm(llm, keep=True)
        stats = run_checked(llm, workload.prompts(), 1).stats
        computed[kind] = stats.computed_tokens
        return stats.prefill_s

    found = in_turn({kind: partial(prefill_s, kind) for kind in engines}, repeats, int(repeats > 1))
    return {
        kind: {"seconds": statistics.median(seconds), "computed": computed[kind]}
        for kind, seconds in found.items()
    }


def _fidelity(
    llm: LLM, whole: RoundWorkload, heard: RoundWorkload, answers: Sequence[Reference]
) -> Row:
    whole.warm(llm, keep=True)  # of all agents, so that none is computed again for the next round
    fidelity = measure_fidelity(llm, heard.prompts(), answers)
    return {
        "corrected": fidelity.corrected,
        "kl_next": fidelity.kl_next,
        "kl": fidelity.kl_continuation,
        "top1": fidelity.top1,
    }


def _mean(rows: Sequence[Row]) -> Row:
    """One row of those of several workloads."""
    names = ("corrected", "computed", "seconds", "kl_next", "kl", "top1")
    return (
        rows[0]
        | {name: statistics.mean(row[name] for row in rows) for name in names}
        | {"kl_of_workloads": [row["kl"] for row in rows]}
    )


def _ratio(kl: float, other: float) -> float | None:
    """How many times as far one is; None where the other is exact."""
    return kl / other if other else None


def _headline(rows: Sequence[Row]) -> dict[str, float | None]:
    """The default against the fixed correction, in one order for all."""
    by_kind = {(row["agents"], row["kind"]): row for row in rows if row["order"] == "same"}
    headline: dict[str, float | None] = {}
    for agents in sorted({row["agents"] for row in rows}):
        default, fixed = (by_kind[agents, kind] for kind in (DEFAULT_CORRECTION, USUAL_EDGES.spec))
        headline[f"kl_ratio_{agents}"] = _ratio(default["kl"], fixed["kl"])
        headline[f"speedup_{agents}"] = fixed["seconds"] / default["seconds"]
    return headline


def plot(result: SuiteResult, path: Path) -> None:
    """Draw KL by agents in one order for all, a line per kind."""
    rows = [row for row in result.rows if row["order"] == "same"]
    title = f"KL over the answer, one order, {result.model}"
    draw_lines(path, rows, "kind", "agents", "kl", title=title, y_label="nats", log_y=True)
