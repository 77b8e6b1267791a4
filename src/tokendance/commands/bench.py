"""`tokendance bench`: run suites, print their tables, write JSON, plots and the report."""

import sys
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, cast

import torch
from rich.console import Console
from rich.markup import escape

from tokendance.bench.plots import NO_MATPLOTLIB
from tokendance.bench.report import write_report
from tokendance.bench.settings import (
    INSIDE_SUITES,
    RIVAL_SUITES,
    SUITES,
    BenchOutputs,
    BenchSettings,
    SuiteName,
)
from tokendance.bench.suite import SuiteResult
from tokendance.bench.vllm import VLLM_ENVIRONMENT
from tokendance.errors import ConfigError
from tokendance.results import check_writable, write_result

# Suites that make no engine, and what they measure, whatever is asked for.
_WITHOUT_ENGINE = {"attention": "every backend by itself", "weights": "every kind of weights"}


class _SuiteModule(Protocol):
    """What a module in `bench/suites` offers."""

    def run(self, settings: BenchSettings, console: Console) -> SuiteResult:
        """Measure, printing rows as they come."""

    def plot(self, result: SuiteResult, path: Path) -> None:
        """Draw a result as SVG."""


def run_bench(
    suite: SuiteName | None, settings: BenchSettings, outputs: BenchOutputs, console: Console
) -> None:
    """Run one suite, or all of them into a folder. The JSON lines are printed last, as they are.

    Raises:
        TokenDanceError: for a mistake of the user, found before anything is measured.
        SystemExit: with code 130 if the user interrupts; suites that are done are written.
    """
    _check(suite, settings, outputs)
    if settings.engine.threads is not None:
        torch.set_num_threads(settings.engine.threads)
    results: list[SuiteResult] = []
    try:
        for name in [suite] if suite is not None else SUITES:
            console.rule(f"[bold]{name}[/bold]")
            module = _load(name, settings)
            result = module.run(settings, console)
            if settings.engine.weights != "native":
                result.notes.insert(0, f"Weights of our engine: {settings.engine.weights}.")
            if settings.tiny:
                result.notes.insert(0, "A tiny run: the figures mean nothing.")
            results.append(result)
            _print_headline(result, console)
            _write(module, result, outputs, console)
    except KeyboardInterrupt:
        console.print(f"Interrupted after {len(results)} suites; nothing is left running.")
        sys.exit(130)
    finally:
        if outputs.out is not None and results:
            report = write_report(results, settings, outputs.out)
            console.print(f"The report is {escape(str(report))}.")
        for result in results:
            print(result.to_json(), flush=True)


def _load(name: SuiteName, settings: BenchSettings) -> _SuiteModule:
    """Import a suite; a ConfigError if it needs a package that is not installed."""
    room = "tokendance.bench.suites" + (".inside" if settings.inside else "")
    try:
        return cast(_SuiteModule, import_module(f"{room}.{name}"))
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"The suite {name} needs {error.name}, which is not installed. "
            "Run pip install 'tokendance[bench,serve]'."
        ) from error


def _check(suite: SuiteName | None, settings: BenchSettings, outputs: BenchOutputs) -> None:
    """Refuse what has no effect or cannot be written, before minutes of work."""
    if settings.against is not None and suite is not None:
        suites = RIVAL_SUITES[settings.against]
        if suite not in suites:
            raise ConfigError(
                f"--against {settings.against} goes with {', '.join(suites)} and all, not with "
                f"{suite}."
            )
    engine = settings.engine
    if settings.inside is not None:
        if suite not in INSIDE_SUITES:
            raise ConfigError(
                f"--engine vllm goes with {', '.join(INSIDE_SUITES)}, not with {suite or 'all'}."
            )
        if settings.against is not None:
            raise ConfigError("--engine vllm measures against plain vLLM: leave out --against.")
        if replace(engine, threads=None) != type(engine)():
            raise ConfigError(
                "vLLM runs with settings of its own. Of the engine's options --engine vllm takes"
                " --threads only."
            )
        VLLM_ENVIRONMENT.require()
    if suite in _WITHOUT_ENGINE and replace(engine, threads=None) != type(engine)():
        raise ConfigError(
            f"`bench {suite}` measures {_WITHOUT_ENGINE[suite]}, on the CPU. Of the engine's "
            "options it takes --threads only."
        )
    if settings.against is not None and engine.device != "cpu":
        raise ConfigError("What --against names runs on the CPU, so it goes without --device.")
    if suite is None and outputs.out is None:
        raise ConfigError("`bench all` writes a report. Say where with --out FOLDER.")
    if suite is None and (outputs.json or outputs.plot):
        raise ConfigError("--json and --plot go with one suite; `bench all` takes --out.")
    if suite is not None and outputs.out is not None:
        raise ConfigError("--out goes with `bench all`; one suite takes --json and --plot.")
    if (outputs.plot or outputs.out) and find_spec("matplotlib") is None:
        raise ConfigError(NO_MATPLOTLIB)
    for option, path in (("--json", outputs.json), ("--plot", outputs.plot)):
        if path is not None:
            check_writable(path, f"Give {option} another path.")
    if outputs.out is not None:
        try:
            outputs.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{outputs.out} cannot be made: {error.strerror}. Give --out another path."
            ) from error
        check_writable(outputs.out / "report.md", "Give --out another path.")


def _print_headline(result: SuiteResult, console: Console) -> None:
    for key, value in result.headline.items():
        shown = "not measured" if value is None else f"{value:.3g}"
        console.print(f"  {key}: [bold]{shown}[/bold]", highlight=False)
    for note in result.notes:
        console.print(f"  {escape(note)}", highlight=False)


def _write(
    suite: _SuiteModule, result: SuiteResult, outputs: BenchOutputs, console: Console
) -> None:
    json_file, plot_file = outputs.json, outputs.plot
    if outputs.out is not None:
        json_file = outputs.out / f"{result.suite}.json"
        plot_file = outputs.out / f"{result.suite}.svg"
    if json_file is not None:
        write_result(json_file, result.to_json() + "\n", "Give another path.")
        console.print(f"The figures are in {escape(str(json_file))}.")
    if plot_file is not None:
        suite.plot(result, plot_file)
        console.print(f"The plot is {escape(str(plot_file))}.")
