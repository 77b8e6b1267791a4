"""Memory for what is read again and again."""

import contextlib
import math
import mmap

import torch
from torch import Tensor


def empty_in_huge_pages(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that is not mapped before it is written; in huge pages where the system has them.

    A step reads a little of everything, in each layer and head apart: with pages of 4 KB, looking
    up where they are takes longer than reading them.
    """
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=dtype, device=device)
    # Private: what is shared with child processes follows another setting of the system.
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, math.prod(size) * dtype.itemsize, flags=private)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(size)
