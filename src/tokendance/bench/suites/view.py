"""`view`: what it costs to record rounds, so that they can be looked at.

Two engines of one model run the same rounds in turn, and one of them is recorded. Its seconds have
all that recording takes: listening on the engine's thread while the round runs, and making rounds
of what was heard, which a server does on another thread. Since two runs differ by more than that,
it is timed by itself, too.
"""

import statistics
import time
from functools import partial
from pathlib import Path

from rich.console import Console

from tokendance.bench.arms import load, make_engine, run_checked, timed_spec, wall_seconds
from tokendance.bench.plots import draw_bars
from tokendance.bench.settings import BenchSettings
from tokendance.bench.suite import LiveTable, SuiteResult, in_turn, ratio, spread, timed
from tokendance.bench.workload import RoundWorkload, generate_workload
from tokendance.engine.events import Event
from tokendance.llm import LLM
from tokendance.view.recording import Recording

_COLUMNS = {
    "agents": "agents",
    "kind": "kind",
    "median": "s a round",
    "min": "min",
    "max": "max",
    "listening_ms": "listening ms",
    "digesting_ms": "digesting ms",
}


class _Recorded:
    """An engine that is recorded, and what that took in each round.

    Attributes:
        listening: seconds on the engine's thread.
        digesting: seconds in which rounds were made of what was heard.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._recorder = Recording(llm).recorder
        self._listen = self._recorder.on_event
        self._recorder.on_event = self._on_event  # type: ignore[method-assign]
        self.listening = [0.0]
        self.digesting: list[float] = []

    def _on_event(self, event: Event) -> None:
        start = time.perf_counter()
        self._listen(event)
        self.listening[-1] += time.perf_counter() - start

    def round_seconds(self, workload: RoundWorkload, num_tokens: int) -> float:
        """Run a round; its seconds, with all of the recording."""
        workload.warm(self._llm)
        self._recorder.digest()
        self.listening.append(0.0)
        seconds = wall_seconds(run_checked(self._llm, workload.prompts(), num_tokens))
        self.digesting.append(timed(self._recorder.digest))
        return seconds + self.digesting[-1]


def _plain_seconds(llm: LLM, workload: RoundWorkload, num_tokens: int) -> float:
    workload.warm(llm)
    return wall_seconds(run_checked(llm, workload.prompts(), num_tokens))


def run(settings: BenchSettings, console: Console) -> SuiteResult:
    """Measure the suite; see the module."""
    sizes, num_tokens = ((3,), 4) if settings.tiny else ((10, 25), 64)
    table = LiveTable(console, f"rounds, answers of {num_tokens} tokens", _COLUMNS)
    headline: dict[str, float | None] = {}
    model = load(settings)
    for agents in sizes:
        room = agents * (1300 + 110 * agents)
        plain, observed = (
            make_engine(model, settings.engine, "collective", room) for _ in range(2)
        )
        workload = generate_workload(plain, timed_spec(settings, agents))
        recorded = _Recorded(observed)
        seconds = in_turn(
            {
                "plain": partial(_plain_seconds, plain, workload, num_tokens),
                "recorded": partial(recorded.round_seconds, workload, num_tokens),
            },
            settings.repeats,
        )
        recording = {
            "listening_ms": 1000 * statistics.median(recorded.listening[-settings.repeats :]),
            "digesting_ms": 1000 * statistics.median(recorded.digesting[-settings.repeats :]),
        }
        for kind, of_kind in seconds.items():
            row = {"agents": agents, "kind": kind} | spread(of_kind)
            table.add(row | (recording if kind == "recorded" else {}))
        # Of the largest round, which is measured last.
        headline["times_unrecorded"] = ratio(seconds["recorded"], seconds["plain"])
        headline["share_of_round"] = sum(recording.values()) / (
            1000 * statistics.median(seconds["recorded"])
        )
    return SuiteResult("view", settings.model, table.rows, headline)


def plot(result: SuiteResult, path: Path) -> None:
    """Draw seconds of a round, a group of bars for each number of agents."""
    title = f"Rounds, recorded and not, {result.model}"
    draw_bars(path, result.rows, "kind", "agents", "median", title=title, y_label="seconds")
