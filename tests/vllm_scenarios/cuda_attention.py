"""One layer of the GPU's backend on a CPU: run by vLLM's own Python, answering by a JSON line.

    {"seeds": [0, 1], "page_size": 16, "layout": "LBNHC", "heads": [2, 3, 32], "dtype": "float32"}

Our kernels run in Triton's interpreter, over pages that vLLM itself lays out. FlashAttention does
not run on a CPU: something that notes its calls stands in for it. Random rounds are computed chunk
by chunk, and every row of every step compared with a dense softmax in float64 over keys that are
rotated to where the reader has them, of which neither plan nor backend knows anything.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from types import SimpleNamespace as Namespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from tokendance.attention.interface import LayerKind
from tokendance.attention.rope import Rope
from tokendance.collector.known import NO_SLOT
from tokendance.integrations.vllm import cuda_attention, step
from tokendance.integrations.vllm.contexts import Contexts

THETA = 10000.0
MAX_PAGES = 16
NUM_SAID = 4  # tokens of an answer


class FlashAttention:
    """Stands in for vLLM's: notes who was called with what."""

    def __init__(self) -> None:
        self.built: list[tuple[Any, FlashAttentionMetadata]] = []
        self.attended: list[tuple[Any, ...]] = []

    def install(self) -> None:
        def begin(builder: Any, spec: Any, names: Any, config: Any, device: Any) -> None:
            builder.kv_cache_spec, builder.layer_names = spec, names
            builder.vllm_config, builder.device = config, device

        def build(builder: Any, *args: Any, **options: Any) -> FlashAttentionMetadata:
            del builder, options
            nothing = torch.empty(0)
            metadata = FlashAttentionMetadata(1, 1, nothing, 1, nothing, nothing, nothing)
            self.built.append((args, metadata))
            return metadata

        def forward(impl: Any, *args: Any) -> Tensor:
            del impl
            self.attended.append(args)
            output: Tensor = args[6]
            return output

        FlashAttentionMetadataBuilder.__init__ = begin
        FlashAttentionMetadataBuilder.build = build
        FlashAttentionImpl.forward = forward


