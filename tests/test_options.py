"""The options of an engine, as a user of the library gives them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tokendance import LLM
from tokendance.collector.correction import CorrectAll, Edges
from tokendance.errors import ConfigError
from tokendance.models.loader import LoadedModel
from tokendance.options import EngineOptions


@pytest.mark.parametrize(
    ("settings", "spec"),
    [
        ({}, "edges:5+5"),
        ({"correction": "balanced"}, "edges:5+5"),
        ({"correction": "edges"}, "edges:3+1"),
        ({"correction": "edges:8+2"}, "edges:8+2"),
        ({"correction": "first-k"}, "first:4"),
        ({"correction": "first-k", "first_k": 2}, "first:2"),
        ({"first_k": 0}, "none"),
        ({"correction": "epic"}, "first:16"),
        ({"correction": Edges(8, 2)}, "edges:8+2"),
        ({"correction": CorrectAll()}, "all"),
        ({"correction": "target:0.01"}, "edges:1+7"),
        ({"fidelity_target": 0.01}, "edges:1+7"),
    ],
)
def test_corrections(settings: dict[str, Any], spec: str) -> None:
    def target(number: str) -> Edges:
        return Edges(round(100 * float(number)), 7)

    measured = {"target:": target, "balanced": lambda _: Edges(5, 5)}
    assert EngineOptions(**settings).read_correction(measured).spec == spec


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_batch_tokens": 1}, "Did you mean 'max_num_batched_tokens'"),
        ({"kv_bugdet": 1}, "Did you mean 'kv_budget'"),
        ({"xyzzy": 1}, "There are: reuse, correction"),
        ({"reuse": "some"}, "'some'"),
        ({"attention": "fast"}, "no attention 'fast'"),
        ({"correction": "hkvd"}, "'hkvd'.* balanced, target:N"),
        ({"correction": "balanced:2"}, "'balanced:2'"),
        ({"correction": ""}, "no correction ''"),
        ({"correction": "target"}, "'target'"),
        ({"first_k": -1}, "first_k is -1"),
        ({"first_k": 1, "correction": "edges"}, "first_k .*'edges'"),
        ({"first_k": 1, "correction": Edges(2, 0)}, "first_k .*Edges"),
        ({"first_k": 1, "fidelity_target": 0.1}, "fidelity_target"),
        ({"correction": "edges", "fidelity_target": 0.1}, "fidelity_target"),
        ({"correction": "edges", "reuse": "prefix"}, "collective"),
        ({"fidelity_target": 0.1, "reuse": "prefix"}, "collective"),
        ({"fidelity_target": float("nan")}, "above 0"),
        ({"fidelity_target": 0.1}, "tokendance calibrate"),
        ({"correction": "target:much"}, "target is 'much'"),
        ({"shadow": 0.1, "reuse": "prefix"}, "shadow"),
        ({"shadow": float("nan")}, "shadow is nan"),
        ({"store_int8": True}, "store_int8"),
        ({"store_budget": "1GiB"}, "store_budget"),
        ({"store_budget": "much", "store": "kv"}, "much"),
        ({"kv_budget": "lots"}, "lots"),
        ({"kv_budget": 0}, "kv_budget is 0"),
        ({"page_size": 0}, "page_size is 0. Give 1 or more."),
        ({"max_reuse_rounds": 0}, "max_reuse_rounds"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens"),
        ({"threads": 0}, "threads"),
    ],
)
def test_options_that_cannot_be_are_refused_before_a_model_is_loaded(
    settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        LLM("no/such-model", **settings)


def test_keywords_go_before_options(model_folder: Callable[..., Path]) -> None:
    folder = model_folder("llama")
    options = EngineOptions(dtype="float32", kv_budget="8MiB", page_size=8, threads=1)
    threads = torch.get_num_threads()
    try:
        llm = LLM(folder, options=options, page_size=32, correction=Edges(1, 0))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    assert llm.engine.options == EngineOptions(
        dtype="float32", kv_budget="8MiB", page_size=32, threads=1, correction=Edges(1, 0)
    )
    assert 8 * 2**20 - llm.engine.page_bytes < llm.kv_bytes <= 8 * 2**20  # whole pages
    assert llm.model.dtype is torch.float32


def test_the_budget_is_a_number_a_text_or_a_share_of_the_memory(tiny: LoadedModel) -> None:
    assert EngineOptions(kv_budget=1000).kv_bytes("cpu") == 1000
    assert EngineOptions(kv_budget="1.5 KiB").kv_bytes("cuda") == 1536
    assert EngineOptions().kv_bytes("cpu") > 2**28
    page_bytes = 16 * tiny.shape.kv_bytes_per_token(tiny.dtype)
    assert LLM.from_loaded(tiny, EngineOptions(kv_budget=9 * page_bytes)).kv_bytes == 9 * page_bytes


def test_a_store_may_be_one_of_the_options(tiny: LoadedModel, tmp_path: Path) -> None:
    options = EngineOptions(kv_budget=2**22, store=tmp_path / "kv", store_budget="1MiB")
    llm = LLM.from_loaded(tiny, options)
    assert llm.tier is not None
    llm.close()
    assert (tmp_path / "kv" / "index.sqlite").exists()
