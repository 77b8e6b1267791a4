"""What all tests share: how much is tried, and tiny random models, made once per process.

Where several processes run the tests, one more loads this file and runs none. So what takes seconds
to import is imported where it is needed.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # 0 runs its tests on a GPU
if folder := os.environ.get("TOKENDANCE_NATIVE"):
    # Another build of the native kernel (make sanitize).
    (library,) = Path(folder).glob("_native*.so")
    loader = ExtensionFileLoader("tokendance.attention._native", str(library))
    spec = importlib.util.spec_from_file_location(loader.name, library, loader=loader)
    assert spec is not None
    sys.modules[loader.name] = importlib.util.module_from_spec(spec)
    loader.exec_module(sys.modules[loader.name])

if TYPE_CHECKING:
    import httpx

    from tokendance import LLM
    from tokendance.executor.step import Executor
    from tokendance.models.loader import LoadedModel
    from tokendance.options import ReuseMode

# How many random examples are tried: all of them, or a quarter while somebody waits (make test).
# How long one takes says nothing on a machine that does something else, too.
settings.register_profile("ci", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("developer", settings.get_profile("ci"), max_examples=25)
settings.load_profile("ci")  # `--hypothesis-profile` comes after it


def is_thorough() -> bool:
    """Whether everything is tried at its full size, as CI does."""
    return settings.get_current_profile_name() == "ci"


def examples(count: int) -> int:
    """So many random examples where everything is tried, and a quarter of them elsewhere."""
    return count if is_thorough() else max(1, count // 4)


def num_threads() -> int:
    """Threads for a larger model: the cores, divided among the processes that run tests."""
    num_processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    return max(1, (os.cpu_count() or 1) // num_processes)


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    """Tiny models gain nothing from threads, which wait for each other while others work."""
    import torch

    is_demo = request.node.get_closest_marker("demo") is not None
    torch.set_num_threads(num_threads() if is_demo else 1)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that saves a tiny model of an architecture and returns its folder."""
    from tiny_models import save_model

    folders: dict[str, Path] = {}

    def make(architecture: str, **changes: object) -> Path:
        key = architecture + repr(sorted(changes.items()))
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp(architecture)
            save_model(folders[key], architecture, **changes)
        return folders[key]

    return make


@pytest.fixture(scope="module")
def client(model_folder: Callable[..., Path]) -> Iterator[httpx.Client]:
    """A client of a server whose tiny model reads longer prompts."""
    from serving import serving
    from tokendance import LLM
    from tokendance.models.loader import load_model
    from tokendance.options import EngineOptions

    model = load_model(str(model_folder("llama", max_position_embeddings=4096)), "float32")
    with serving(LLM.from_loaded(model, EngineOptions(kv_budget=2**24))) as (found, _):
        yield found


@pytest.fixture(scope="session")
def tiny(model_folder: Callable[..., Path]) -> LoadedModel:
    from tokendance.models.loader import load_model

    return load_model(str(model_folder("llama")), "float32")


@pytest.fixture(scope="session")
def fake() -> LoadedModel:
    """A tokenizer and a shape, and no model: for a `FakeExecutor`."""
    from tiny_models import fake_model

    return fake_model()


@pytest.fixture
def make_fake_llm(fake: LoadedModel, make_llm: Callable[..., LLM]) -> Callable[..., LLM]:
    """Return a function that puts an engine around a `FakeExecutor`, which says no special token.

    Its steps take no time, and what it answers follows from the tokens it reads: see `said`.
    """
    from fake_executor import FakeExecutor
    from tiny_models import SPECIALS, VOCAB

    def make(**settings: Any) -> LLM:
        num_slots = settings.get("num_pages", 400) * settings.get("page_size", 16)
        return make_llm(model=fake, executor=FakeExecutor(num_slots, VOCAB, SPECIALS), **settings)

    return make


@pytest.fixture
def make_llm(tiny: LoadedModel) -> Iterator[Callable[..., LLM]]:
    """Return a function that puts an engine around the tiny model; checks its books at the end."""
    from tokendance import LLM
    from tokendance.options import EngineOptions

    made: list[LLM] = []

    def make(
        reuse: ReuseMode = "collective",
        correction: str = "first:4",
        max_num_batched_tokens: int = 4096,
        num_pages: int = 400,
        page_size: int = 16,
        max_reuse_rounds: int = 16,
        model: LoadedModel = tiny,
        executor: Executor | None = None,
        **others: Any,
    ) -> LLM:
        page_bytes = model.shape.kv_bytes_per_token(model.dtype) * page_size
        options = EngineOptions(
            reuse=reuse,
            correction=correction if reuse == "collective" else None,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_budget=num_pages * page_bytes,
            page_size=page_size,
            max_reuse_rounds=max_reuse_rounds,
            **others,
        )
        made.append(LLM.from_loaded(model, options, executor=executor))
        return made[-1]

    yield make
    for llm in made:
        llm.engine.check_integrity()
        assert not llm.engine.has_work
        llm.kv_store.clear()
        llm.engine.check_integrity()
        assert llm.kv_store.pool.num_free == llm.kv_store.pool.num_pages
