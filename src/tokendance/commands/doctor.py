"""`tokendance doctor`: what is there, what is not, and what to do about it."""

import os
import platform
from importlib.metadata import version

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokendance.attention.backends import WHY_NOT_NATIVE
from tokendance.bench.llamacpp import LLAMACPP_ENVIRONMENT
from tokendance.bench.suite import describe_machine
from tokendance.bench.vllm import VLLM_ENVIRONMENT
from tokendance.bench.worker import Environment
from tokendance.models import demo
from tokendance.models.loader import choose_dtype, dtype_name

# What was looked at, what was found, and what would be better; None where all is well.
Finding = tuple[str, str, str | None]


def examine(console: Console) -> None:
    """Print a table of what is there, what is not, and how to get it."""
    table = Table(title="What TokenDance has here", show_lines=False)
    for heading in ("", "found", "advice"):
        table.add_column(heading, overflow="fold")
    for subject, finding, advice in _findings():
        mark = "[green]ok[/green]" if advice is None else "[yellow]--[/yellow]"
        table.add_row(f"{mark} {escape(subject)}", escape(finding), escape(advice or ""))
    console.print(table)


def _findings() -> list[Finding]:
    machine = describe_machine()
    hardware = (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"{platform.system()} {platform.machine()}"
    )
    versions = (
        f"tokendance {version('tokendance')}, Python {machine['python']}, "
        f"torch {machine['torch']}, transformers {machine['transformers']}"
    )
    dtype = dtype_name(choose_dtype("auto", torch.device("cpu")))
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    missing = {alias: demo.why_missing(alias) for alias in demo.MODELS}
    return [
        ("machine", hardware, None),
        ("versions", versions, None),
        _threads(),
        ("dtype that auto takes", dtype, None),
        _attention(),
        _huge_pages(),
        ("CUDA", ", ".join(gpus) or "none", None),
        *(
            (f"model {alias}", "at hand" if reason is None else "not installed", reason)
            for alias, reason in missing.items()
        ),
        *map(_rival, (VLLM_ENVIRONMENT, LLAMACPP_ENVIRONMENT)),
    ]


def _rival(environment: Environment) -> Finding:
    python = environment.find()
    advice = None if python else environment.how_to_install
    return f"{environment.engine}, for --against", str(python or "not installed"), advice


def _threads() -> Finding:
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    advice = None
    if threads > cores:
        advice = f"More threads than the {cores} cores slow each other down: set OMP_NUM_THREADS."
    return "threads of torch", str(threads), advice


def _attention() -> Finding:
    if WHY_NOT_NATIVE is not None:
        return (
            "attention kernel",
            f"torch; the native one is not there ({WHY_NOT_NATIVE})",
            "Several times slower attention. Install a C++17 compiler (g++ 12 or clang 15, or "
            "newer) and CMake, and install the package again.",
        )
    from tokendance.attention import _native

    used, *others = _native.kernels()
    finding = f"native: {used}" + (f" (also {', '.join(others)})" if others else "")
    advice = None
    if _native.thread_source() != "openmp":
        advice = "No OpenMP runtime of torch was found; threads of its own may disturb torch's."
    return "attention kernel", finding, advice


def _huge_pages() -> Finding:
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled", encoding="ascii") as file:
            setting = file.read().partition("[")[2].partition("]")[0]
    except OSError:
        return "huge pages", "not known on this system", None
    advice = None
    if setting == "never":
        advice = "Decoding reads memory faster with them: set transparent_hugepage to madvise."
    return "huge pages", setting, advice
