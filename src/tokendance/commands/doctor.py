"""`tokendance doctor`: what is there, what is not, and what to do about it."""

import os
import platform
from dataclasses import dataclass
from importlib.metadata import version

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokendance.attention.backends import WHY_NOT_NATIVE
from tokendance.bench.suite import describe_machine
from tokendance.bench.vllm import HOW_TO_INSTALL, find_vllm
from tokendance.models import demo
from tokendance.models.loader import choose_dtype, dtype_name


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the examination.

    Attributes:
        what: was looked at.
        found: in a few words.
        advice: what would be better and how to get it; None where all is well.
    """

    what: str
    found: str
    advice: str | None = None


def examine(console: Console) -> None:
    """Print a table of findings."""
    table = Table(title="What TokenDance has here", show_lines=False)
    for heading in ("", "found", "advice"):
        table.add_column(heading, overflow="fold")
    for finding in _findings():
        mark = "[green]ok[/green]" if finding.advice is None else "[yellow]--[/yellow]"
        table.add_row(
            f"{mark} {escape(finding.what)}", escape(finding.found), escape(finding.advice or "")
        )
    console.print(table)


def _findings() -> list[Finding]:
    machine = describe_machine()
    dtype = dtype_name(choose_dtype("auto", torch.device("cpu")))
    return [
        Finding(
            "machine",
            f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
            f"{platform.system()} {platform.machine()}",
        ),
        Finding(
            "versions",
            f"tokendance {version('tokendance')}, Python {machine['python']}, "
            f"torch {machine['torch']}, transformers {machine['transformers']}",
        ),
        _threads(),
        Finding("dtype that auto takes", dtype),
        _attention(),
        _huge_pages(),
        _cuda(),
        *(_demo(alias) for alias in demo.MODELS),
        _vllm(),
    ]


def _threads() -> Finding:
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    advice = None
    if threads > cores:
        advice = f"More threads than the {cores} cores slow each other down: set OMP_NUM_THREADS."
    return Finding("threads of torch", str(threads), advice)


def _attention() -> Finding:
    if WHY_NOT_NATIVE is not None:
        return Finding(
            "attention kernel",
            f"torch; the native one is not there ({WHY_NOT_NATIVE})",
            "Several times slower attention. Install a C++17 compiler (g++ 12 or clang 15, or "
            "newer) and CMake, and install the package again.",
        )
    from tokendance.attention import _native

    used, *others = _native.kernels()
    found = f"native: {used}" + (f" (also {', '.join(others)})" if others else "")
    advice = None
    if _native.thread_source() != "openmp":
        advice = "No OpenMP runtime of torch was found; threads of its own may disturb torch's."
    return Finding("attention kernel", found, advice)


def _huge_pages() -> Finding:
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled", encoding="ascii") as file:
            setting = file.read().partition("[")[2].partition("]")[0]
    except OSError:
        return Finding("huge pages", "not known on this system")
    advice = None
    if setting == "never":
        advice = "Decoding reads memory faster with them: set transparent_hugepage to madvise."
    return Finding("huge pages", setting, advice)


def _cuda() -> Finding:
    if not torch.cuda.is_available():
        return Finding("CUDA", "none")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Finding("CUDA", ", ".join(names))


def _demo(alias: str) -> Finding:
    missing = demo.why_missing(alias)
    return Finding(f"model {alias}", "at hand" if missing is None else "not installed", missing)


def _vllm() -> Finding:
    python = find_vllm()
    if python is None:
        return Finding("vLLM, for --against", "not installed", HOW_TO_INSTALL)
    return Finding("vLLM, for --against", str(python))
