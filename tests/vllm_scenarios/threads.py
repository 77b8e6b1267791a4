"""Threads of this process: after torch has computed on three, and after our kernel has."""

import os

import numpy as np
import torch

from tokendance.attention.interface import LayerKind, PackedBatch, PackedRequest
from tokendance.attention.native_backend import NativeBackend
from tokendance.attention.rope import Rope

NUM_ROWS = 2000  # more than a thread's share


def num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


torch.set_num_threads(3)
before = num_threads()
torch.randn(1_000_000).exp()
with_torch = num_threads()

backend = NativeBackend([LayerKind(Rope(torch.ones(32)))], 64, torch.device("cpu"), torch.float32)
tokens = np.arange(NUM_ROWS, dtype=np.int32)
backend.prepare(PackedBatch([PackedRequest(0, tokens, tokens)], tokens))
query, key, value = torch.randn(3, NUM_ROWS, 4, 64)
memory = torch.zeros(2, 4, NUM_ROWS, 64)
backend.attend(0, query, key, value, memory[0], memory[1], 1.0)
print(with_torch - before, num_threads() - with_torch)
