"""The default correction: what it weighs, and the tables that it goes by."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from test_exactness import KEEP, logprobs, random_round
from tokendance import LLM, Agent, Output, Part, SamplingParams, private, shared
from tokendance.collector.correction import USUAL_EDGES, Edges, Reuse
from tokendance.errors import ConfigError
from tokendance.fidelity import balanced, shipped
from tokendance.fidelity.balanced import NOISE, OPENING, PRICE, Balanced
from tokendance.fidelity.shipped import best_table, cautious_table, shipped_table
from tokendance.fidelity.table import Cell, FidelityTable, Measured, table_path
from tokendance.models.demo import _folder as checkpoint_folder
from tokendance.models.loader import load_model
from tokendance.rounds.prompts import Message

CORRECTIONS = ((0, 0), (2, 0), (2, 1), (8, 1), (16, 1))
BEFORE, BLOCKS = (256, 1024), (4, 16)
BLOCK = 94  # tokens


def reuse(in_order: bool, blocks: int, num_inherited: int = 0) -> Reuse:
    """A reuse of blocks as long as those that were measured."""
    return Reuse(in_order, 256, blocks, BLOCK * blocks, num_inherited)


def table(
    kl: Callable[[bool, int, int], tuple[float, ...]], block_tokens: int = BLOCK
) -> FidelityTable:
    """A table of both orders, with KLs after each correction, and by `pic`, for each cell."""
    cells = []
    for at in product((True, False), BEFORE, BLOCKS):
        *of_corrections, pic = kl(*at)
        measured = [Measured(*c, one) for c, one in zip(CORRECTIONS, of_corrections, strict=True)]
        cells.append(Cell(*at, tuple(measured), pic))
    return FidelityTable("m", "bfloat16", block_tokens, tuple(cells))


def test_error_and_price_are_least_together() -> None:
    """The example of the module."""
    policy = Balanced(table(lambda *_: (0.022, 0.011, 0.0107, 0.0064, 0.006, 0.018)))
    assert PRICE == 0.0001
    assert policy.edges_for(reuse(True, 10)) == Edges(2, 0)
    assert policy.edges_for(reuse(True, 5)) == Edges(8, 1)  # half as many tokens
    # All that is read anew costs, and nothing else.
    assert policy.edges_for(reuse(True, 10, num_inherited=5)) == Edges(8, 1)


def test_nothing_is_chosen_that_is_farther_than_pic() -> None:
    kl = (0.0123, 0.0121, 0.0119, 0.0105, 0.001)
    near = Balanced(table(lambda *_: (*kl, 0.011)))
    assert near.edges_for(reuse(True, 16)) == Edges(2, 1)
    far = Balanced(table(lambda *_: (*kl, 0.02)))
    assert far.edges_for(reuse(True, 16)) == Edges(0, 0)
    noise = Balanced(table(lambda *_: (*kl, 0.0114)))
    assert noise.edges_for(reuse(True, 16)) == Edges(0, 0)
    # Where all are farther, the nearest.
    hopeless = Balanced(table(lambda *_: (0.2, 0.2, 0.19, 0.18, 0.01, 0.01)))
    assert hopeless.edges_for(reuse(True, 1000)) == Edges(8, 1)


def test_between_cells_and_beyond() -> None:
    def kl(in_order: bool, before: int, blocks: int) -> tuple[float, ...]:
        """It falls with the blocks, and is the same on average over the text before."""
        none = 0.1 * (2 * before / sum(BEFORE)) / blocks if in_order else 1.0
        return none, 0.9 * none, 0.8 * none, 0.01, 0.001, 1.0

    policy = Balanced(table(kl))
    best = [policy.edges_for(reuse(True, blocks)) for blocks in (1, 4, 8, 16, 40)]
    assert best == [Edges(8, 1), Edges(8, 1), Edges(2, 1), Edges(0, 0), Edges(0, 0)]
    assert policy.edges_for(reuse(False, 16)) == Edges(8, 1)


@given(st.booleans(), st.integers(1, 10**5), st.data())
def test_every_reuse_has_a_correction_of_the_table(
    in_order: bool, num_blocks: int, data: st.DataObject
) -> None:
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    found = table(lambda *_: tuple(generator.uniform(1e-4, 0.1, 6)))
    num_inherited = data.draw(st.integers(0, num_blocks - 1))
    edges = Balanced(found).edges_for(reuse(in_order, num_blocks, num_inherited))
    assert (edges.first, edges.last) in CORRECTIONS
    assert edges.opening == 0
    if num_blocks in BLOCKS and num_inherited == 0:  # by hand, where nothing is between cells
        alike = [
            cell
            for cell in found.cells
            if (cell.in_order, cell.num_blocks) == (in_order, num_blocks)
        ]
        kl = {
            c: sum(cell.measured[index].kl for cell in alike) / len(alike)
            for index, c in enumerate(CORRECTIONS)
            if sum(c) <= 14
        }
        pic = sum(cell.pic for cell in alike) / len(alike)
        good = {c: one for c, one in kl.items() if one <= max(pic, min(kl.values())) + NOISE}
        best = min(good, key=lambda c: good[c] + PRICE * num_blocks * sum(c))
        assert (edges.first, edges.last) == best


@pytest.mark.parametrize(("goes_on", "isolated"), product((False, True), repeat=2))
def test_an_opening_where_reuse_goes_on_from_reuse(goes_on: bool, isolated: bool) -> None:
    policy = Balanced(table(lambda *_: (0.1, 0.1, 0.1, 0.01, 0.001, 1.0)))
    one = replace(reuse(True, 10), isolated=isolated)
    edges = policy.edges_for(one)
    opened = policy.edges_for(replace(one, goes_on=goes_on))
    assert opened == replace(edges, opening=OPENING if goes_on and not isolated else 0)


@pytest.mark.parametrize(
    ("num_blocks", "num_tokens", "is_measured"),
    [(1, 31, False), (1, 32, True), (1, 282, True), (1, 283, False), (9, 846, True), (0, 0, True)],
)
def test_blocks_of_other_lengths_get_a_fixed_correction(
    num_blocks: int, num_tokens: int, is_measured: bool
) -> None:
    policy = Balanced(table(lambda *_: (0.1, 0.1, 0.1, 0.01, 0.001, 1.0)))
    edges = policy.edges_for(Reuse(True, 256, num_blocks, num_tokens))
    assert (edges == USUAL_EDGES) is not is_measured


@pytest.mark.parametrize(("num_tokens", "edges"), [(40, (2, 1)), (60, (8, 1)), (114, (16, 1))])
def test_no_more_is_computed_afresh_than_by_pic(num_tokens: int, edges: tuple[int, int]) -> None:
    policy = Balanced(table(lambda *_: (0.1, 0.09, 0.08, 0.01, 0.001, 1.0)))
    assert policy.edges_for(Reuse(True, 256, 1, num_tokens)) == Edges(*edges)


def test_a_round_is_corrected_as_the_table_has_it(
    make_llm: Callable[..., LLM], tiny: object
) -> None:
    prompts = random_round(13, agents=4)
    kl = {True: (0.05, 0.01, 0.0099, 0.0098, 0.001, 1.0), False: (0.5,) * 6}
    policy = Balanced(table(lambda in_order, *_: kl[in_order], block_tokens=20))
    options = make_llm().engine.options
    found, plain = (
        LLM.from_loaded(tiny, type(options).of(options, correction=one))  # type: ignore[arg-type]
        for one in (policy, Edges(2, 0))
    )
    torch.testing.assert_close(
        logprobs(found.run_round(prompts, KEEP)),
        logprobs(plain.run_round(prompts, KEEP)),
        rtol=0,
        atol=1e-4,
    )


@pytest.mark.parametrize("with_messages", [False, True])
def test_later_rounds_have_an_opening(
    with_messages: bool,
    make_llm: Callable[..., LLM],
    model_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In sessions, and where a host keeps the messages, whose answers are shared text."""
    model = load_model(str(model_folder("llama", max_position_embeddings=2048)), "float32")
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    corrected = []
    for opening in (0, 12):
        monkeypatch.setattr(balanced, "OPENING", opening)
        policy = Balanced(table(lambda *_: (0.022, 0.011, 0.0107, 0.0064, 0.006, 0.018)))
        options = replace(make_llm().engine.options, correction=policy, kv_budget=2**26)
        llm = LLM.from_loaded(model, options)
        play = _with_messages(llm) if with_messages else _in_a_session(llm)
        corrected.append([[one.corrected_tokens for one in play(params)] for _ in range(4)])
    without, opened = corrected
    assert without[:2] == opened[:2]
    for before, after in zip(without[2:], opened[2:], strict=True):
        more = [one - other for one, other in zip(after, before, strict=True)]
        # Two tokens of each block are corrected anyway, and an opening may reach into a second one;
        # who has owned all that it has read is exact.
        assert set(more) <= {0, 9, 10}
        assert np.count_nonzero(more) >= 2


