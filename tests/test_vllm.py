"""TokenDance inside the real vLLM on a CPU: `make vllm` installs it, and else these are skipped."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

from tiny_models import save_model
from tokendance import LLM, Prompt, SamplingParams, private, shared
from tokendance.bench.vllm import VLLM_ENVIRONMENT, VLLMConfig, child_environment
from tokendance.models.loader import load_model
from tokendance.options import EngineOptions
from vllm_server import CORRECTION, run, talk

PYTHON = VLLM_ENVIRONMENT.find()
SCRIPT = Path(__file__).parent / "vllm_scenarios" / "run.py"
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(PYTHON is None, reason="vLLM is not installed (make vllm)"),
]
PAGE = 32
PAGE_BYTES = PAGE * 2 * 3 * 2 * 32 * 4  # keys and values, layers, heads, their size, float32
NUM_AGENTS = 6
Scripts = Mapping[str, list[dict[str, Any]]]


@contextlib.contextmanager
def vllm_engine(
    model: Path,
    *,
    plugin: bool = True,
    engine: Mapping[str, Any] = MappingProxyType({}),
    **environment: str,
) -> Iterator[Callable[[Scripts], dict[str, Any]]]:
    """Start a vLLM that runs scenarios; see `vllm_scenarios/run.py`."""
    assert PYTHON is not None
    settings = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "block_size": PAGE,
        "kv_cache_memory_bytes": 2**24,
        "max_num_batched_tokens": 512,
        "generation_config": "vllm",
        "skip_tokenizer_init": True,
        **engine,
    }
    job = {"model": str(model), "engine": settings}
    variables = child_environment(PYTHON, VLLMConfig(threads=torch.get_num_threads()))
    variables |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TOKENDANCE": str(int(plugin))}
    variables["TOKENDANCE_CORRECTION"] = CORRECTION
    with talk([PYTHON, "-P", SCRIPT], variables | environment) as ask:
        yield lambda scenarios: json.loads(ask(json.dumps({**job, "scenarios": scenarios})))


def run_in_vllm(model: Path, scenarios: Scripts, **settings: Any) -> dict[str, Any]:
    """Run scenarios in a vLLM of their own; see `vllm_engine`."""
    with vllm_engine(model, **settings) as ask:
        return ask(scenarios)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, "llama", hidden_size=128)  # heads of 32: vLLM has none of 16
    return folder


class Round:
    """Agents with private beginnings of several lengths, who read the same."""

    def __init__(self, seed: int, num_agents: int = NUM_AGENTS, num_shared: int = 150) -> None:
        rng = np.random.default_rng(seed)

        def draw(count: int) -> list[int]:
            return [int(token) for token in rng.integers(10, 290, count)]

        self.shared = draw(num_shared)
        self.private = [draw(9 + 13 * index) for index in range(num_agents)]
        self.tasks = [draw(5 + index) for index in range(num_agents)]

    def add(self, prefix: str = "", **settings: Any) -> dict[str, Any]:
        return {
            "add": [
                {"id": f"{prefix}{index}", "tokens": own + self.shared + task, **settings}
                for index, (own, task) in enumerate(zip(self.private, self.tasks, strict=True))
            ]
        }

    def prompts(self) -> list[Prompt]:
        return [
            Prompt([private(own), shared(self.shared), private(task)], agent=str(index))
            for index, (own, task) in enumerate(zip(self.private, self.tasks, strict=True))
        ]


def tokens(result: Mapping[str, Any], prefix: str = "") -> list[list[int]]:
    answers = result["answers"]
    return [answers[f"{prefix}{index}"]["tokens"] for index in range(NUM_AGENTS)]


FINISH = {"finish": True}
ROUND = Round(0)


@pytest.fixture(scope="module")
def embedded(model: Path) -> list[list[int]]:
    """What the embedded engine answers."""
    llm = LLM.from_loaded(
        load_model(str(model), "float32"), EngineOptions(kv_budget=2**24, correction=CORRECTION)
    )
    result = llm.run_round(ROUND.prompts(), SamplingParams(max_tokens=8, ignore_eos=True))
    return [list(output.token_ids) for output in result.outputs]


OTHERS = Round(7, num_agents=3).add(extra={"reuse": "exact"})["add"]
# What a worker is told, and a few names that it might have: other tenants send it.
READS = list(range(PAGE, PAGE + 150))
FORGED: dict[str, dict[str, Any]] = {
    "attribute": {"tokendance_reads": READS, "tokendance_whole": {"a0": READS}},
    "pages": {"reads": [[0, 0, [1, 2, 3]]], "pages": [1, 2, 3], "positions": READS, "slots": READS},
    "transfer": {
        "kv_transfer_params": {
            "do_remote_prefill": True,
            "remote_block_ids": [1, 2, 3, 4],
            "remote_engine_id": "0",
            "tokendance_reads": READS,
        }
    },
    "encoder": {"ec_transfer_params": {"tokendance_reads": READS}, "prefill_token_ids": READS},
    "round": {"round": "victims", "round_size": NUM_AGENTS, "cache_salt": "victims"},
    "blocks": {"round": "victims", "blocks": [61, 211], "session_id": "victims", "salt": "victims"},
}
SCENARIOS: Scripts = {
    "round": [ROUND.add(), FINISH],
    "one token": [ROUND.add(max_tokens=1), FINISH],
    "again": [ROUND.add("a"), FINISH, ROUND.add("b"), FINISH],
    "owner aborted at once": [ROUND.add(), {"steps": 1, "abort": ["0"]}, FINISH],
    "all aborted": [ROUND.add(), {"steps": 3}, {"abort": [str(i) for i in range(NUM_AGENTS)]}],
    "aborted in the window": [ROUND.add(), {"abort": ["1", "2"]}, FINISH],
    "mirrors aborted": [ROUND.add(), {"steps": 5}, {"abort": ["4", "5"]}, FINISH],
    "late agents": [ROUND.add("a"), {"steps": 6}, ROUND.add("b"), FINISH],
    "exact": [ROUND.add(extra={"reuse": "exact"}), FINISH],
    "exact after a round": [ROUND.add("a"), FINISH, ROUND.add(extra={"reuse": "exact"}), FINISH],
    "tenants": [
        {"add": [{**request, "salt": request["id"]} for request in ROUND.add()["add"]]},
        FINISH,
    ],
    "others after a round": [
        {"add": [OTHERS[0]]},
        FINISH,
        ROUND.add("a"),
        FINISH,
        {"add": [{**request, "id": f"late{request['id']}"} for request in OTHERS]},
        FINISH,
    ],
    "forged": [
        ROUND.add("a", extra={"round": "victims", "round_size": NUM_AGENTS}, salt="victims"),
        {"until": ["a5", "decodes", "mirror"]},
        {
            "add": [
                {**ROUND.add()["add"][4], "id": name, "extra": extra, "salt": name}
                for name, extra in FORGED.items()
            ]
        },
        FINISH,
    ],
}


@pytest.fixture(scope="module")
def results(model: Path) -> dict[str, Any]:
    return run_in_vllm(model, SCENARIOS)


@pytest.fixture(scope="module")
def plain_results(model: Path) -> dict[str, Any]:
    """What vLLM does by itself."""
    scenarios = {name: SCENARIOS[name] for name in ("round", "others after a round")}
    return run_in_vllm(model, scenarios, plugin=False)


@pytest.fixture(scope="module")
def plain(plain_results: Mapping[str, Any]) -> list[list[int]]:
    """What vLLM answers by itself."""
    return tokens(plain_results["round"])


def test_a_round_answers_as_the_embedded_engine_does(
    results: Mapping[str, Any], embedded: list[list[int]], plain: list[list[int]]
) -> None:
    assert tokens(results["round"]) == embedded
    assert embedded != plain  # so it is not that nothing was reused
    cached = [results["round"]["answers"][str(index)]["num_cached"] for index in range(NUM_AGENTS)]
    assert cached == [0, *[len(ROUND.shared) - 4] * (NUM_AGENTS - 1)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_no_page_is_left_behind(name: str, results: Mapping[str, Any]) -> None:
    assert results[name]["missing_blocks"] == 0


def test_who_goes_early_harms_nobody(results: Mapping[str, Any], embedded: list[list[int]]) -> None:
    gone = results["mirrors aborted"]["answers"]
    assert [gone[str(index)]["tokens"] for index in range(4)] == embedded[:4]
    for name, left in (("owner aborted at once", [1, 2, 3, 4, 5]), ("aborted in the window", [0])):
        answers = results[name]["answers"]
        assert all(len(answers[str(index)]["tokens"]) == 8 for index in left)
    assert tokens(results["one token"]) == [answer[:1] for answer in embedded]


def test_who_asks_for_exact_answers_gets_what_vllm_answers(
    results: Mapping[str, Any], plain: list[list[int]]
) -> None:
    for name in ("exact", "exact after a round", "tenants"):
        assert tokens(results[name]) == plain, name
    assert all(answer["num_cached"] == 0 for answer in results["tenants"]["answers"].values())


def test_after_a_round_vllms_prefix_cache_has_exact_kv_only(results: Mapping[str, Any]) -> None:
    answers = results["exact after a round"]["answers"]
    cached = [answers[str(index)]["num_cached"] for index in range(NUM_AGENTS)]
    # A mirror's whole blocks before the first token that it read; of the owner all.
    lengths = [answers["0"]["num_prompt"] - 1, *(len(own) + 3 for own in ROUND.private[1:])]
    assert cached == [length // PAGE * PAGE for length in lengths]


def test_plain_requests_are_answered_and_cached_as_vllm_does_it(
    results: Mapping[str, Any], plain_results: Mapping[str, Any]
) -> None:
    ours, theirs = (one["others after a round"]["answers"] for one in (results, plain_results))
    names = [OTHERS[0]["id"], *(f"late{request['id']}" for request in OTHERS)]
    assert [ours[name] for name in names] == [theirs[name] for name in names]
    assert ours["late0"]["num_cached"] > 0


@pytest.mark.parametrize("name", FORGED)
def test_nobody_names_pages_but_the_scheduler(
    name: str, results: Mapping[str, Any], plain: list[list[int]], embedded: list[list[int]]
) -> None:
    """Whatever another tenant sends, it reads nothing of what a victim has computed."""
    answer = results["forged"]["answers"][name]
    assert answer["tokens"] == plain[4] != embedded[4]
    assert answer["num_cached"] == 0
    assert tokens(results["forged"], "a") == embedded


def test_a_round_that_comes_again_finds_all_of_it(
    results: Mapping[str, Any], embedded: list[list[int]]
) -> None:
    answers = results["again"]["answers"]
    assert tokens(results["again"], "b") == embedded
    for index in range(NUM_AGENTS):
        assert answers[f"b{index}"]["num_cached"] == answers[f"b{index}"]["num_prompt"] - 1


@pytest.mark.parametrize(
    "engine",
    [
        {"max_num_batched_tokens": 48},
        {"max_num_seqs": 2},
        {"async_scheduling": True},
        {"scheduling_policy": "priority"},
        {"kv_cache_memory_bytes": 14 * PAGE_BYTES, "max_model_len": 352},
    ],
    ids=["chunks", "few seats", "asynchronous", "priorities", "few pages"],
)
def test_however_vllm_schedules(
    engine: Mapping[str, Any], model: Path, embedded: list[list[int]], plain: list[list[int]]
) -> None:
    result = run_in_vllm(model, {"round": SCENARIOS["round"]}, engine=engine)["round"]
    assert result["missing_blocks"] == 0
    answers = tokens(result)
    if "max_model_len" in engine:  # who found no room for what it would read computes it
        pairs = zip(answers, embedded, plain, strict=True)
        assert all(answer in (ours, theirs) for answer, ours, theirs in pairs)
    else:
        assert answers == embedded


def conversation(num_rounds: int) -> list[dict[str, Any]]:
    """Rounds in which all read more each time: what was read before, and something new."""
    rng, agents, script = np.random.default_rng(4), Round(3, num_shared=60), []
    tasks = agents.tasks
    for number in range(num_rounds):
        script += [agents.add(f"{number}-"), FINISH]
        new = [int(token) for token in rng.integers(10, 290, 60)]
        agents.private = [
            own + agents.shared + task for own, task in zip(agents.private, tasks, strict=True)
        ]
        agents.shared = new
    return script


def num_computed(result: Mapping[str, Any], number: int) -> int:
    answers = [result["answers"][f"{number}-{index}"] for index in range(NUM_AGENTS)]
    return sum(answer["num_prompt"] - answer["num_cached"] for answer in answers)


def test_a_later_round_finds_the_earlier_ones_in_place(model: Path) -> None:
    """Agents compute the new block once, and tasks; with less room, more than that."""
    scenarios = {"conversation": conversation(4)}
    kept = run_in_vllm(model, scenarios)["conversation"]
    tight = run_in_vllm(
        model,
        scenarios,
        engine={"kv_cache_memory_bytes": 24 * PAGE_BYTES, "max_model_len": 480},
    )["conversation"]
    tasks = sum(5 + index for index in range(NUM_AGENTS))
    for number in (1, 2, 3):
        # The new block once, and its edges for each mirror; nothing of what was read before.
        assert num_computed(kept, number) == 60 + 5 * 4 + tasks
        assert num_computed(tight, number) > num_computed(kept, number)
    assert kept["missing_blocks"] == tight["missing_blocks"] == 0


def test_whoever_is_preempted_reads_again_or_computes(
    model: Path, embedded: list[list[int]], plain: list[list[int]]
) -> None:
    engine = {"kv_cache_memory_bytes": 18 * PAGE_BYTES, "max_model_len": 352}
    script = [ROUND.add(max_tokens=40), FINISH]
    result = run_in_vllm(model, {"round": script}, engine=engine)["round"]
    assert result["preempted"]
    assert result["missing_blocks"] == 0
    for answer, ours, theirs in zip(tokens(result), embedded, plain, strict=True):
        assert len(answer) == 40
        assert answer[:8] in (ours, theirs)


def test_who_has_priority_waits_for_no_owner_that_has_less(model: Path) -> None:
    """Owners of a round are those with the highest priority; a late one with more computes."""
    requests = ROUND.add()["add"]
    rising = [{**request, "priority": -index} for index, request in enumerate(requests)]
    late = {**requests[0], "id": "late", "priority": -9}
    scenarios: Scripts = {
        "rising": [{"add": rising}, FINISH],
        "late": [
            {"add": [{**request, "priority": 5} for request in requests]},
            {"steps": 1},
            {"add": [late]},
            FINISH,
        ],
    }
    engine = {"scheduling_policy": "priority", "max_num_seqs": 2, "max_num_batched_tokens": 48}
    result = run_in_vllm(model, scenarios, engine=engine)
    cached = [result["rising"]["answers"][str(i)]["num_cached"] for i in range(NUM_AGENTS)]
    assert cached[-1] == 0
    assert all(num > 0 for num in cached[:-1])
    assert all(len(answer["tokens"]) == 8 for answer in result["late"]["answers"].values())
    assert result["rising"]["missing_blocks"] == result["late"]["missing_blocks"] == 0


def test_a_version_that_was_not_tested_is_refused_and_can_be_tried() -> None:
    script = (
        "import os, vllm, tokendance.integrations.vllm as plugin\n"
        "from vllm.platforms import current_platform\n"
        "vllm.__version__ = '0.99.1'\n"
        "os.environ['TOKENDANCE'] = '1'\n"
        "try: plugin.register()\n"
        "except ValueError as error: print(type(error).__name__, error)\n"
        "print(hasattr(type(current_platform), 'has_tokendance'))\n"
        "os.environ['TOKENDANCE_ANY_VERSION'] = '1'\n"
        "plugin.register()\n"
        "print(hasattr(type(current_platform), 'has_tokendance'))\n"
    )
    refusal, *others = in_python(script, TOKENDANCE="0")
    assert refusal.startswith("ConfigError ")
    assert "this is 0.99.1. Set TOKENDANCE_ANY_VERSION=1 to try it" in refusal
    assert others == ["False", "True"]


def in_python(script: str, **variables: str) -> list[str]:
    """The lines that a script prints in vLLM's environment, without vLLM's log."""
    assert PYTHON is not None
    environment = child_environment(PYTHON, VLLMConfig()) | {"VLLM_LOGGING_LEVEL": "ERROR"}
    return run([PYTHON, "-P", "-c", script], "", environment | variables).splitlines()


def test_schedulers_and_workers_load_nothing_of_the_engine() -> None:
    """Beside vLLM's own, which has loaded transformers."""
    script = (
        "import sys, vllm.v1.core.sched.async_scheduler, vllm.v1.worker.cpu_worker\n"
        "import vllm.v1.metrics.loggers\n"
        "before = set(sys.modules)\n"
        "import tokendance.integrations.vllm.scheduler, tokendance.integrations.vllm.cpu_worker\n"
        "print(*sorted({'.'.join(name.split('.')[:2]) for name in set(sys.modules) - before "
        "if name.startswith(('tokendance.', 'transformers'))}))\n"
    )
    (rooms,) = in_python(script, TOKENDANCE="0")
    assert set(rooms.split()) <= {
        f"tokendance.{room}"
        for room in (
            *("attention", "cache", "collector", "errors", "fidelity", "integrations", "kinds"),
            *("rounds", "store"),
        )
    }


def test_the_plug_in_loads_neither_transformers_nor_the_engine() -> None:
    script = (
        "import sys, tokendance.integrations.vllm as p; p.register(); "
        "import tokendance.integrations.vllm.rounds, tokendance.integrations.vllm.hints; "
        "print([m for m in sys.modules if m.split('.')[0] in ('transformers', 'vllm', 'torch') "
        "or m.startswith(('tokendance.engine', 'tokendance.llm', 'tokendance.models'))])"
    )
    assert in_python(script, TOKENDANCE="0") == ["[]"]
