"""The suites by name: modules with `run(settings, console)` and `plot(result, path)`."""

from importlib import import_module
from pathlib import Path
from typing import Protocol, cast, get_args

from rich.console import Console

from tokendance.bench.settings import BenchSettings, SuiteName
from tokendance.bench.suite import SuiteResult
from tokendance.errors import ConfigError

SUITES: tuple[SuiteName, ...] = get_args(SuiteName)
VLLM_SUITES: tuple[SuiteName, ...] = ("prefill", "decode", "capacity")


class SuiteModule(Protocol):
    """What a module in `bench/suites` offers."""

    def run(self, settings: BenchSettings, console: Console) -> SuiteResult:
        """Measure, printing rows as they come."""
        ...

    def plot(self, result: SuiteResult, path: Path) -> None:
        """Draw a result as SVG."""
        ...


def load_suite(name: SuiteName) -> SuiteModule:
    """Import a suite.

    Raises:
        ConfigError: if it needs a package that is not installed.
    """
    try:
        return cast(SuiteModule, import_module(f"tokendance.bench.suites.{name}"))
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"The suite {name} needs {error.name}, which is not installed. "
            "Run pip install 'tokendance[bench,serve]'."
        ) from error