def _in_a_session(llm: LLM) -> Callable[[SamplingParams], Sequence[Output]]:
    session = llm.session("talk", [Agent(f"a{n}", "who I am " * (3 + n)) for n in range(4)])
    return lambda params: session.run("what now?", params).outputs


def _with_messages(llm: LLM) -> Callable[[SamplingParams], Sequence[Output]]:
    histories: list[list[Message]] = [
        [{"role": "system", "content": "who I am " * (3 + n)}] for n in range(4)
    ]
    heard: list[Part] = []

    def play(params: SamplingParams) -> Sequence[Output]:
        for history in histories:
            history.append({"role": "user", "content": [*heard, private("what now?")]})
        outputs = llm.run_round(histories, params).outputs
        heard.clear()
        for number, (history, output) in enumerate(zip(histories, outputs, strict=True)):
            history.append({"role": "assistant", "content": output.text})
            heard.append(shared(f"a{number}: {output.text}\n"))
        return outputs

    return play


def test_a_table_that_says_too_little_is_refused() -> None:
    whole = table(lambda *_: (0.1,) * 6)
    one_order = [cell for cell in whole.cells if cell.in_order]
    for cells in ((), tuple(one_order)):
        with pytest.raises(ConfigError, match="tokendance calibrate"):
            Balanced(FidelityTable("m", "bfloat16", BLOCK, cells))


