"""What the Triton kernels take of a GPU, found without one: compiles them, and prints a table.

    python tests/compile_triton.py [--json] [MODEL ...]

`TritonBackend` runs as it always does, but Triton is given a driver that has no GPU, and launches
only compile. So these are the kernels that would be launched: same sizes, same arguments, and what
Triton makes of them (a stride that 16 divides, say). What ptxas reports, and what the machine code
shows, is printed; with `--json` as one object a line.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # kernels would be plain functions
os.environ["TRITON_ALWAYS_COMPILE"] = "1"
os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget

from tokendance.attention import triton_backend
from tokendance.attention.interface import LayerKind, PackedBatch, PackedRequest
from tokendance.attention.rope import Rope, RopeLayout

CAPABILITIES = (80, 90)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True, slots=True)
class Case:
    """The heads of some model."""

    model: str
    head_dim: int
    kv_heads: int
    group: int
    dtype: str = "bfloat16"
    rotary_dim: int | None = None
    layout: str = "halves"
    window: int | None = None
    page_size: int | None = None  # None: all slots have one stride


CASES = [
    Case("SmolLM2 135M", 64, 3, 3),
    Case("Llama 3.2 1B", 64, 8, 4),
    Case("Llama 3.2 1B", 64, 8, 4, "float32"),
    Case("Llama 3.1 8B", 128, 8, 4),
    Case("Llama 3.1 8B", 128, 8, 4, "float16"),
    Case("Llama 3.1 8B", 128, 8, 4, "float32"),
    Case("Qwen2.5 7B", 128, 4, 7),
    Case("Qwen2.5 7B", 128, 4, 7, page_size=16),
    Case("Mistral 7B v0.1", 128, 8, 4, window=4096),
    Case("GLM-4 9B", 128, 2, 16, rotary_dim=64, layout="interleaved"),
    Case("Falcon 7B", 64, 1, 71),
    Case("Gemma 3 1B", 256, 1, 4, window=512),
    Case("Gemma 3 1B", 256, 1, 4, page_size=32),
]


@dataclass(frozen=True, slots=True)
class Usage:
    """What a compiled kernel takes.

    Attributes:
        kernel: its name.
        capability: compute capability times 10.
        case: the heads that it is for.
        registers: of a thread.
        spilled_bytes: of a thread, in local memory.
        spills_in_loop: loads and stores of such in its innermost loops.
        shared_bytes: of a program.
        threads: of a program.
        tensor_cores: whether it multiplies with them.
    """

    kernel: str
    capability: int
    case: Case
    registers: int
    spilled_bytes: int
    spills_in_loop: int
    shared_bytes: int
    threads: int
    tensor_cores: bool


class NoGpu:
    """The part of a Triton driver that compiling needs."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # kernels are kept by device

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@contextlib.contextmanager
def compiling_only() -> Iterator[list[tuple[str, Any, str]]]:
    """Launches compile; collect name, compiled kernel, and what ptxas said of each."""
    compiled: list[tuple[str, Any, str]] = []
    kernels = {name: getattr(triton_backend, name) for name in ("_attend_kernel", "_merge_kernel")}
    runs = {name: kernel.run for name, kernel in kernels.items()}

    def watch(name: str) -> Any:
        def run(*args: Any, **options: Any) -> None:
            log = io.StringIO()
            with contextlib.redirect_stdout(log):
                kernel = runs[name](*args, **{**options, "warmup": True})
            if log.getvalue():  # nothing is said of what was compiled before
                compiled.append((name.strip("_").removesuffix("_kernel"), kernel, log.getvalue()))

        return run

    for name, kernel in kernels.items():
        kernel.run = watch(name)
    try:
        yield compiled
    finally:
        for name, kernel in kernels.items():
            kernel.run = runs[name]


def usages(case: Case, capability: int) -> list[Usage]:
    """Compile the kernels for a case; those that were compiled before are left out."""
    triton.runtime.driver.set_active(NoGpu(capability))
    dtype = getattr(torch, case.dtype)
    rotary_dim = case.rotary_dim or case.head_dim
    rope = Rope(10000.0 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim), RopeLayout(case.layout))
    backend = triton_backend.TritonBackend(
        [LayerKind(rope, case.window)], case.head_dim, torch.device("cpu"), dtype
    )
    num_rows, num_slots = 64, 128
    slots = np.arange(num_slots, dtype=np.int32)
    backend.prepare(PackedBatch([PackedRequest(0, slots[-num_rows:], slots)], slots))

    def heads(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, case.head_dim, dtype=dtype)

    if case.page_size is None:
        memory = heads(case.kv_heads, 1, num_slots)
    else:  # pages outermost, then heads
        shape = (num_slots // case.page_size, case.kv_heads, case.page_size)
        memory = heads(*shape).transpose(0, 1)
    with compiling_only() as compiled:
        backend.read(
            0,
            heads(num_rows, case.kv_heads * case.group),
            memory,
            memory,
            case.head_dim**-0.5,
            heads(num_rows, case.kv_heads * case.group),
        )
    return [usage_of(name, kernel, log, case, capability) for name, kernel, log in compiled]


def usage_of(name: str, kernel: Any, log: str, case: Case, capability: int) -> Usage:
    def number(pattern: str) -> int:
        (match,) = re.findall(pattern, log)
        return int(match)

    spilled_bytes = number(r"(\d+) bytes stack frame")
    return Usage(
        name,
        capability,
        case,
        registers=number(r"Used (\d+) registers"),
        spilled_bytes=spilled_bytes,
        spills_in_loop=spills_in_loops(kernel.asm["cubin"]) if spilled_bytes else 0,
        shared_bytes=kernel.metadata.shared,
        threads=32 * kernel.metadata.num_warps,
        tensor_cores=re.search(r"\bw?g?mma\.", kernel.asm["ptx"]) is not None,
    )


def spills_in_loops(cubin: bytes) -> int:
    """Loads and stores of local memory in loops that have no loop within."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [CUOBJDUMP, "-sass", file.name], capture_output=True, text=True, check=True
        )
    code = {
        int(address, 16): text
        for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.+?);", done.stdout)
    }
    loops = [
        (int(match[1], 16), address)
        for address, text in code.items()
        if (match := re.search(r"\bBRA.* 0x([0-9a-f]+)", text)) and int(match[1], 16) < address
    ]
    innermost = [
        (begin, end)
        for begin, end in loops
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in loops)
    ]
    return sum(
        begin <= address <= end and re.search(r"\b(LDL|STL)\b", text) is not None
        for begin, end in innermost
        for address, text in code.items()
    )


def main() -> None:
    as_json = "--json" in sys.argv
    models = [argument for argument in sys.argv[1:] if argument != "--json"]
    if not as_json:
        print("| kernel | heads of | dtype | capability | registers | spilled | shared memory |")
        print("|---|---|---|---|---|---|---|")
    for case in [case for case in CASES if not models or case.model in models]:
        for capability in CAPABILITIES:
            for usage in usages(case, capability):
                print(json.dumps(asdict(usage)) if as_json else row_of(usage), flush=True)


def row_of(usage: Usage) -> str:
    return (
        f"| {usage.kernel} | {usage.case.model} | {usage.case.dtype} | {usage.capability / 10} "
        f"| {usage.registers} | {usage.spilled_bytes} B | {usage.shared_bytes / 1024:.0f} KiB |"
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        main()
