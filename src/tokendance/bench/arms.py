"""What suites have in common of what they compare: engines and rounds."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokendance.bench.settings import BenchSettings
from tokendance.bench.suite import timed
from tokendance.bench.workload import WorkloadSpec
from tokendance.collector.correction import CorrectionPolicy
from tokendance.conversation import Agent
from tokendance.engine.request import Request
from tokendance.errors import ConfigError
from tokendance.executor.kv_pool import KVPool
from tokendance.executor.torch_executor import TorchExecutor
from tokendance.llm import LLM
from tokendance.models.loader import LoadedModel, load_model
from tokendance.options import EngineOptions, ReuseMode
from tokendance.outputs import RoundResult
from tokendance.params import SamplingParams
from tokendance.rounds.prompts import Prompt, PromptLike, private, shared
from tokendance.rounds.segments import PrefixHashes, TokenIds
from tokendance.rounds.trace import TraceAgent

DTYPES = ("bfloat16", "float32")
BLOCK_TOKENS = WorkloadSpec().block_tokens
TOWN_TASK = "Answer the others in one sentence. What will you do now?"
AHEAD_TOKENS = 100  # room for agents that begin to decode early


def load(settings: BenchSettings, dtype: str = "bfloat16") -> LoadedModel:
    """Load the model of a suite, in a dtype that the suite chooses."""
    return load_model(settings.model, dtype, settings.engine.device, settings.engine.weights)


def make_engine(
    model: LoadedModel,
    options: EngineOptions,
    mode: ReuseMode,
    num_tokens: int,
    *,
    correction: str | CorrectionPolicy | None = None,
    pool: KVPool | None = None,
) -> LLM:
    """Make an engine of a mode, with room for `num_tokens`, and `options` for the rest.

    Engines may take turns on a `pool` of that size: what one has stored, the next overwrites, so
    the store is to be cleared before each use.
    """
    budget = num_tokens * model.shape.kv_bytes_per_token(model.dtype)
    owners = options.owners if mode == "collective" else 1
    options = EngineOptions.of(
        options, reuse=mode, correction=correction, owners=owners, kv_budget=budget
    )
    return LLM.from_loaded(model, options, pool=pool)


def make_engines(
    model: LoadedModel,
    options: EngineOptions,
    modes: Iterable[ReuseMode],
    num_tokens: int,
    pool: KVPool | None = None,
) -> dict[str, LLM]:
    """Make an engine for each mode; see `make_engine`."""
    return {mode: make_engine(model, options, mode, num_tokens, pool=pool) for mode in modes}


def context_too_short(model: LoadedModel) -> ConfigError:
    """Make the error for a model whose context holds nothing that a suite measures."""
    return ConfigError(
        f"The context of {model.name} ({model.shape.max_context} tokens) is too short for this "
        "suite."
    )


def pool_of(llm: LLM) -> KVPool:
    """The KV memory of an engine that runs on torch."""
    assert isinstance(llm.executor, TorchExecutor)
    return llm.executor.pool


def answer_params(num_tokens: int) -> SamplingParams:
    """Greedy answers of exactly so many tokens."""
    return SamplingParams(max_tokens=num_tokens, ignore_eos=True)


def run_checked(llm: LLM, prompts: Sequence[PromptLike], num_tokens: int) -> RoundResult:
    """Run a round; an agent that failed is an error, not a quick answer."""
    result = llm.run_round(prompts, answer_params(num_tokens))
    result.raise_for_errors()
    return result


def generate_seconds(llm: LLM, prompts: Sequence[PromptLike], num_tokens: int) -> float:
    """Seconds of answering prompts that have nothing to do with each other."""

    def work() -> None:
        outputs = llm.generate(prompts, answer_params(num_tokens))
        assert all(output.error is None for output in outputs)

    return timed(work)


def wall_seconds(result: RoundResult) -> float:
    """Seconds of a whole round."""
    return result.stats.prefill_s + result.stats.decode_s


@dataclass(frozen=True, slots=True)
class TownRound:
    """A round of people who talk: its prompts, and what was answered."""

    prompts: list[Prompt]
    result: RoundResult


def talk(
    llm: LLM, people: Sequence[TraceAgent], rounds: int, max_tokens: int, seed: int
) -> Iterator[TownRound]:
    """Let people hear each other, in the session "town", which is stored if the engine can."""
    session = llm.session("town", [Agent(person.name, person.system) for person in people])
    for number in range(rounds):
        params = {
            person.name: SamplingParams(
                max_tokens=max_tokens, temperature=0.7, seed=seed + 1000 * number + index
            )
            for index, person in enumerate(people)
        }
        prompts = session.ask(TOWN_TASK, params).prompts
        result = session.run(TOWN_TASK, params)
        result.raise_for_errors()
        yield TownRound(prompts, result)


def forced_answers(llm: LLM, played: TownRound) -> list[tuple[int, ...]]:
    """What was said in a round, to be forced, at least a token each.

    An answer that ended at once is the token that ended it.
    """
    end = (min(llm.model.stop_ids),)
    return [output.token_ids or end for output in played.result.outputs]


@dataclass(frozen=True, slots=True, eq=False)
class AgentCache:
    """What an agent has read and said in a round, as it lies in the engine's memory."""

    token_ids: TokenIds  # int32; the last may have no KV yet
    slots: npt.NDArray[np.int32]  # int32, of all that have


