"""`rounds`: whether reuse of reuse adds up: fidelity of each round that people talk.

An engine that computes everything plays the rounds. The others are given its prompts and made to
say its answers, so all read the same words, and each has of earlier rounds what it computed itself:

    round 1   [system] [task] -> answer                               nothing is shared yet
    round 2   [system] [task] [answer] [all answers of round 1] ...   KV behind one owner's text
    round 3   what stands before is reused, and is itself near only

KL as in the fidelity suite, over the agents whose prompt has KV of another context in all engines;
over all agents where that is nobody, as may be with two.
"""

import itertools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from tokendance.bench.arms import forced_answers, load, make_engine, talk
from tokendance.bench.facts import shuffled
from tokendance.bench.plots import draw_lines
from tokendance.bench.settings import BenchSettings
from tokendance.bench.suite import LiveTable, SuiteResult
from tokendance.bench.suites.fidelity import DEFAULT, DISTANCES, Kind, summary_of
from tokendance.bench.workload import read_people
from tokendance.collector.correction import USUAL_EDGES
from tokendance.fidelity.measure import Fidelity, compare_round, fidelity_of, forced_reference
from tokendance.models.loader import LoadedModel

PIC = Kind("pic-batched", None)
KINDS = (PIC, Kind("collective", "none"), Kind("collective", USUAL_EDGES.spec), DEFAULT)
_COLUMNS = {
    "kind": "kind",
    "round": "round",
    "agents": "agents",
    "corrected": "corrected",
    **DISTANCES,
}


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is measured."""

    agents: int
    rounds: int
    tokens: int  # most of an answer


def _make_plan(settings: BenchSettings) -> _Plan:
    return _Plan(3, 3, 8) if settings.tiny else _Plan(10, 5, 48)


def run(settings: BenchSettings, console: Console) -> SuiteResult:
    """Measure the suite; see the module. `settings.repeats` is the number of workloads.

    Returns:
        A row for each kind and round from the second on, each figure the mean over the workloads.
    """
    plan, model = _make_plan(settings), load(settings, "float32")
    found: dict[tuple[str, int], list[Fidelity]] = {}
    for seed in range(settings.seed, settings.seed + settings.repeats):
        with console.status("") as status:
            for label, number, fidelity in _measure(model, settings, plan, seed):
                status.update(f"seed {seed}: round {number}, {label} ...")
                found.setdefault((label, number), []).append(fidelity)
    table = LiveTable(console, "Fidelity of each round against full computation", _COLUMNS)
    kinds = [_label(kind) for kind in KINDS]
    for label, number in sorted(found, key=lambda key: (kinds.index(key[0]), key[1])):
        of_workloads = found[label, number]
        agents = statistics.mean(len(fidelity.agents) for fidelity in of_workloads)
        row = {"kind": label, "round": number, "agents": agents}
        table.add(row | summary_of(of_workloads))
    by_kind = {(row["kind"], row["round"]): row for row in table.rows}
    headline = {
        f"kl_{when}_{kind.mode.split('-')[0]}": by_kind[_label(kind), number]["kl"]
        for kind in (PIC, DEFAULT)
        for when, number in (("second", 2), ("last", plan.rounds))
    }
    notes = [
        f"Over {settings.repeats} workloads of {plan.agents} people of {settings.source} in "
        "float32; smallest and largest are means of a workload.",
        "agents: those whose prompt has KV of another context, in all engines (all of them, where "
        "that is nobody); figures are over them. KL in nats over the answers of full computation. "
        "corrected: tokens of an agent in that round; the line none corrects nothing.",
    ]
    return SuiteResult("rounds", settings.model, table.rows, headline, notes)


def _measure(
    model: LoadedModel, settings: BenchSettings, plan: _Plan, seed: int
) -> Iterator[tuple[str, int, Fidelity]]:
    """What each kind shows in one workload, round after round: its label, the round, and that."""
    people = shuffled(read_people(settings.source), np.random.default_rng(seed))[: plan.agents]
    heard = plan.rounds * len(people) * (plan.tokens + 20)
    # A text has fewer tokens than characters.
    room = len(people) * (max(len(person.system) for person in people) + heard)
    exact = make_engine(model, settings.engine, "prefix", room)
    engines = {
        kind: make_engine(model, settings.engine, kind.mode, room, correction=kind.correction)
        for kind in KINDS
    }
    talking = talk(exact, people, plan.rounds, plan.tokens, seed)
    for number, played in enumerate(talking, 1):
        answers = forced_reference(exact, played.prompts, forced_answers(exact, played))
        compared = {
            kind: compare_round(llm, played.prompts, answers) for kind, llm in engines.items()
        }
        if number == 1:
            continue  # there is nothing yet that all read
        # One owner is exact, and it need not be the same one in all engines.
        common = [
            all(agent.is_mirror for agent in agents)
            for agents in zip(*compared.values(), strict=True)
        ]
        for kind, agents in compared.items():
            mirrors = list(itertools.compress(agents, common))
            yield _label(kind), number, fidelity_of(mirrors or agents)


def _label(kind: Kind) -> str:
    return kind.correction or kind.mode


def plot(result: SuiteResult, path: Path) -> None:
    """Draw the KL of each round, a line per kind."""
    title = f"KL from full computation by round, {result.model}"
    draw_lines(path, result.rows, "kind", "round", "kl", title=title, y_label="nats")
