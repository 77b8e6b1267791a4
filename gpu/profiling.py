"""What a GPU does during some work, by torch's profiler: its kernels, and when it has none."""

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_NUM_LISTED = 12  # kernels in the figures; the text has more
_NUM_PRINTED = 40
_NAME_LENGTH = 70


def profile_work(work: Callable[[], object], plain_s: float, text: Path) -> dict[str, Any]:
    """Do some work under the profiler.

    Args:
        work: ends when the device is done with it.
        plain_s: seconds that it takes without the profiler, which slows the CPU's part down.
        text: file for torch's own table of operators.

    Returns:
        Milliseconds with and without the profiler, and in which the device was busy; what it did,
        the longest first; and the share of `plain_s` in which it was idle. On a CPU there are
        operators in place of kernels, and it is not known when it is idle.
    """
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        work()
        profiled_s = time.perf_counter() - start
    averages = profiler.key_averages()
    by = "self_device_time_total" if len(activities) > 1 else "self_cpu_time_total"
    text.write_text(averages.table(sort_by=by, row_limit=_NUM_PRINTED))
    kernels = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    ]
    figures: dict[str, Any] = {"ms": 1e3 * plain_s, "profiled_ms": 1e3 * profiled_s}
    if kernels:
        return figures | kernel_figures(kernels, plain_s)
    operators = {event.key: (event.count, event.self_cpu_time_total) for event in averages}
    return figures | {"busy_ms": None, "idle_share": None, "top": _top(operators)}


def kernel_figures(kernels: Sequence[tuple[str, float, float]], plain_s: float) -> dict[str, Any]:
    """What kernels (name, microsecond of its begin, of its end) say of `plain_s` seconds."""
    busy_s = 1e-6 * covered((begin, end) for _, begin, end in kernels)
    sums: dict[str, tuple[int, float]] = {}
    for name, begin, end in kernels:
        calls, total = sums.get(name, (0, 0.0))
        sums[name] = (calls + 1, total + end - begin)
    idle_share = max(0.0, 1 - busy_s / plain_s)
    return {"busy_ms": 1e3 * busy_s, "idle_share": idle_share, "top": _top(sums)}


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals (begin, end)."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def _top(sums: dict[str, tuple[int, float]]) -> list[dict[str, Any]]:
    """Names with their number of calls and microseconds, the longest first, with their shares."""
    whole = sum(microseconds for _, microseconds in sums.values()) or 1.0
    ranked = sorted(sums.items(), key=lambda item: -item[1][1])
    return [
        {"name": name[:_NAME_LENGTH], "calls": calls, "ms": us / 1e3, "share": us / whole}
        for name, (calls, us) in ranked[:_NUM_LISTED]
    ]