def agent_caches(llm: LLM, result: RoundResult) -> list[AgentCache]:
    """Ask the store where it has each agent's prompt and answer of the last round."""
    caches = []
    for output in result.outputs:
        token_ids = np.concatenate([output.prompt_token_ids, np.array(output.token_ids, np.int32)])
        slots = llm.kv_store.match_slots(PrefixHashes(token_ids, llm.encoder.salt))
        # The last token of an answer that was cut off has no KV.
        expected = len(token_ids) - (output.finish_reason != "stop")
        assert len(slots) == expected, "the store has lost a part of an agent's cache"
        caches.append(AgentCache(token_ids, slots))
    return caches


def prompts_around(run: Sequence[int], own: Iterable[Sequence[int]]) -> list[Prompt]:
    """Prompts of agents that read one run in blocks, the last of their own tokens after it.

    The run begins at another position in each, and all are of one length if `own` are.
    """
    blocks = [shared(run[at : at + BLOCK_TOKENS]) for at in range(0, len(run), BLOCK_TOKENS)]
    prompts = []
    for index, ids in enumerate(own):
        last = 1 + index % (len(ids) // 4)
        parts = [private(ids[last:]), *blocks, private(ids[:last])]
        prompts.append(Prompt(parts, agent=f"agent {index}"))
    return prompts


class DecodingRound:
    """A round that has its first tokens, and goes on a step at a time.

    Agents whose prompt is done early decode while the others' prompts are computed, so they are a
    few tokens ahead.
    """

    def __init__(self, llm: LLM, prompts: list[Prompt], num_steps: int) -> None:
        """Compute the prompts; `num_steps` steps are to come."""
        self._engine = llm.engine
        self._engine.forget()
        round_id = self._engine.new_round_id()
        params = answer_params(num_steps + AHEAD_TOKENS)
        self._requests: list[Request] = [
            llm.requests.make(prompt, params, round_id, str(index))
            for index, prompt in enumerate(prompts)
        ]
        self._engine.add(self._requests)
        while any(request.first_token_s is None for request in self._requests):
            self._engine.tick()

    def step(self) -> float:
        """Seconds of one step that makes a token for every agent."""
        before = self._num_generated()
        seconds = timed(self._engine.tick)
        assert self._num_generated() - before == len(self._requests), "an agent is done too early"
        return seconds

    def _num_generated(self) -> int:
        return sum(len(request.generated) for request in self._requests)

    def close(self) -> None:
        """Take the requests back."""
        for request in self._requests:
            self._engine.abort(request)


def timed_spec(settings: BenchSettings, agents: int) -> WorkloadSpec:
    """The rounds of suites that time them."""
    if settings.tiny:
        return WorkloadSpec(agents, 40, (20, 40), source=settings.source, seed=settings.seed)
    return WorkloadSpec(agents, source=settings.source, seed=settings.seed)
