"""The process in which our native kernel and vLLM's own CPU attention take turns.

Run by the Python that vLLM is installed for, with TokenDance beside it (`make vllm`). A JSON line
on stdin says what to measure, and each kind of step is answered by a line:

    {"cases": [{"name": "decode", "requests": 8, "context": 512, "new": 1}, ...],
     "repeats": 7, "heads": [3, 3, 64], "block_size": 128, "memory_bytes": 268435456}
    {"name": "decode", ..., "ours": [seconds, ...], "vllm": [seconds, ...], "plan": [...], ...}

All of a step's requests have a context of so many tokens in scattered blocks, and compute so many
new ones behind it. Both kernels take the same views of one row of projections, write the new keys
and values into pages, and attend. Times are those of a layer: the mean over as many layers as no
cache
can hold; what each does once for a step (`plan`: our plan, vLLM's schedule) is apart.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from tokendance.attention.interface import LayerKind, PackedBatch, PackedRequest
from tokendance.attention.native_backend import NativeBackend
from tokendance.attention.rope import Rope
from tokendance.bench.suite import in_turn

DTYPE = torch.bfloat16
_MOST_LAYERS = 30


class Step:
    """One step's requests, in blocks of both kinds.

    Attributes:
        num_layers: of which each has memory of its own.
    """

    def __init__(self, job: dict[str, Any], case: dict[str, Any]) -> None:
        self.kv_heads, self.group, self.size = job["heads"]
        self.page = job["block_size"]
        requests, self.new = case["requests"], case["new"]
        self.length = case["context"] + self.new
        self.num_rows = requests * self.new
        pages_each = -(-self.length // self.page)
        num_pages = requests * pages_each
        self.tables = np.random.default_rng(0).permutation(num_pages).reshape(requests, pages_each)
        at = np.arange(self.length)
        self.slots = self.tables[:, at // self.page] * self.page + at % self.page
        page_numbers = self.kv_heads * self.page * 2 * self.size
        num_bytes = num_pages * page_numbers * DTYPE.itemsize
        self.num_layers = max(1, min(_MOST_LAYERS, -(-job["memory_bytes"] // num_bytes)))
        generator = torch.Generator().manual_seed(0)
        heads = self.kv_heads * self.group
        width = (heads + 2 * self.kv_heads) * self.size
        rows = torch.randn(self.num_rows, width, generator=generator).to(DTYPE)
        query, key, value = torch.split(
            rows, [heads * self.size, self.kv_heads * self.size, self.kv_heads * self.size], dim=-1
        )
        self.query = torch.unflatten(query, -1, (heads, self.size))
        self.key = torch.unflatten(key, -1, (self.kv_heads, self.size))
        self.value = torch.unflatten(value, -1, (self.kv_heads, self.size))
        kv = torch.randn(num_pages, page_numbers, generator=generator).to(DTYPE)
        self.memory = [kv.clone() for _ in range(self.num_layers)]
        self.output = torch.empty(self.num_rows, heads, self.size, dtype=DTYPE)

    def ours(self) -> "tuple[Callable[[], None], Callable[[], None]]":
        """What our backend does for a step, and for all layers."""
        slot_position = np.zeros(self.tables.size * self.page, np.int32)
        slot_position[self.slots] = np.arange(self.length)
        positions = np.arange(self.length - self.new, self.length)
        batch = PackedBatch(
            [
                PackedRequest(index * self.new, positions, slots.astype(np.int32))
                for index, slots in enumerate(self.slots)
            ],
            slot_position,
        )
        kind = LayerKind(Rope(10000.0 ** (-torch.arange(0, self.size, 2) / self.size)))
        backend = NativeBackend([kind], self.size, torch.device("cpu"), DTYPE)
        shape = (-1, self.kv_heads, 2 * self.size)
        memory = [pages.view(shape).transpose(0, 1) for pages in self.memory]
        query = torch.unflatten(self.query, 1, (self.kv_heads, self.group)).permute(1, 2, 0, 3)
        key, value = self.key.transpose(0, 1), self.value.transpose(0, 1)

        def attend() -> None:
            for kv in memory:
                keys, values = torch.split(kv, self.size, dim=-1)
                backend.attend(0, query, key, value, keys, values, self.size**-0.5)

        return lambda: backend.prepare(batch), attend

    def vllm(self) -> "tuple[Callable[[], None], Callable[[], None]]":
        """The same of vLLM's."""
        isa = _get_attn_isa(DTYPE, self.page, self.size)
        new_slots = torch.from_numpy(self.slots[:, self.length - self.new :].reshape(-1).copy())
        starts = torch.arange(len(self.tables) + 1, dtype=torch.int32) * self.new
        lengths = torch.full((len(self.tables),), self.length, dtype=torch.int32)
        tables = torch.from_numpy(self.tables.astype(np.int32))
        shape = (-1, self.kv_heads, 2 * self.page, self.size)
        memory = [pages.view(shape).chunk(2, dim=2) for pages in self.memory]
        schedule: list[torch.Tensor] = []

        def prepare() -> None:
            schedule[:] = [
                ops.cpu_attn_get_scheduler_metadata(
                    num_reqs=len(self.tables),
                    num_heads=self.kv_heads * self.group,
                    num_kv_heads=self.kv_heads,
                    head_dim=self.size,
                    seq_lens=lengths,
                    dtype=DTYPE,
                    query_start_loc=starts,
                    causal=True,
                    sliding_window_size=-1,
                    isa=isa,
                    enable_kv_split=True,
                )
            ]

        def attend() -> None:
            for keys, values in memory:
                ops.cpu_attn_reshape_and_cache(self.key, self.value, keys, values, new_slots, isa)
                ops.cpu_attention_with_kv_cache(
                    query=self.query,
                    key_cache=keys,
                    value_cache=values,
                    output=self.output,
                    query_start_loc=starts,
                    seq_lens=lengths,
                    scale=self.size**-0.5,
                    causal=True,
                    alibi_slopes=None,
                    sliding_window=-1,
                    block_table=tables,
                    softcap=0,
                    scheduler_metadata=schedule[0],
                    s_aux=None,
                )

        return prepare, attend


def measure(job: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """Both in turn, on memory that each has filled itself."""
    step = Step(job, case)
    figures: dict[str, list[float]] = {}
    runs: dict[str, Callable[[], float]] = {}

    for name, (prepare, attend) in {"ours": step.ours(), "vllm": step.vllm()}.items():
        plans = figures[f"{name}_plan"] = []

        def run(
            prepare: Callable[[], None] = prepare,
            attend: Callable[[], None] = attend,
            plans: list[float] = plans,
        ) -> float:
            start = time.perf_counter()
            prepare()
            planned = time.perf_counter()
            attend()
            plans.append(planned - start)
            return float((time.perf_counter() - planned) / step.num_layers)

        runs[name] = run
    figures |= in_turn(runs, job["repeats"])
    return case | {"layers": step.num_layers} | figures


def main() -> None:
    """Answer the job on stdin."""
    job = json.loads(sys.stdin.readline())
    torch.set_num_threads(job["threads"])
    for case in job["cases"]:
        print(json.dumps(measure(job, case)), flush=True)


if __name__ == "__main__":
    main()
