"""Putting an engine together: a store, memory, an executor and what decides, by the settings."""

from dataclasses import dataclass
from functools import partial

from tokendance.attention.backends import make_backend
from tokendance.collector.correction import CorrectionPolicy
from tokendance.collector.planner import Planner
from tokendance.engine.engine import Engine
from tokendance.engine.loop import EngineLoop
from tokendance.engine.scheduling import DecodingFirst, SchedulingPolicy
from tokendance.errors import ConfigError
from tokendance.executor.kv_pool import KVPool
from tokendance.executor.step import Executor
from tokendance.executor.torch_executor import TorchExecutor
from tokendance.models.encoder import PromptEncoder
from tokendance.models.loader import LoadedModel
from tokendance.options import EngineOptions
from tokendance.store.kv_store import KVStore
from tokendance.store.pages import PagePool


@dataclass(frozen=True, slots=True)
class Assembly:
    """An engine with what it was made of.

    Attributes:
        loop: drives it.
        store: what it knows of KV, and where that lies.
        executor: holds the KV.
    """

    loop: EngineLoop
    store: KVStore
    executor: Executor


def assemble(
    model: LoadedModel,
    options: EngineOptions,
    correction: CorrectionPolicy,
    encoder: PromptEncoder,
    *,
    pool: KVPool | None = None,
    executor: Executor | None = None,
) -> Assembly:
    """Make an engine, and the loop that drives it.

    Args:
        model: to run.
        options: of the loop and the memory.
        correction: the policy that they name.
        encoder: spells answers.
        pool: memory to use in place of its own, as large as the budget says or larger.
        executor: to use in place of one that runs the model; then there is no pool.

    Raises:
        ConfigError: if the budget does not hold a single page, or cannot be allocated.
    """
    kv_bytes_per_token = model.shape.kv_bytes_per_token(model.dtype)
    page_size = options.page_size
    budget = options.kv_bytes(str(model.device))
    num_pages = budget // (kv_bytes_per_token * page_size)
    if num_pages == 0:
        raise ConfigError(
            f"The KV budget of {budget} bytes is smaller than one page "
            f"({kv_bytes_per_token * page_size} bytes). Raise kv_budget (--kv-budget)."
        )
    num_pages = min(num_pages, (2**31 - 1) // page_size)  # slots are int32
    store = KVStore(PagePool(num_pages, page_size), options.max_reuse_rounds)
    policy, executor_class = _run_by_mode(options)
    if executor is None:
        pool = pool or KVPool(model, num_pages * page_size)
        executor = executor_class(model, pool, partial(make_backend, name=options.attention))
    engine = Engine(
        store,
        make_planner(options, correction, store),
        policy,
        executor,
        encoder.decode,
        max_num_batched_tokens=options.max_num_batched_tokens,
        kv_bytes_per_token=kv_bytes_per_token,
    )
    loop = EngineLoop(engine, options, kv_bytes_per_token)
    return Assembly(loop, store, executor)


def make_planner(options: EngineOptions, correction: CorrectionPolicy, store: KVStore) -> Planner:
    """Make what decides over a store, by the mode of reuse."""
    if options.takes_copies:
        from tokendance.bench import pic  # the baseline is loaded where it is asked for

        return pic.PicPlanner(store)
    return Planner(
        store,
        correction,
        prefix=options.reuse != "none",
        segments=options.reuses_segments,
        owners=options.owners,
    )


def _run_by_mode(options: EngineOptions) -> tuple[SchedulingPolicy, type[TorchExecutor]]:
    """What divides the tokens of a step and what runs it, by the mode of reuse."""
    if options.takes_copies:
        from tokendance.bench import pic

        policy = pic.WholePrompts() if options.reuse == "pic-batched" else pic.OnePromptAtATime()
        return policy, pic.PicExecutor
    return DecodingFirst(), TorchExecutor
