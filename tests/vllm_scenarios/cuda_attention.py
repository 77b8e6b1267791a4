"""One layer of the GPU's backend on a CPU: run by vLLM's own Python, answering by a JSON line.

    {"seed": 0, "page_size": 16, "layout": "LBNHC", "heads": [2, 3, 32], "dtype": "float32"}
    {"configurations": [{"head_size": 80}, ...]}    what the plug-in chooses on a GPU

Our kernels run in Triton's interpreter, over pages that vLLM itself lays out. FlashAttention does
not run on a CPU: something that notes its calls stands in for it. A random round is computed chunk
by chunk, and every row of every step compared with a dense softmax in float64 over keys that are
rotated to where the reader has them, of which neither plan nor backend knows anything.
"""

import json
import sys
from collections.abc import Sequence
from types import SimpleNamespace as Namespace
from typing import Any

import numpy as np
import torch
import vllm.platforms
from torch import Tensor
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_layout import KVCacheLayout

from tokendance.attention.interface import LayerKind
from tokendance.attention.rope import Rope
from tokendance.collector.known import NO_SLOT
from tokendance.integrations.vllm import cuda_attention, register, step
from tokendance.integrations.vllm.contexts import Contexts

THETA = 10000.0
MAX_PAGES = 16


class FlashAttention:
    """Stands in for vLLM's: notes who was called with what."""

    def __init__(self) -> None:
        self.built: list[tuple[Any, FlashAttentionMetadata]] = []
        self.attended: list[tuple[Any, ...]] = []

    def install(self) -> None:
        def begin(builder: Any, spec: Any, names: Any, config: Any, device: Any) -> None:
            builder.kv_cache_spec, builder.layer_names = spec, names
            builder.vllm_config, builder.device = config, device

        def build(builder: Any, *args: Any) -> FlashAttentionMetadata:
            del builder
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
    """An owner, a plain request, and mirrors with corrected tokens, at offsets of their own.

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


def what_the_plugin_chooses(changes: dict[str, Any]) -> dict[str, Any]:
    """For a GPU that is not here, and a configuration that is changed in a few places."""

    class Cuda:
        has_tokendance = False

        @staticmethod
        def check_and_update_config(config: Any) -> None:
            config.parallel_config.worker_cls = "vLLM's"

        def is_cpu(self) -> bool:
            return False

        def is_cuda(self) -> bool:
            return True

        def has_device_capability(self, capability: int) -> bool:
            return capability <= int(changes.get("capability", 90))

    vllm.platforms._current_platform = Cuda()
    register()
    backend = changes.get("backend")
    config = Namespace(
        model_config=Namespace(
            runner_type="generate",
            hf_text_config=Namespace(),
            use_mla=False,
            is_hybrid=False,
            is_multimodal_model=False,
            dtype=getattr(torch, changes.get("dtype", "bfloat16")),
            get_head_size=lambda: changes.get("head_size", 128),
        ),
        cache_config=Namespace(
            cache_dtype=changes.get("cache_dtype", "auto"), kv_sharing_fast_prefill=False
        ),
        parallel_config=Namespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1, enable_dbo=False
        ),
        attention_config=Namespace(
            backend=None if backend is None else AttentionBackendEnum[backend],
            backend_per_kind={},
            hisparse_config=None,
        ),
        scheduler_config=Namespace(scheduler_cls=None),
        kv_transfer_config=None,
        speculative_config=None,
        use_v2_model_runner=changes.get("v2", True),
    )
    Cuda.check_and_update_config(config)
    chosen = config.attention_config.backend
    return {
        "worker": config.parallel_config.worker_cls,
        "scheduler": config.scheduler_config.scheduler_cls,
        "attention": None if chosen is None else chosen.get_path(),
    }


def main() -> None:
    job = json.loads(sys.stdin.readline())
    if "configurations" in job:
        print("\n" + json.dumps([what_the_plugin_chooses(one) for one in job["configurations"]]))
        return
    flash = FlashAttention()
    flash.install()
    current = Round(job)
    impl = cuda_attention.RoundAttentionImpl(
        current.kv_heads * current.group, current.size, current.size**-0.5, current.kv_heads,
        None, None, "auto",
    )  # fmt: skip
    layers = {"layer": Namespace(impl=impl)}
    config = Namespace(compilation_config=Namespace(static_forward_context=layers))
    spec = Namespace(head_size=current.size, dtype=current.dtype)
    builder = cuda_attention.RoundMetadataBuilder(spec, ["layer"], config, torch.device("cpu"))

    page = current.page
    current.add("owner", 5 * page + 3)
    current.add("plain", page + 6)
    current.add("second owner", 2 * page)
    # Its runs do not begin on pages; four tokens between them are corrected.
    first, count = page // 2, 2 * page + 1
    current.add(
        "near",
        count + page + 21,
        [("owner", first, 9, count), ("owner", first + count + 4, 9 + count + 4, page)],
    )
    current.add(
        "far",
        count + 60,
        [("second owner", 3, 31, page), ("owner", first, 40 + page, count - page)],
    )
    steps = {
        "owners, and nobody reads": {"owner": 2 * page, "plain": 3},
        "plain, in chunks": {"owner": 3 * page, "plain": page, "second owner": 2 * page},
        "mirrors, in chunks, and others": {"near": 5, "owner": 2, "far": 40, "plain": 1},
        "mirrors alone": {"far": 14, "near": 12},
        "decoding, all": {"owner": 1, "near": 1, "plain": 1, "far": 1},
        "plain again": {"plain": 1},
    }
    answer: dict[str, Any] = {}
    for name, counts in steps.items():
        flash.built.clear()
        flash.attended.clear()
        found = current.compute(builder, impl, counts)
        arguments = found.pop("arguments")
        found["untouched"] = (
            len(flash.attended) == 1
            and all(a is b for a, b in zip(flash.attended[0], arguments, strict=True))
            and arguments[5] is flash.built[0][1]
        )
        found["built"] = [arguments == (0, "common", False) for arguments, _ in flash.built]
        answer[name] = found
    answer["graphs"] = builder.get_cudagraph_support(None, None).name
    print("\n" + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
