"""Starts the parts, each with a limit, and writes down what they find; see the package."""

import argparse
import contextlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gpu.worker import Figures, Job, Worker
from tokendance.attention.names import AttentionName

CHECKOUT = Path(__file__).parents[1]
TESTS = "tests/test_attention_on_device.py"
BACKENDS = ("torch", "triton")
# In this order, with the seconds that each may take. Loading torch and making the large model are
# in "device" and the first of those that need it.
LIMITS_S = {
    "device": 40.0,
    "tests": 90.0,
    "equal-torch": 30.0,
    "equal-triton": 40.0,
    "prefill-10": 60.0,
    "decode": 60.0,
    "prefill-50": 90.0,
}
_LEAST_SHARE = 0.3  # a part begins when there is so much of its limit left
_GRACE_S = 5.0  # for a part that has its own eye on the clock
_BAD = ("FAILED", "ERROR")
_LONGEST_END = 1500  # characters of what pytest said


def main() -> int:
    """Find out all there is time for; 1 if something has failed."""
    settings = _read_settings()
    settings.out.mkdir(parents=True, exist_ok=True)
    if settings.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    if settings.tiny:  # threads would wait for each other
        os.environ["OMP_NUM_THREADS"] = "1"
    start = time.monotonic()
    parts: dict[str, Figures] = {}
    worker = Worker()
    for part, limit_s in LIMITS_S.items():
        began = time.monotonic()
        left_s = settings.budget - (began - start)
        why = _why_left_out(part, left_s, parts)
        if why is not None:
            parts[part] = {"status": "left out", "why": why}
        elif part == "tests":
            parts[part] = _run_tests(settings, min(limit_s, left_s))
        else:
            attention = _attention(part, settings.device, parts)
            limit_s = min(limit_s, left_s)
            job = Job(
                part, settings.device, settings.tiny, attention, settings.out, limit_s - _GRACE_S
            )
            parts[part] = worker.run(job, limit_s)
        parts[part]["seconds"] = time.monotonic() - began
        print(f"{part}: {json.dumps(_rounded(parts[part]))}", flush=True)
        report = json.dumps(_rounded(_report(settings, parts, time.monotonic() - start)))
        (settings.out / "gpu.json").write_text(report + "\n")
    worker.end()
    print(report, flush=True)
    return 1 if _with_status("failed", parts) else 0


@dataclass(frozen=True, slots=True)
class _Settings:
    """What the user has chosen.

    Attributes:
        device: as torch names it.
        tiny: every line in seconds, and figures that mean nothing.
        out: folder for results.
        budget: seconds for everything.
    """

    device: str
    tiny: bool
    out: Path
    budget: float


def _read_settings() -> _Settings:
    parser = argparse.ArgumentParser(
        prog="python -m gpu",
        description="What the engine does on a GPU. The last line is all of it, as JSON.",
    )
    parser.add_argument("--device", default="cuda", help="as torch names it; cpu to try it out")
    parser.add_argument("--tiny", action="store_true", help="seconds; the figures mean nothing")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT") or "gpu-results"),
        help="folder for results; the variable OUT, else gpu-results",
    )
    parser.add_argument("--budget", type=float, default=300.0, help="seconds for everything")
    return _Settings(**vars(parser.parse_args()))


def _why_left_out(part: str, left_s: float, parts: dict[str, Figures]) -> str | None:
    """Why a part is not to begin, if so."""
    if part != "device" and parts["device"]["status"] == "failed":
        return "the device cannot be used"
    if left_s < _LEAST_SHARE * LIMITS_S[part]:
        return f"{max(0.0, left_s):.0f} s are left"
    return None


def _attention(part: str, device: str, parts: dict[str, Figures]) -> AttentionName:
    """What a part is measured with: Triton's kernels, if their answers were right.

    Their interpreter is for few tokens only.
    """
    is_right = parts.get("equal-triton", {}).get("status") == "ok"
    is_slow = device == "cpu" and part.startswith("prefill")
    return "triton" if is_right and not is_slow else "torch"


def _run_tests(settings: _Settings, limit_s: float) -> Figures:
    """The tests of each backend on the device, at the same time."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(CHECKOUT / "src"), os.environ.get("PYTHONPATH", "")]),
        "TOKENDANCE_TEST_DEVICE": settings.device,
        "TRITON_INTERPRET": "1" if settings.device == "cpu" else "0",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # whatever else is installed there
    }
    # Nor do options that want plugins matter, or warnings of versions that nobody has tried.
    pytest = [sys.executable, "-m", "pytest", "-v", "-o", "addopts=", "-W", "default", TESTS]
    deadline = time.monotonic() + limit_s
    running = {}
    for backend in BACKENDS:
        with (settings.out / f"tests-{backend}.txt").open("w") as output:
            running[backend] = subprocess.Popen(
                [*pytest, "-k", f"{backend} and small" if settings.tiny else backend],
                cwd=CHECKOUT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
    found: Figures = {"status": "ok"}
    for backend, process in running.items():
        try:
            status = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        said = (settings.out / f"tests-{backend}.txt").read_text()
        results = re.findall(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)", said, re.MULTILINE)
        failed = [name.partition("::")[2] for name, result in results if result in _BAD]
        passed = sum(result == "PASSED" for _, result in results)
        found[backend] = {"passed": passed, "failed": failed, "exit_status": status}
        if status != 0 or passed == 0:
            found["status"] = "failed"
            found[backend]["end"] = said[-_LONGEST_END:]
    return found


def _report(settings: _Settings, parts: dict[str, Figures], seconds: float) -> Figures:
    return {
        "suite": "gpu",
        "versions": _versions(),
        "device": settings.device,
        "tiny": settings.tiny,
        "seconds": seconds,
        "failed": _with_status("failed", parts),
        "left_out": _with_status("left out", parts),
        "parts": parts,
    }


def _with_status(status: str, parts: dict[str, Figures]) -> list[str]:
    return [part for part, found in parts.items() if found["status"] == status]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _rounded(value: Any) -> Any:
    """Numbers with four digits, so that the line stays short."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    sys.exit(main())
