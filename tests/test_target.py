"""Fidelity targets: the table, the choice, and what the engine makes of it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from test_exactness import KEEP, logprobs, random_ids, random_round
from tokendance import LLM, Part, Prompt, shared
from tokendance.collector.correction import (
    NO_CORRECTION,
    CorrectionPolicy,
    Edges,
    Reuse,
    stored_apart,
)
from tokendance.commands.calibrate import calibrate, run_calibration, write_table
from tokendance.errors import ConfigError
from tokendance.fidelity.calibrate import TINY
from tokendance.fidelity.table import Cell, FidelityTable, Measured, table_path
from tokendance.fidelity.target import FidelityTarget
from tokendance.models.loader import load_model
from tokendance.options import EngineOptions
from tokendance.rounds.segments import as_token_ids, build_prompt, make_salt

MakeLLM = Callable[..., LLM]


def cell(in_order: bool, num_before: int, num_blocks: int, *kl: float) -> Cell:
    """A cell with KLs for correcting 0, 2 and 8 tokens, and the last."""
    corrections = ((0, 0), (2, 1), (8, 1))
    measured = tuple(Measured(*c, one) for c, one in zip(corrections, kl, strict=True))
    return Cell(in_order, num_before, num_blocks, measured, kl[1])


TABLE = FidelityTable(
    "m",
    "float32",
    94,
    (
        cell(True, 100, 4, 0.002, 0.001, 0.0005),
        cell(True, 400, 4, 0.02, 0.004, 0.001),
        cell(True, 400, 16, 0.04, 0.02, 0.006),
        cell(False, 400, 16, 0.3, 0.2, 0.1),
    ),
)


(BLOCK,) = build_prompt([(as_token_ids(range(20)), True)], make_salt()).segments


@pytest.mark.parametrize(
    ("kl", "reuse", "expected"),
    [
        (0.01, Reuse(True, 50, 3, 94 * 3), Edges(0, 0)),
        (0.01, Reuse(True, 100, 4, 94 * 4), Edges(0, 0)),
        (0.01, Reuse(True, 101, 4, 94 * 4), Edges(2, 1)),
        (0.01, Reuse(True, 50, 5, 94 * 5), Edges(8, 1)),  # only the largest cell covers it
        (0.005, Reuse(True, 50, 5, 94 * 5), None),
        (0.25, Reuse(False, 50, 2, 94 * 2), Edges(2, 1)),
        (0.05, Reuse(False, 50, 2, 94 * 2), None),
        (9.0, Reuse(True, 401, 1, 94 * 1), None),  # outside what was measured
        (9.0, Reuse(True, 1, 17, 94 * 17), None),
    ],
)
def test_the_cheapest_correction_that_met_the_target(
    kl: float, reuse: Reuse, expected: Edges | None
) -> None:
    target = FidelityTarget(kl, TABLE)
    assert target.edges_for(reuse) == expected
    mask = target.choose(reuse, BLOCK, 0)
    if expected is None or mask is None:
        assert mask is None
    else:
        assert mask.tolist() == expected.choose(reuse, BLOCK, 0).tolist()


def test_owners_lay_out_runs_for_a_reuse_like_their_own() -> None:
    reuse = Reuse(True, 400, 16, 94 * 16)
    for kl, edges in {0.03: Edges(2, 1), 0.01: Edges(8, 1), 1e-9: NO_CORRECTION}.items():
        layout = stored_apart(FidelityTarget(kl, TABLE), reuse, BLOCK)
        assert layout.tolist() == edges.choose(reuse, BLOCK, 0).tolist()


def test_a_table_survives_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(TABLE.to_json())
    assert FidelityTable.read(path) == TABLE


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 1}', '{"format": 2, "model": "m", "cells": [{}]}']
)
def test_a_broken_table_is_one_sentence(text: str, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="tokendance calibrate"):
        FidelityTable.read(path)
    with pytest.raises(ConfigError, match="tokendance calibrate"):
        FidelityTable.read(tmp_path / "missing.json")


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b", "/", "..", "a b\0c", "x" * 500])
def test_no_model_name_leads_out_of_the_cache(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENDANCE_CACHE", str(tmp_path))
    path = table_path(name, "float32")
    assert path.resolve().parent == (tmp_path / "fidelity").resolve()
    assert len(path.name) < 100
    assert path != table_path(name + "2", "float32")


def parts_of(prompt: Prompt) -> list[Part]:
    assert isinstance(prompt.content, list)
    return [part for part in prompt.content if isinstance(part, Part)]


def permuted(prompts: list[Prompt]) -> list[Prompt]:
    """The second half of the agents have the blocks in the reverse order."""
    changed = []
    for index, prompt in enumerate(prompts):
        first, *blocks, last = parts_of(prompt)
        order = blocks[::-1] if index >= len(prompts) // 2 else blocks
        changed.append(Prompt([first, *order, last], agent=prompt.agent))
    return changed


def with_policy(make_llm: MakeLLM, tiny: object, policy: CorrectionPolicy) -> LLM:
    options = replace(make_llm().engine.options, correction=policy)
    return LLM.from_loaded(tiny, options)  # type: ignore[arg-type]


def with_target(make_llm: MakeLLM, tiny: object, kl: float, table: FidelityTable) -> LLM:
    return with_policy(make_llm, tiny, FidelityTarget(kl, table))


def test_each_reuse_gets_its_own_correction(make_llm: MakeLLM, tiny: object) -> None:
    prompts = random_round(11, agents=3, blocks=3)
    # A single agent with another order: nobody shares its order, so it reuses block by block.
    first, *blocks, last = parts_of(prompts[2])
    prompts[2] = Prompt([first, *blocks[::-1], last], agent="c")
    table = FidelityTable(
        "m",
        "float32",
        94,
        (cell(True, 200, 8, 0.5, 0.01, 0.001), cell(False, 200, 8, 0.5, 0.4, 0.01)),
    )
    llm = with_target(make_llm, tiny, 0.05, table)
    master, mirror, other = llm.run_round(prompts, KEEP).outputs
    sizes = [len(part.content) for part in blocks]
    assert master.corrected_tokens == 0
    assert mirror.corrected_tokens == sum(min(size, 3) for size in sizes)
    assert other.corrected_tokens == sum(min(size, 9) for size in sizes)
    llm.engine.check_integrity()


def test_where_the_target_cannot_be_met_the_answer_is_exact(
    make_llm: MakeLLM, tiny: object
) -> None:
    prompts = permuted(random_round(12, agents=4))
    llm = with_target(make_llm, tiny, 1e-9, TABLE)
    exact = make_llm("none").run_round(prompts, KEEP)
    found = llm.run_round(prompts, KEEP)
    torch.testing.assert_close(logprobs(found), logprobs(exact), rtol=0, atol=1e-4)
    llm.engine.check_integrity()


def test_a_target_counts_what_the_beginning_has_inherited(make_llm: MakeLLM, tiny: object) -> None:
    """A prompt that goes on from a mirror's KV is as far away as that, and one block more."""
    prompts = random_round(15, agents=2, blocks=3)
    block = shared(random_ids(np.random.default_rng(15), 20))
    longer = [Prompt([*parts_of(prompt), block], agent=prompt.agent) for prompt in prompts]
    table = FidelityTable("m", "float32", 94, (cell(True, 300, 3, 0.01, 0.01, 0.01),))
    llm = with_target(make_llm, tiny, 0.02, table)
    first = llm.run_round(prompts, KEEP)
    assert first.outputs[1].reused_tokens > 0
    second = llm.run_round(longer, KEEP)  # four blocks: outside the table
    exact = make_llm("none").run_round(longer, KEEP)
    torch.testing.assert_close(logprobs(second), logprobs(exact), rtol=0, atol=1e-4)
    llm.engine.check_integrity()


