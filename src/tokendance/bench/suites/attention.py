"""`attention`: one layer of decoding, by agents and backend, with the heads of SmolLM2-135M.

Every agent computes one token and reads a shared run, each at an offset of its own, and its own
tokens. `own copies` is what engines do that cannot share: each agent's whole context in one piece.
`shared part` has nothing else to read. All of it is compared with the time that reading the bytes
once would take at the speed at which this machine copies memory, found in the same turns. There are
as many layers, each with memory of its own, as no cache can hold, and they come round one after
the other.
"""

import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from tokendance.attention.backends import make_backend, native_is_there
from tokendance.attention.interface import LayerKind, PackedBatch, PackedRequest
from tokendance.attention.names import AttentionName
from tokendance.attention.rope import Rope
from tokendance.bench.plots import draw_lines
from tokendance.bench.settings import BenchSettings
from tokendance.bench.suite import LiveTable, SuiteResult, in_turn, ratio, timed

KV_HEADS, GROUP, HEAD_DIM = 3, 3, 64
DTYPE = torch.bfloat16
# (agents, shared tokens, own tokens)
FULL_SIZES = ((8, 2048, 512), (16, 2048, 512), (32, 2048, 512), (64, 2048, 512))
TINY_SIZES = ((2, 64, 16), (3, 64, 16))
HEADLINE_AGENTS = 32
SHARED_PART = "shared part"
_COPY = "copy"
_COPIED_BYTES = 2**26  # more than caches hold
_COPIES = 4
_LAYERS_BYTES = 2**28  # of all layers of a kind
_COLUMNS = {
    "agents": "agents",
    "shared": "shared",
    "own": "own",
    "kind": "kind",
    "ms": "ms a layer",
    "us_per_agent": "us an agent",
    "vs_bytes": "x bytes once",
    "vs_native": "x native",
}


def run(settings: BenchSettings, console: Console) -> SuiteResult:
    """Measure the suite; see the module."""
    sizes = TINY_SIZES if settings.tiny else FULL_SIZES
    notes = ["Heads of SmolLM2-135M, whatever the model."]
    if not native_is_there():
        notes.append("The native kernel is not installed (`tokendance doctor` says why).")
    table = LiveTable(console, f"attention of one layer, one token each, {DTYPE}", _COLUMNS)
    for agents, num_shared, num_own in sizes:
        runs: dict[str, Callable[[], float]] = {_COPY: _copy_run()}
        num_bytes: dict[str, int] = {}
        for name, (backend, *lengths) in _kinds(num_shared, num_own).items():
            batch = _batch(agents, *lengths)
            num_bytes[name] = 2 * KV_HEADS * HEAD_DIM * DTYPE.itemsize * len(batch.slot_position)
            num_layers = 1 if settings.tiny else -(-_LAYERS_BYTES // num_bytes[name])
            runs[name] = _attention_run(batch, backend, num_layers)
        seconds = in_turn(runs, 2 if settings.tiny else max(5, settings.repeats))
        base = next(iter(num_bytes))
        for name in num_bytes:
            once = [s * num_bytes[name] / _COPIED_BYTES / 2 for s in seconds[_COPY]]
            median = statistics.median(seconds[name])
            table.add(
                {
                    "agents": agents,
                    "shared": num_shared,
                    "own": num_own,
                    "kind": name,
                    "ms": 1e3 * median,
                    "min_ms": 1e3 * min(seconds[name]),
                    "max_ms": 1e3 * max(seconds[name]),
                    "us_per_agent": 1e6 * median / agents,
                    "vs_bytes": ratio(seconds[name], once),
                    "vs_native": ratio(seconds[name], seconds[base]),
                }
            )
    best = {row["kind"]: row for row in table.rows if row["agents"] == HEADLINE_AGENTS}
    headline = {
        "vs_bytes_once_32": best.get("native", {}).get("vs_bytes"),
        "speedup_vs_torch_32": best.get("torch", {}).get("vs_native"),
        "speedup_vs_own_copies_32": best.get("own copies", {}).get("vs_native"),
    }
    return SuiteResult("attention", settings.model, table.rows, headline, notes)


def _kinds(num_shared: int, num_own: int) -> dict[str, tuple[AttentionName, int, int]]:
    """What is measured: a backend, shared tokens, and own ones of each agent."""
    kinds: dict[str, tuple[AttentionName, int, int]] = {}
    if native_is_there():
        kinds["native"] = ("native", num_shared, num_own)
        kinds[SHARED_PART] = ("native", num_shared, 1)
        kinds["own copies"] = ("native", 0, num_shared + num_own)
    return kinds | {"torch": ("torch", num_shared, num_own)}


def _batch(agents: int, num_shared: int, num_own: int) -> PackedBatch:
    """One new token for each agent, the last of its own ones."""
    slot_position = np.zeros(num_shared + agents * num_own, np.int32)
    slot_position[:num_shared] = np.arange(num_shared)
    requests = []
    for agent in range(agents):
        own = num_shared + agent * num_own + np.arange(num_own)
        before = (7 * agent) % num_own  # so many own tokens come before the run
        slots = np.concatenate((own[:before], np.arange(num_shared), own[before:]))
        positions = np.arange(len(slots))
        slot_position[own] = np.concatenate((positions[:before], positions[before + num_shared :]))
        requests.append(PackedRequest(agent, positions[-1:], slots))
    return PackedBatch(requests, slot_position)


def _attention_run(batch: PackedBatch, name: AttentionName, num_layers: int) -> Callable[[], float]:
    """Seconds of one layer, the mean over all of them."""
    generator = torch.Generator().manual_seed(0)
    rows, slots = batch.num_rows, len(batch.slot_position)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DTYPE)

    query = random(rows, KV_HEADS * GROUP, HEAD_DIM)
    new = random(rows, KV_HEADS, HEAD_DIM)
    memory = [
        (random(KV_HEADS, slots, HEAD_DIM), random(KV_HEADS, slots, HEAD_DIM))
        for _ in range(num_layers)
    ]
    kind = LayerKind(Rope(10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)))
    backend = make_backend([kind], HEAD_DIM, torch.device("cpu"), DTYPE, name)
    backend.prepare(batch)

    def work() -> None:
        for keys, values in memory:
            backend.attend(0, query, new, new, keys, values, HEAD_DIM**-0.5)

    return lambda: timed(work) / num_layers


def _copy_run() -> Callable[[], float]:
    """Seconds to copy `_COPIED_BYTES`: as many are read, and as many written."""
    source = torch.ones(_COPIED_BYTES // 4)
    target = torch.empty_like(source)

    def work() -> None:
        for _ in range(_COPIES):
            target.copy_(source)

    return lambda: timed(work) / _COPIES


def plot(result: SuiteResult, path: Path) -> None:
    """Draw the cost per agent by agents."""
    title = "Attention of one layer while decoding"
    label = "microseconds per agent"
    draw_lines(
        path, result.rows, "kind", "agents", "us_per_agent", title=title, y_label=label, log_y=True
    )