# -- the tables that come with the package ----------------------------------------------------


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_the_demo_models_have_tables(name: str) -> None:
    found = shipped_table(name)
    assert found is not None
    assert found.model == name
    assert {cell.in_order for cell in found.cells} == {True, False}
    policy = Balanced(found)
    for in_order, num_blocks in product((True, False), (1, 2, 5, 10, 25, 50, 1000)):
        assert isinstance(policy.edges_for(reuse(in_order, num_blocks)), Edges)
    # However many blocks were measured, it is no farther than `pic`, or as near as there is.
    for at in {(cell.in_order, cell.num_blocks) for cell in found.cells}:
        alike = [cell for cell in found.cells if (cell.in_order, cell.num_blocks) == at]
        edges = policy.edges_for(reuse(*at))
        kl = {
            Edges(one.first, one.last): np.mean([cell.measured[index].kl for cell in alike])
            for index, one in enumerate(alike[0].measured)
            if one.first + one.last <= 14
        }
        slack = 1.1  # numbers of blocks are rounded
        pic = np.mean([cell.pic for cell in alike])
        assert kl[edges] <= slack * max(pic, min(kl.values())) + NOISE


@pytest.mark.parametrize(
    "name",
    [
        "smollm2-135m",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "/models/SmolLM2-135M-Instruct",
        str(checkpoint_folder("smollm2-135m")),
    ],
)
def test_a_model_is_known_by_the_end_of_its_name(name: str) -> None:
    found = shipped_table(name)
    assert found is not None
    assert found.model == "smollm2-135m"


@pytest.mark.parametrize("name", ["HuggingFaceTB/SmolLM2-135M", "/models/smollm2-135m", "", "."])
def test_another_model_of_nearly_that_name_is_not(name: str) -> None:
    assert shipped_table(name) is None


def test_other_models_get_the_worst_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENDANCE_CACHE", str(tmp_path))
    found = best_table("some/other-model", "bfloat16")
    assert found == cautious_table()
    others = [table for table in map(shipped_table, shipped._HUB_NAMES) if table is not None]
    assert len(others) == len(shipped._HUB_NAMES)
    for cell in found.cells:
        alike = [
            other
            for one in others
            for other in one.cells
            if (other.in_order, other.num_blocks) == (cell.in_order, cell.num_blocks)
            and round(math.log2(other.num_before)) == round(math.log2(cell.num_before))
        ]
        assert cell.pic == max(other.pic for other in alike)
        for index, one in enumerate(cell.measured):
            assert one.kl == max(other.measured[index].kl for other in alike)
    assert isinstance(Balanced(found).edges_for(reuse(True, 8)), Edges)


def test_what_was_measured_here_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TOKENDANCE_CACHE", str(tmp_path))
    own = table(lambda *_: (0.1,) * 6)
    path = table_path("smollm2-135m", "float32")
    path.parent.mkdir()
    path.write_text(own.to_json())
    assert best_table("smollm2-135m", "float32") == own
    assert best_table("smollm2-135m", "bfloat16") == shipped_table("smollm2-135m")
    path.write_text(json.dumps({"format": 1}))  # of an earlier version: no reason not to start
    assert best_table("smollm2-135m", "float32") == shipped_table("smollm2-135m")
    assert "tokendance calibrate" in caplog.text


def test_each_choice_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Balanced(table(lambda *_: (0.1, 0.09, 0.08, 0.01, 0.001, 1.0)))
    first = policy.edges_for(reuse(True, 10))
    monkeypatch.setattr(balanced, "PRICE", 1e9)
    assert policy.edges_for(reuse(True, 10)) == first
