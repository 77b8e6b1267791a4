"""What goes wrong inside the real vLLM: aborts, pauses, resets, preemption, little memory."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from test_vllm import (
    FINISH,
    NUM_AGENTS,
    PAGE_BYTES,
    PYTHON,
    ROUND,
    Round,
    Scripts,
    tokens,
    vllm_engine,
)
from test_vllm import embedded as embedded
from test_vllm import model as model
from tokendance import LLM, SamplingParams
from tokendance.models.loader import load_model
from tokendance.options import EngineOptions
from vllm_server import CORRECTION

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(PYTHON is None, reason="vLLM is not installed (make vllm)"),
]
Ask = Callable[[Scripts], dict[str, Any]]
# Owners and mirrors prefill for several steps, and a round has more agents than there are seats.
CHUNKS: dict[str, Any] = {"max_num_batched_tokens": 48, "max_num_seqs": 4}
ENGINES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "synchronous": ({"async_scheduling": False}, {}),
    "asynchronous": ({"async_scheduling": True}, {}),
    "two devices": ({"tensor_parallel_size": 2}, {}),
    "V2": (
        {"async_scheduling": True},
        {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"},
    ),
}
RESET = {"call": ["reset_prefix_cache", {"reset_running_requests": True}]}
RESUME: dict[str, Any] = {"call": ["resume_scheduler", {}]}


def pause(mode: str, *, clear: bool = True) -> dict[str, Any]:
    return {"call": ["pause_scheduler", {"mode": mode, "clear_cache": clear}]}


@pytest.fixture(scope="module", params=ENGINES)
def ask(request: pytest.FixtureRequest, model: Path) -> Iterator[Ask]:
    engine, environment = ENGINES[request.param]
    with vllm_engine(model, engine={**CHUNKS, **engine}, **environment) as ask:
        yield ask


STAGES = [
    ["5", "in the window"],
    ["5", "waits for an owner"],
    ["0", "prefills", "owner"],
    ["4", "waits for a seat", "mirror"],
    ["4", "prefills", "mirror"],
    ["0", "decodes", "owner"],
    ["3", "decodes", "mirror"],
]
STAGE_NAMES = ["-".join(stage) for stage in STAGES]


def until(stage: list[str]) -> list[dict[str, Any]]:
    """Begin a round, and go on to a stage of one of its requests."""
    first_step = {"steps": 0 if stage[1] == "in the window" else 1}
    return [ROUND.add(), first_step, {"until": stage}]


def test_aborts_at_every_stage_harm_nobody(ask: Ask, embedded: list[list[int]]) -> None:
    scenarios = {
        name: [*until(stage), {"abort": [stage[0]]}, FINISH]
        for name, stage in zip(STAGE_NAMES, STAGES, strict=True)
    }
    results = ask(scenarios)
    for name, (gone, *_, role) in zip(STAGE_NAMES, STAGES, strict=True):
        assert results[name]["missing_blocks"] == 0, name
        for index in range(NUM_AGENTS):
            answer = results[name]["answers"].get(str(index), {"tokens": []})["tokens"]
            if str(index) == gone:
                assert len(answer) < 8, name
            elif role == "owner":  # another one computes what all read
                assert len(answer) == 8, name
            else:
                assert answer == embedded[index], name


def check_goes_on_as_vllm_would(ask: Ask, result: Mapping[str, Any]) -> None:
    """Assert that who ran at a call has said since what vLLM says to its prompt and answer."""
    assert result["missing_blocks"] == 0
    assert result["said"]
    requests = []
    for request in ROUND.add(extra={"reuse": "exact"})["add"]:
        num_said = result["said"].get(request["id"], 8)
        if num_said < 8:
            prompt = [*request["tokens"], *result["answers"][request["id"]]["tokens"][:num_said]]
            requests.append({**request, "tokens": prompt, "max_tokens": 8 - num_said})
    exact = ask({"exact": [{"add": requests}, FINISH]})["exact"]["answers"]
    for name, answer in exact.items():
        said = result["said"][name]
        assert result["answers"][name]["tokens"][said:] == answer["tokens"]


@pytest.mark.parametrize("stage", STAGES[2:], ids=STAGE_NAMES[2:])
@pytest.mark.parametrize("call", [RESET, pause("keep")], ids=["reset", "pause"])
def test_what_runs_when_caches_are_reset_is_computed_anew(
    call: dict[str, Any], stage: list[str], ask: Ask
) -> None:
    """Nothing of the KV from before is read, as when the model's weights have changed."""
    script = [*until(stage), call, RESUME, FINISH]
    check_goes_on_as_vllm_would(ask, ask({"reset": script})["reset"])


@pytest.mark.parametrize("stage", STAGES[2:], ids=STAGE_NAMES[2:])
def test_who_is_paused_with_its_kv_goes_on_as_if_nothing_had_been(
    stage: list[str], ask: Ask, embedded: list[list[int]]
) -> None:
    script = [*until(stage), pause("keep", clear=False), RESUME, FINISH]
    result = ask({"paused": script})["paused"]
    assert tokens(result) == embedded
    assert result["missing_blocks"] == 0


