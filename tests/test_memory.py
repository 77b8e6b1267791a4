"""Memory that must not grow with what has been asked."""

import subprocess
import sys

import pytest

# As prompts do, batches have all lengths. Their numbers of rows are new in each half.
_ROWS = """
import random
from pathlib import Path

import torch
from torch import nn

from tokendance.models.packing import pack_linear_layers

torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 512))
assert pack_linear_layers(model) == 2
counts = random.Random(0).sample(range(1, 600), 300)

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

with torch.inference_mode():
    for half in (counts[:150], counts[150:]):
        before = resident_mib()
        for rows in half:
            model(torch.zeros(rows, 256))
        print(resident_mib() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_batches_of_all_sizes_leave_nothing_behind() -> None:
    done = subprocess.run([sys.executable, "-c", _ROWS], capture_output=True, text=True, check=True)
    first, second = map(float, done.stdout.split())
    print(f"{first:.0f} MiB, then {second:.0f} MiB")
    assert second < 60
