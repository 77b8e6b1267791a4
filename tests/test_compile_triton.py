"""The Triton kernels, compiled for GPUs that are not here."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from conftest import is_thorough


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_kernels_fit_a_gpu() -> None:
    """An A100 (8.0), and an H100 (9.0).

    A thread has 255 registers. A few numbers of the loop over slot ranges may be spilled, none of
    the innermost loops, over keys. GPUs of 8.6 and 8.9 have 99 KiB of shared memory for a program,
    an A100 163 KiB, an H100 227 KiB.
    """
    script = str(Path(__file__).with_name("compile_triton.py"))
    models = [] if is_thorough() else ["SmolLM2 135M", "Qwen2.5 7B", "Gemma 3 1B"]
    command = [sys.executable, script, "--json", *models]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    usages = [json.loads(line) for line in done.stdout.splitlines()]
    attending = [usage for usage in usages if usage["kernel"] == "attend"]
    assert {usage["capability"] for usage in attending} == {80, 90}
    assert {usage["case"]["head_dim"] for usage in attending} == {64, 128, 256}
    assert {usage["kernel"] for usage in usages} == {"attend", "merge"}
    for usage in usages:
        assert usage["spills_in_loop"] == 0, usage
        assert usage["spilled_bytes"] <= 32, usage
        assert usage["shared_bytes"] <= 99 * 2**10, usage
    for usage in attending:
        assert usage["tensor_cores"] == (usage["case"]["dtype"] != "float32"), usage