@pytest.mark.parametrize(
    "call",
    [pause("abort"), {"call": ["sleep", {"level": 1, "mode": "abort"}]}],
    ids=["pause", "sleep"],
)
def test_who_comes_while_all_is_paused_makes_a_round_after_it(
    call: dict[str, Any], ask: Ask, embedded: list[list[int]]
) -> None:
    wake = RESUME if call["call"][0] != "sleep" else {"call": ["wake_up", {}]}
    script = [
        ROUND.add("gone"),
        {"until": ["gone3", "decodes", "mirror"]},
        call,
        {"abort": [f"gone{index}" for index in range(NUM_AGENTS)]},  # for vLLM's front end
        ROUND.add(),
        {"steps": 3},
        wake,
        FINISH,
    ]
    result = ask({"paused": script})["paused"]
    assert tokens(result) == embedded
    cached = [result["answers"][str(index)]["num_cached"] for index in range(NUM_AGENTS)]
    assert cached == [0, *[len(ROUND.shared) - 4] * (NUM_AGENTS - 1)]
    assert all(len(result["answers"][f"gone{i}"]["tokens"]) < 8 for i in (1, 2, 3))
    assert result["missing_blocks"] == 0


# -- little memory ----------------------------------------------------------------------------

SMALL = {"kv_cache_memory_bytes": 18 * PAGE_BYTES, "max_model_len": 352}
NUM_PAGES = 17  # one is vLLM's null block


@pytest.fixture(scope="module")
def small(model: Path) -> Iterator[Ask]:
    """An engine that has hardly more than its longest context needs, and keeps all it can."""
    with vllm_engine(model, engine=SMALL, TOKENDANCE_RETAINED_SHARE="1") as ask:
        yield ask


def alone(name: str, num_tokens: int, **settings: Any) -> dict[str, Any]:
    """A request that shares nothing."""
    prompt = Round(sum(name.encode()), num_agents=1, num_shared=num_tokens).shared
    return {"id": name, "tokens": prompt, **settings}


def test_owners_and_mirrors_are_preempted_and_all_are_answered(small: Ask) -> None:
    """Whoever came last is preempted first: mirrors, and then their owner."""
    results = small(
        {
            "mirrors": [ROUND.add(max_tokens=40), FINISH],
            "owners": [
                {"add": [alone("first", 100, max_tokens=240)]},
                {"until": ["first", "decodes"]},
                {"steps": 200},  # it has 10 pages, and soon 11
                {"add": ROUND.add(max_tokens=40)["add"][:2]},
                FINISH,
            ],
        }
    )
    for result in results["mirrors"], results["owners"]:
        assert result["missing_blocks"] == 0
    assert {role for _, role in results["mirrors"]["preempted"]} >= {"mirror"}
    assert {role for _, role in results["owners"]["preempted"]} >= {"owner"}
    assert all(len(answer) == 40 for answer in tokens(results["mirrors"]))
    owners = results["owners"]["answers"]
    assert [len(owners[name]["tokens"]) for name in ("first", "0", "1")] == [240, 40, 40]


def test_what_is_kept_for_later_rounds_starves_nobody(small: Ask) -> None:
    rounds = [Round(seed, num_shared=60) for seed in (20, 21, 22)]
    script: list[dict[str, Any]] = []
    for number, agents in enumerate(rounds):
        script += [agents.add(f"{number}-"), FINISH]
    longest = alone("longest", 340, extra={"reuse": "exact"})
    results = small(
        {
            "after": [*script, {"add": [longest]}, FINISH],
            "while": [
                ROUND.add(max_tokens=40),
                {"until": ["1", "decodes", "mirror"]},
                {"add": [longest, alone("long", 340)]},
                FINISH,
            ],
        }
    )
    for result in results["after"], results["while"]:
        assert result["peak_blocks"] == NUM_PAGES
        assert result["missing_blocks"] == 0
        assert len(result["answers"]["longest"]["tokens"]) == 8
    assert len(results["while"]["answers"]["long"]["tokens"]) == 8
    assert all(len(answer) == 40 for answer in tokens(results["while"]))


def test_many_tenants_in_little_memory_are_all_answered(small: Ask) -> None:
    tenants = [
        {**request, "id": f"{salt}{request['id']}", "salt": salt, "max_tokens": 30}
        for request in ROUND.add()["add"]
        for salt in ("a", "b", "c")
    ]
    result = small({"tenants": [{"add": tenants}, FINISH]})["tenants"]
    assert result["missing_blocks"] == 0
    for salt in ("a", "b", "c"):
        assert all(len(answer) == 30 for answer in tokens(result, salt))


# -- drafts -----------------------------------------------------------------------------------


def test_drafts_end_where_the_context_does(model: Path) -> None:
    """To vLLM a mirror is short, so it drafts beyond the end of the true context."""
    max_model_len = 240
    options = EngineOptions(kv_budget=2**24, correction=CORRECTION)
    llm = LLM.from_loaded(load_model(str(model), "float32"), options)
    longest = max_model_len - len(ROUND.add()["add"][0]["tokens"])
    result = llm.run_round(ROUND.prompts(), SamplingParams(max_tokens=longest, ignore_eos=True))
    drafts = {
        "method": "ngram",
        "num_speculative_tokens": 5,
        "prompt_lookup_max": 2,
        "prompt_lookup_min": 1,
    }
    with vllm_engine(
        model, engine={"max_model_len": max_model_len, "speculative_config": drafts}
    ) as ask:
        answers = ask({"edge": [ROUND.add(max_tokens=200), FINISH]})["edge"]
    assert answers["missing_blocks"] == 0
    for request, output in zip(ROUND.add()["add"], result.outputs, strict=True):
        answer = answers["answers"][request["id"]]["tokens"]
        assert len(request["tokens"]) + len(answer) == max_model_len
        assert answer == list(output.token_ids)[: len(answer)]
