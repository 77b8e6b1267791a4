"""Correction policies: what they choose, how they are spelled, and a new one."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from test_exactness import KEEP, logprobs, random_round
from tokendance import LLM, Part, Prompt, private, shared
from tokendance.collector.correction import (
    NO_CORRECTION,
    USUAL_EDGES,
    CorrectAll,
    CorrectionPolicy,
    Edges,
    Mask,
    Reuse,
    read_correction,
)
from tokendance.commands.report import document, reuse_name
from tokendance.errors import ConfigError
from tokendance.models.loader import LoadedModel
from tokendance.rounds.segments import Segment, as_token_ids, build_prompt, make_salt

REUSE = Reuse(in_order=True, num_before=10, num_blocks=1, num_tokens=94)


def block(length: int) -> Segment:
    (segment,) = build_prompt([(as_token_ids(range(length)), True)], make_salt()).segments
    return segment


def chosen(policy: CorrectionPolicy, length: int, num_read: int = 0) -> list[int]:
    mask = policy.choose(REUSE, block(length), num_read)
    assert mask is not None
    assert mask.shape == (length,)
    return np.flatnonzero(mask).tolist()


@pytest.mark.parametrize(
    ("policy", "length", "expected"),
    [
        (Edges(3, 1), 6, [0, 1, 2, 5]),
        (Edges(3, 1), 2, [0, 1]),
        (Edges(0, 2), 6, [4, 5]),
        (Edges(4, 0), 6, [0, 1, 2, 3]),
        (Edges(16, 0), 6, [0, 1, 2, 3, 4, 5]),
        (NO_CORRECTION, 6, []),
        (CorrectAll(), 6, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_what_is_corrected(policy: CorrectionPolicy, length: int, expected: list[int]) -> None:
    assert chosen(policy, length) == expected


@pytest.mark.parametrize(
    ("num_read", "expected"),
    [
        (-1, [0, 1, 2, 3, 4, 5]),
        (0, [0, 1, 2, 3, 5]),
        (2, [0, 1, 5]),
        (3, [0, 5]),
        (4, [0, 5]),
        (2**40, [0, 5]),
    ],
)
def test_what_is_corrected_of_an_opening(num_read: int, expected: list[int]) -> None:
    """As many tokens as are reused first, whatever block they are of, and the edges of each."""
    assert chosen(Edges(1, 1, opening=4), 6, num_read) == expected


@pytest.mark.parametrize(
    ("spec", "policy"),
    [
        ("edges", USUAL_EDGES),
        ("edges:8+1", Edges(8, 1)),
        ("first-k", Edges(4, 0)),
        ("first:7", Edges(7, 0)),
        ("opening:32", Edges(0, 0, opening=32)),
        ("opening:32+3+1", Edges(3, 1, opening=32)),
        ("epic", Edges(16, 0)),
        ("none", NO_CORRECTION),
        ("all", CorrectAll()),
    ],
)
def test_specs(spec: str, policy: CorrectionPolicy) -> None:
    assert read_correction(spec) == policy


@given(st.builds(Edges, *[st.integers(0, 99)] * 3) | st.just(CorrectAll()))
def test_a_spec_reads_as_its_policy(policy: CorrectionPolicy) -> None:
    assert read_correction(policy.spec) == policy


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "hkvd",
        "edges:",
        "edges:3",
        "edges:3+-1",
        "first:",
        "first:-1",
        "none:1",
        "x:1",
        "opening:4+1",
    ],
)
def test_other_specs_are_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match=r"no correction .* edges:3\+1"):
        read_correction(spec)


def test_edges_are_not_negative() -> None:
    for numbers in ((-1, 0), (0, -1), (0, 0, -1)):
        with pytest.raises(ConfigError, match="edges"):
            Edges(*numbers)


class Switched:
    """Corrects nothing, and may be told that this is not enough any more."""

    spec = "switched"
    is_enough = True

    def choose(self, reuse: Reuse, segment: Segment, num_read: int) -> Mask | None:
        return NO_CORRECTION.choose(reuse, segment, num_read) if self.is_enough else None


@pytest.mark.parametrize("is_enough", [True, False])
def test_a_beginning_that_is_all_there_is_to_reuse_is_asked_about(
    is_enough: bool, make_llm: Callable[..., LLM], tiny: LoadedModel
) -> None:
    """What a mirror has read stays as far from exact as it was."""
    policy = Switched()
    llm = LLM.from_loaded(tiny, replace(make_llm().engine.options, correction=policy))
    prompts = random_round(18, agents=2, blocks=3)
    mirror = llm.run_round(prompts, KEEP).outputs[1]
    assert mirror.reused_tokens > 0
    longer = Prompt([*prompts[1].content, private([9] * 90)], agent=mirror.agent)
    policy.is_enough = is_enough
    result = llm.run_round([longer], KEEP)
    if is_enough:
        assert result.outputs[0].reused_tokens >= mirror.prompt_tokens
    else:
        exact = make_llm("none").run_round([longer], KEEP)
        torch.testing.assert_close(logprobs(result), logprobs(exact), rtol=0, atol=1e-4)


class Recorder:
    """Corrects the first token of each block, and remembers what reuses it was asked about."""

    spec = "recorder"

    def __init__(self) -> None:
        self.chosen: set[Reuse] = set()

    def choose(self, reuse: Reuse, segment: Segment, num_read: int) -> Mask | None:
        self.chosen.add(reuse)
        return Edges(1, 0).choose(reuse, segment, num_read)


HEAD, OTHERS = shared(range(5, 25)), [shared(range(30 + 9 * n, 39 + 9 * n)) for n in range(4)]


def own(agent: int, length: int) -> Part:
    return private([100 + agent] * length)


@pytest.mark.parametrize(
    ("parts", "in_order", "num_blocks"),
    [
        (lambda agent: [own(agent, 12), *OTHERS, own(agent, 3)], True, 4),
        (lambda agent: [HEAD, own(agent, 12), *OTHERS, own(agent, 3)], True, 4),
        (lambda agent: [own(agent, 12), *OTHERS[:2], own(agent, 2), *OTHERS[2:]], False, 4),
    ],
    ids=["private first", "public first", "private between"],
)
def test_owners_lay_out_for_mirrors_like_them(
    parts: Callable[[int], list[Part]],
    in_order: bool,
    num_blocks: int,
    make_fake_llm: Callable[..., LLM],
) -> None:
    policy = Recorder()
    llm = make_fake_llm(correction=policy)
    llm.generate([[*HEAD.content, 99]])  # what stands before all private text is known
    llm.run_round([Prompt(parts(agent), agent=str(agent)) for agent in range(3)])
    assert policy.chosen == {Reuse(in_order, 12, num_blocks, 9 * num_blocks)}


class EverySecond:
    """Corrects every second token of reuses that are not too long, and computes the others."""

    spec = "second"

    def choose(self, reuse: Reuse, segment: Segment, num_read: int) -> Mask | None:
        del num_read
        return np.arange(len(segment)) % 2 == 1 if reuse.num_blocks < 4 else None


def test_a_new_policy_is_one_class(model_folder: Callable[..., Path]) -> None:
    llm = LLM(
        str(model_folder("llama")), correction=EverySecond(), kv_budget="8MiB", dtype="float32"
    )
    prompts = random_round(3, agents=3, blocks=3)
    blocks = [len(s) for _, s in llm.encoder.encode(prompts[0]).shared_segments()]
    outputs = llm.run_round(prompts, KEEP).outputs
    half = sum(length // 2 for length in blocks)
    assert [output.corrected_tokens for output in outputs] == [0, half, half]
    longer = llm.run_round(random_round(4, agents=3, blocks=4), KEEP).outputs
    assert [output.reused_tokens for output in longer] == [0, 0, 0]
    llm.engine.check_integrity()
    assert reuse_name(llm) == "reuse collective, correction second"
    assert json.loads(json.dumps(document(llm, [], [])))["correction"] == "second"