def test_a_mirror_may_correct_more_or_less_than_the_layout(make_llm: MakeLLM, tiny: object) -> None:
    """Runs are stored for one correction and read by another; keys are found all the same."""
    prompts = random_round(13, agents=4)
    for kl in (0.5, 0.03, 0.0015):
        llm = with_target(make_llm, tiny, kl, TABLE)
        edges = FidelityTarget(kl, TABLE).edges_for(Reuse(True, 100, 4, 94 * 4))
        assert edges is not None
        plain = with_policy(make_llm, tiny, edges)
        found, expected = llm.run_round(prompts, KEEP), plain.run_round(prompts, KEEP)
        torch.testing.assert_close(logprobs(found), logprobs(expected), rtol=0, atol=1e-4)


def test_calibration_writes_a_table_that_a_target_can_use(
    model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENDANCE_CACHE", str(tmp_path))
    folder = str(model_folder("llama", max_position_embeddings=4096))
    console = Console(quiet=True)
    run_calibration(folder, "tiny", 0, EngineOptions(dtype="float32"), console)
    assert not table_path(folder, "float32").exists()  # it would be taken for a measured one
    write_table(
        calibrate(load_model(folder, "float32"), TINY, 0, EngineOptions(), console), console
    )
    table = json.loads(table_path(folder, "float32").read_text())
    assert {one["in_order"] for one in table["cells"]} == {True, False}
    for one in table["cells"]:
        sizes = [m["first"] + m["last"] for m in one["measured"]]
        assert sizes == sorted(sizes)
        assert all(m["kl"] >= 0 for m in one["measured"])
    llm = LLM(folder, dtype="float32", fidelity_target=100.0, kv_budget="16MiB")
    assert llm.correction.spec == "target:100.0"
    same = LLM(folder, dtype="float32", correction="target:100", kv_budget="16MiB")
    assert same.correction == llm.correction
    with pytest.raises(ConfigError, match="'near'"):
        LLM(folder, dtype="float32", correction="target:near", kv_budget="16MiB")
    with pytest.raises(ConfigError, match="fidelity_target"):
        LLM(folder, dtype="float32", correction="none", fidelity_target=0.1, kv_budget="16MiB")
    with pytest.raises(ConfigError, match="tokendance calibrate"):
        LLM(folder, dtype="bfloat16", fidelity_target=0.1, kv_budget="16MiB")
    with pytest.raises(ConfigError, match="collective"):
        LLM(folder, dtype="float32", fidelity_target=0.1, reuse="prefix", kv_budget="16MiB")


@pytest.mark.parametrize("kl", [0.0, -1.0, float("nan")])
def test_a_target_is_above_zero(kl: float) -> None:
    with pytest.raises(ConfigError, match="target"):
        FidelityTarget(kl, TABLE)
