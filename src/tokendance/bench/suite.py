"""What every benchmark suite has in common: a live table, fair turns, a JSON line.

A suite measures on one machine in one process and returns rows (what was measured) and a headline
(the few figures that claims are made of). Ratios come from runs in turn: each kind runs once
without being counted, then all of them in turn, so that a machine whose speed drifts slows all
alike.
"""

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:  # it is not there where only the engine is (gpu/)
    from rich.console import Console

Row = dict[str, Any]
Kind = TypeVar("Kind", bound=Hashable)


@dataclass(frozen=True, slots=True)
class SuiteResult:
    """What a suite found."""

    suite: str
    model: str
    rows: list[Row]  # one mapping per measurement; the same keys in all rows of a kind
    headline: dict[str, float | None]  # None where it was not measured; `notes` say why
    notes: list[str] = field(default_factory=list)  # what a reader must know

    def to_json(self) -> str:
        """One line: suite, machine, model, rows, headline, notes."""
        document = {"suite": self.suite, "machine": describe_machine()} | asdict(self)
        return json.dumps(document, ensure_ascii=False)


class LiveTable:
    """A table that grows while the work goes on, a line per row.

    Not rich's: that one measures all rows before it prints the first.

    Attributes:
        rows: all that were added.
    """

    def __init__(self, console: "Console", title: str, columns: Mapping[str, str]) -> None:
        """Print title and headings; `columns` has the heading of each key of a row."""
        self.rows: list[Row] = []
        self._console = console
        self._widths = {key: max(len(heading), 11) + 2 for key, heading in columns.items()}
        console.print(f"\n[bold]{title}[/bold]")
        self._print(columns)

    def add(self, *rows: Row) -> None:
        """Print rows, right-aligned under the headings; keys without a column are left out."""
        for row in rows:
            self.rows.append(row)
            self._print({key: _cell(row.get(key)) for key in self._widths})

    def _print(self, cells: Mapping[str, str]) -> None:
        line = "".join(cells[key].rjust(width) for key, width in self._widths.items())
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def in_turn(
    kinds: Mapping[Kind, Callable[[], float]],
    repeats: int,
    warm_up: int = 1,
    *,
    until_s: float = math.inf,
) -> dict[Kind, list[float]]:
    """Return what each kind's runs return, in turn, after `warm_up` turns that do not count.

    Every other turn goes backwards, so that no kind is always the one that runs later. One turn
    counts; after it, none begins that would end later than `until_s`, a clock time.
    """
    values: dict[Kind, list[float]] = {name: [] for name in kinds}
    turn_s = 0.0
    for turn in range(repeats + warm_up):
        start = time.perf_counter()
        if turn > warm_up and start + turn_s > until_s:
            break
        for name in list(kinds)[:: -1 if turn % 2 else 1]:
            value = kinds[name]()
            if turn >= warm_up:
                values[name].append(value)
        turn_s = time.perf_counter() - start
    return values


def between(
    kinds: Mapping[Kind, Callable[[], float]], base: Kind
) -> tuple[dict[Kind, list[float]], dict[Kind, float]]:
    """Run each kind once, with a run of `base` before and after it; for what takes minutes.

    `base` runs once more at first, without being counted.

    Returns:
        For each kind what its runs returned; and for each the ratio of its run to the mean of the
        two of `base` beside it.
    """
    kinds[base]()
    values: dict[Kind, list[float]] = {base: [kinds[base]()]}
    ratios: dict[Kind, float] = {base: 1.0}
    for name, run in kinds.items():
        if name is not base:
            values[name] = [run()]
            values[base].append(kinds[base]())
            ratios[name] = values[name][0] / statistics.mean(values[base][-2:])
    return values, ratios


def timed(work: Callable[[], object]) -> float:
    """Seconds that some work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median of the ratios of runs of the same turn."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def spread(values: Sequence[float]) -> Row:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def describe_machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
