"""A test of vLLM that hangs or fails leaves no process behind."""

import subprocess
import sys
from pathlib import Path

import pytest

from vllm_server import run

# A child that outlives its parent for as long as it holds the file's lock.
PARENT = """
import fcntl, subprocess, sys, time
child = "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX);"
child += "print('locked', flush=True); time.sleep(600)"
started = subprocess.Popen([sys.executable, "-c", child, sys.argv[1]], stdout=subprocess.PIPE)
started.stdout.readline()
{then}
"""
TRY = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'w'), fcntl.LOCK_EX)"


@pytest.mark.parametrize(
    ("then", "error"),
    [("time.sleep(600)", subprocess.TimeoutExpired), ("sys.exit(3)", AssertionError)],
    ids=["hangs", "fails"],
)
def test_children_end_with_it(then: str, error: type[Exception], tmp_path: Path) -> None:
    lock = str(tmp_path / "lock")
    with pytest.raises(error):
        run([sys.executable, "-c", PARENT.format(then=then), lock], "", {}, timeout_s=3)
    subprocess.run([sys.executable, "-c", TRY, lock], timeout=20, check=True)