class Round:
    """Owners, plain requests, and mirrors with corrected tokens, at offsets of their own.

    Of each position of a request's context it knows the unrotated key and the value.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self.rng = np.random.default_rng(job["seed"])
        self.kv_heads, self.group, self.size = job["heads"]
        self.page = job["page_size"]
        self.dtype = getattr(torch, job["dtype"])
        num_pages = 8 * MAX_PAGES
        shape = (num_pages, self.kv_heads, self.page, 2 * self.size)
        order = KVCacheLayout[job["layout"]].stride_order  # of layer, page, head, token, number
        sizes = (3, *shape)  # layers; ours is in the middle
        memory = torch.full([sizes[axis] for axis in order], float("nan"), dtype=self.dtype)
        self.kv_cache = memory.permute([order.index(axis) for axis in range(5)])[1]
        assert self.kv_cache.shape == shape
        self.pages = self.rng.permutation(num_pages)
        self.tables = np.zeros((8, MAX_PAGES), np.int32)
        self.contexts = Contexts(num_pages, self.page)
        self.inv_freq = THETA ** (-torch.arange(0, self.size, 2).double() / self.size)
        step.layer_kinds = {"layer": LayerKind(Rope(self.inv_freq.float()))}
        self.requests: dict[str, dict[str, Any]] = {}

    def random(self, *shape: int) -> Tensor:
        numbers = torch.from_numpy(self.rng.standard_normal(shape))
        return numbers.to(self.dtype).double()

    def add(self, name: str, length: int, runs: Sequence[tuple[str, int, int, int]] = ()) -> None:
        """A request that reads `runs`: (owner, its first position, where they begin, how many)."""
        index = len(self.requests)
        self.tables[index] = self.pages[index * MAX_PAGES : (index + 1) * MAX_PAGES]
        keys, values = (self.random(length, self.kv_heads, self.size) for _ in range(2))
        reads = np.full(length, NO_SLOT, np.int32)
        for owner, first, at, count in runs:
            source = self.requests[owner]
            here, there = np.arange(at, at + count), np.arange(first, first + count)
            reads[here] = source["slots"][there]
            keys[here], values[here] = source["keys"][there], source["values"][there]
        own = np.flatnonzero(reads == NO_SLOT)
        tokens = np.arange(len(own))
        slots = reads.copy()
        slots[own] = self.tables[index][tokens // self.page] * self.page + tokens % self.page
        request = {"index": index, "keys": keys, "values": values, "own": own, "slots": slots}
        self.requests[name] = request | {"num_done": 0, "length": length}
        self.contexts.begin(name, reads if runs else None)

    def rotated(self, heads: Tensor, positions: np.ndarray) -> Tensor:
        """Heads (rows, ..., D) in float64, rotated to positions."""
        angles = torch.from_numpy(positions.astype(np.float64))[:, None] * self.inv_freq
        cos, sin = (f(angles).unsqueeze(1) for f in (torch.cos, torch.sin))
        first, second = heads.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def compute(self, builder: Any, impl: Any, counts: dict[str, int]) -> dict[str, Any]:
        """A step of so many own tokens of each request."""
        names = list(counts)
        requests = [self.requests[name] for name in names]
        num_done = np.array([request["num_done"] for request in requests])
        num_new = np.array(list(counts.values()))
        taken = self.contexts.take(
            names, num_done, num_new, self.tables, np.array([r["index"] for r in requests])
        )
        step.current = taken.batch
        num_rows = int(num_new.sum())
        query = self.random(num_rows, self.kv_heads * self.group, self.size)
        expected = torch.zeros(num_rows, self.kv_heads * self.group, self.size).double()
        rotated = torch.zeros_like(query)
        row = 0
        for request, new in zip(requests, num_new.tolist(), strict=True):
            begin = request["num_done"]
            positions = request["own"][begin : begin + new]
            self._write(request, positions)
            rows = slice(row, row + new)
            rotated[rows] = self.rotated(query[rows], positions)
            expected[rows] = self._attend(request, rotated[rows].to(self.dtype).double(), positions)
            request["num_done"] += new
            row += new
        metadata = builder.build(0, "common")
        # vLLM adds rows for graphs of fixed sizes.
        padded = torch.zeros(num_rows + 3, *query.shape[1:], dtype=self.dtype)
        padded[:num_rows] = rotated.to(self.dtype)
        output = torch.full_like(padded, 7.0)
        ignored = torch.full((num_rows + 3, self.kv_heads, self.size), float("nan"))
        arguments = (None, padded, ignored, ignored, self.kv_cache, metadata, output, None, None)
        result = impl.forward(*arguments)
        error = (result[:num_rows].double() - expected).abs().amax(-1)
        scale = expected.abs().amax(-1).clamp(min=0.1)
        return {
            "is_output": result is output,
            "kind": type(metadata).__name__,
            "error": float((error / scale).max()),
            "padding_kept": bool((output[num_rows:] == 7.0).all()),
            "arguments": arguments,
        }

    def _write(self, request: dict[str, Any], positions: np.ndarray) -> None:
        """What vLLM does before attention."""
        slots = request["slots"][positions]
        pages, places = torch.from_numpy(slots // self.page), torch.from_numpy(slots % self.page)
        keys = self.rotated(request["keys"][positions], positions)
        new = torch.cat([keys, request["values"][positions]], dim=-1).to(self.dtype)
        self.kv_cache[pages.long(), :, places.long()] = new

    def _attend(self, request: dict[str, Any], query: Tensor, positions: np.ndarray) -> Tensor:
        """Dense: keys as they are in memory, unrotated there, and rotated to the reader's place."""
        length = int(positions[-1]) + 1
        keys = self.rotated(request["keys"][:length], np.arange(length))
        scores = torch.einsum(
            "rkgd,nkd->kgrn", query.view(len(query), self.kv_heads, self.group, -1), keys
        )
        hidden = torch.from_numpy(positions)[:, None] < torch.arange(length)
        weights = (scores * self.size**-0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("kgrn,nkd->rkgd", weights, request["values"][:length]).flatten(1, 2)


def add_requests(current: Round) -> None:
    """Owners, one that nobody reads, and mirrors that read several owners, some of them twice."""
    rng = current.rng

    def some(most: int) -> int:
        return int(rng.integers(1, most))

    owners = [f"owner {index}" for index in range(some(4))]
    for name in owners:
        current.add(name, 2 * current.page + some(3 * current.page))
    current.add("plain", some(3 * current.page))
    for index in range(some(4)):
        runs, at = [], some(40)
        for _ in range(some(4)):
            owner = owners[int(rng.integers(len(owners)))]
            # What an owner says, at its end, is read by nobody here.
            first = int(rng.integers(current.page))
            count = some(current.requests[owner]["length"] - NUM_SAID - first)
            runs.append((owner, first, at, count))
            at += count + int(rng.integers(5))  # what is in between is corrected
        current.add(f"mirror {index}", at + NUM_SAID + some(20), runs)


def chunks(current: Round, names: Sequence[str], left: int) -> Iterator[dict[str, int]]:
    """Steps of some of these requests, of many tokens and of single ones, until so few are left."""
    rng = current.rng

    def to_do(name: str) -> int:
        request = current.requests[name]
        return len(request["own"]) - left - int(request["num_done"])

    while unfinished := [name for name in names if to_do(name) > 0]:
        chosen = [name for name in unfinished if rng.random() < 0.8] or unfinished[:1]
        yield {name: min(to_do(name), int(rng.choice([1, 40, 40]))) for name in chosen}


def steps_of(current: Round) -> Iterator[dict[str, int]]:
    """What mirrors read is computed before them; their steps are those of others, too."""
    everybody = list(current.requests)
    yield from chunks(
        current, [name for name in everybody if not name.startswith("mirror")], NUM_SAID
    )
    yield from chunks(current, everybody, 0)
    current.add("late", 9)
    yield from chunks(current, ["late"], 0)


def main() -> None:
    job = json.loads(sys.stdin.readline())
    flash = FlashAttention()
    flash.install()
    answers: list[dict[str, Any]] = []
    for seed in job["seeds"]:
        current = Round(job | {"seed": seed})
        impl = cuda_attention.RoundAttentionImpl(
            current.kv_heads * current.group, current.size, current.size**-0.5, current.kv_heads,
            None, None, "auto",
        )  # fmt: skip
        layers = {"layer": Namespace(impl=impl)}
        config = Namespace(compilation_config=Namespace(static_forward_context=layers))
        spec = Namespace(head_size=current.size, dtype=current.dtype)
        device = torch.device("cpu")
        builder = cuda_attention.RoundMetadataBuilder(spec, ["layer"], config, device)
        add_requests(current)
        for counts in steps_of(current):
            flash.built.clear()
            flash.attended.clear()
            found = current.compute(builder, impl, counts)
            arguments = found.pop("arguments")
            found["counts"] = counts
            found["untouched"] = (
                flash.built[0][0] == (0, "common", False)
                and len(flash.attended) == 1
                and all(a is b for a, b in zip(flash.attended[0], arguments, strict=True))
                and arguments[5] is flash.built[0][1]
            )
            answers.append(found)
    print("\n" + json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
