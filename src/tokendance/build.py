"""Putting an engine together: a store, memory, an executor and what decides, by the settings."""

from functools import partial

from tokendance.attention.backends import make_backend
from tokendance.collector.planner import Planner
from tokendance.config import EngineConfig
from tokendance.engine.engine import Engine, EngineParts
from tokendance.engine.loop import EngineLoop
from tokendance.errors import ConfigError
from tokendance.executor.kv_pool import KVPool
from tokendance.executor.step import Executor
from tokendance.executor.torch_executor import TorchExecutor
from tokendance.models.encoder import PromptEncoder
from tokendance.models.loader import LoadedModel
from tokendance.store.kv_store import KVStore


def make_loop(
    model: LoadedModel,
    config: EngineConfig,
    encoder: PromptEncoder,
    *,
    pool: KVPool | None = None,
    executor: Executor | None = None,
) -> EngineLoop:
    """Make an engine, and the loop that drives it.

    Args:
        model: to run.
        config: of the loop and the memory.
        encoder: spells answers.
        pool: memory to use in place of its own, as large as the budget says or larger.
        executor: to use in place of one that runs the model; then there is no pool.

    Raises:
        ConfigError: if the budget does not hold a single page, or cannot be allocated.
    """
    kv_bytes_per_token = model.shape.kv_bytes_per_token(model.dtype)
    page_size = config.store.page_size
    num_pages = config.store.kv_budget // (kv_bytes_per_token * page_size)
    if num_pages == 0:
        raise ConfigError(
            f"The KV budget of {config.store.kv_budget} bytes is smaller than one page "
            f"({kv_bytes_per_token * page_size} bytes). Raise kv_budget (--kv-budget)."
        )
    num_pages = min(num_pages, (2**31 - 1) // page_size)  # slots are int32
    store = KVStore(num_pages, page_size, config.store.max_reuse_rounds)
    if executor is None:
        parts = _make_parts(model, config, store, pool or KVPool(model, num_pages * page_size))
    else:
        parts = EngineParts(_make_planner(config, store), executor)
    engine = Engine(
        store,
        parts,
        encoder.decode,
        max_num_batched_tokens=config.max_batch_tokens,
        kv_bytes_per_token=kv_bytes_per_token,
    )
    return EngineLoop(engine, config, kv_bytes_per_token)


def _make_parts(
    model: LoadedModel, config: EngineConfig, store: KVStore, pool: KVPool
) -> EngineParts:
    backend = partial(make_backend, name=config.attention)
    if config.takes_copies:
        from tokendance.bench import pic  # the baseline is loaded where it is asked for

        return pic.make_parts(model, pool, backend, store, batched=config.reuse == "pic-batched")
    return EngineParts(_make_planner(config, store), TorchExecutor(model, pool, backend))


def _make_planner(config: EngineConfig, store: KVStore) -> Planner:
    return Planner(
        store,
        config.correction,
        prefix=config.reuse != "none",
        segments=config.reuses_segments,
    )
