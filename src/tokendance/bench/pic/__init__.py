"""The baseline `pic`: reuse as CacheBlend does it, request by request, with copies."""

from tokendance.attention.interface import BackendFactory
from tokendance.bench.pic.executor import PicExecutor
from tokendance.bench.pic.planner import OnePromptAtATime, PicPlanner, WholePrompts
from tokendance.engine.engine import EngineParts
from tokendance.executor.kv_pool import KVPool
from tokendance.models.loader import LoadedModel
from tokendance.store.kv_store import KVStore


def make_parts(
    model: LoadedModel, pool: KVPool, backend: BackendFactory, store: KVStore, *, batched: bool
) -> EngineParts:
    """Make what an engine needs to run the baseline; without `batched`, one prompt at a time."""
    policy = WholePrompts() if batched else OnePromptAtATime()
    return EngineParts(PicPlanner(store), PicExecutor(model, pool, backend), policy)
