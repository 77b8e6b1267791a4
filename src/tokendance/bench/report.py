"""The report of `tokendance bench all`: headlines, tables and plots of all suites in one page."""

import datetime
from collections.abc import Sequence
from pathlib import Path

from tokendance.bench.settings import RIVAL_SUITES, BenchSettings
from tokendance.bench.suite import Row, SuiteResult, describe_machine
from tokendance.results import write_result


def write_report(results: Sequence[SuiteResult], settings: BenchSettings, folder: Path) -> Path:
    """Write `report.md` beside the plots of its suites, and return its path."""
    machine = ", ".join(f"{key} {value}" for key, value in describe_machine().items())
    lines = [
        "# Benchmarks",
        "",
        f"{datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}. {machine}. Model: {results[0].model}.",
    ]
    for result in results:
        lines += ["", f"## {result.suite}", "", f"    {_command(result, settings)}", ""]
        lines += _table([{"headline": k, "figure": v} for k, v in result.headline.items()])
        lines += ["", f"![{result.suite}]({result.suite}.svg)"]
        for rows in _kinds(result.rows):
            lines += ["", *_table(rows)]
        lines += ["", *(f"- {note}" for note in result.notes)]
    path = folder / "report.md"
    write_result(path, "\n".join(lines).rstrip() + "\n", "Give --out another path.")
    return path


def _command(result: SuiteResult, settings: BenchSettings) -> str:
    """The command that gives a suite's figures again."""
    command = f"tokendance bench {result.suite} --model {settings.model}"
    command += f" --repeats {settings.repeats} --seed {settings.seed}"
    if settings.source != "town":
        command += f" --source {settings.source}"
    if settings.tiny:
        command += " --size tiny"
    if settings.engine.weights != "native":
        command += f" --weights {settings.engine.weights}"
    if settings.against is not None and result.suite in RIVAL_SUITES[settings.against]:
        command += f" --against {settings.against}"
    return command


def _kinds(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows with the same keys make one table."""
    kinds: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        kinds.setdefault(tuple(row), []).append(row)
    return list(kinds.values())


def _table(rows: Sequence[Row]) -> list[str]:
    """A Markdown table; what is a list or a mapping stays in the JSON file."""
    columns = [key for key, value in rows[0].items() if not isinstance(value, list | dict)]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(_cell(row[key]) for key in columns)} |" for row in rows]
    return lines


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
