"""`make gpu` without a GPU: every line at a tiny size, and what becomes of parts that fail."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import is_thorough
from gpu.worker import Figures, Job, Parts, Worker

ROOT = Path(__file__).parents[1]
PATHS = f"{ROOT / 'src'}{os.pathsep}{ROOT}"
# What is not there on a machine that has only torch, transformers, Triton, numpy and tests.
MISSING = (
    "cyclopts", "rich", "pydantic", "fastapi", "uvicorn", "llguidance", "prometheus_client",
    "matplotlib", "gguf", "accelerate", "schemathesis", "nanobind", "tokendance.attention._native",
)  # fmt: skip


@pytest.mark.skipif(not is_thorough(), reason="imports torch four times (make check)")
def test_it_runs_with_nothing_but_the_library(tmp_path: Path) -> None:
    hides = f"import sys; sys.modules.update(dict.fromkeys({MISSING!r}))\n"
    (tmp_path / "sitecustomize.py").write_text(hides)
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "gpu", "--device", "cpu", "--tiny"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{PATHS}", "OUT": str(out)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == json.loads((out / "gpu.json").read_text())
    assert report["failed"] == report["left_out"] == []
    assert len(done.stdout.splitlines()[-1]) < 8000, "it has to fit into the end of a log"
    parts = report["parts"]
    passed = {backend: parts["tests"][backend]["passed"] for backend in ("torch", "triton")}
    assert passed == {"torch": 2, "triton": 3}
    for backend in ("torch", "triton"):
        for mode in ("prefix", "pic-batched", "collective"):
            assert parts[f"equal-{backend}"][mode]["same_tokens"]
    for part in ("prefill-10", "prefill-50"):
        computed = {mode: parts[part][mode]["computed_tokens"] for mode in ("prefix", "collective")}
        assert computed["collective"] < computed["prefix"]
    assert {"triton", "torch", "dense"} <= parts["decode"].keys()
    for part in ("prefill-10", "prefill-50", "decode"):
        assert parts[part]["profile"]["top"]
    files = sorted(path.name for path in out.iterdir())
    assert files == sorted(
        ["gpu.json", "tests-torch.txt", "tests-triton.txt"]
        + ["profile-prefill-10.txt", "profile-prefill-50.txt"]
        + [f"profile-decode-{name}.txt" for name in ("triton", "torch", "dense")]
    )
    assert all((out / name).stat().st_size > 300 for name in files)


def test_without_the_device_all_else_is_left_out(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gpu", "--device", "none", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["failed"] == ["device"]
    assert "none" in report["parts"]["device"]["why"]
    assert set(report["left_out"]) == report["parts"].keys() - {"device"}


def fine(job: Job) -> Iterator[Figures]:
    yield {"part": job.part}


def fails(job: Job) -> Iterator[Figures]:
    yield {"first": 1}
    raise ValueError(f"no second in {job.part}")


def dies(job: Job) -> Iterator[Figures]:
    del job
    yield {"first": 1}
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(job: Job) -> Iterator[Figures]:
    del job
    yield {"first": 1}
    time.sleep(600)


def parts() -> Parts:
    return {"fine": fine, "fails": fails, "dies": dies, "hangs": hangs}


def no_parts() -> Parts:
    raise ImportError("nothing is installed")


def test_that_nothing_can_be_loaded_is_said() -> None:
    worker = Worker(no_parts)
    try:
        found = worker.run(Job("fine", "cpu", True, "torch", Path(), 60.0), 60.0)
    finally:
        worker.end()
    assert found["status"] == "failed"
    assert "nothing is installed" in found["why"]


@pytest.mark.parametrize(
    ("part", "why"),
    [("fails", "no second in fails"), ("dies", "ended with status -9"), ("hangs", "too long")],
)
def test_a_part_that_fails_keeps_its_figures_and_harms_no_other(part: str, why: str) -> None:
    worker = Worker(parts)
    try:
        for name in (part, "fine"):
            limit_s = 1.0 if name == "hangs" else 60.0
            found = worker.run(Job(name, "cpu", True, "torch", Path(), limit_s), limit_s)
            if name == "fine":
                assert found == {"status": "ok", "part": "fine"}
            else:
                assert (found["status"], found["first"]) == ("failed", 1)
                assert why in found["why"]
    finally:
        worker.end()


def test_the_share_of_time_in_which_a_device_is_idle() -> None:
    from gpu.profiling import covered, kernel_figures

    assert covered([]) == 0
    assert covered([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4
    kernels = [("product", 0.0, 200.0), ("copy", 100.0, 300.0), ("product", 500.0, 600.0)]
    figures = kernel_figures(kernels, 1e-3)
    assert figures["busy_ms"] == pytest.approx(0.4)
    assert figures["idle_share"] == pytest.approx(0.6)
    assert [(one["name"], one["calls"], one["ms"], one["share"]) for one in figures["top"]] == [
        ("product", 2, pytest.approx(0.3), pytest.approx(0.6)),
        ("copy", 1, pytest.approx(0.2), pytest.approx(0.4)),
    ]
