"""How near the answers of reused KV are to those of full computation.

Both engines read the same prompts in the same dtype. The one that computes everything answers
greedily; the other is made to say the same tokens, and the distributions of each are compared.

All figures are means over the mirrors, that is over agents whose prompt has KV of another context.
Who owns what is new in a round, and has read nothing before, has computed all of it exactly, so
counting owners too would flatter: by half in a round of two.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokendance.fidelity.compare import compare_logprobs
from tokendance.llm import LLM
from tokendance.outputs import Output
from tokendance.params import SamplingParams
from tokendance.rounds.prompts import Prompt


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """What full computation answers."""

    token_ids: tuple[int, ...]  # the answer, with the token that ends it if it came to an end
    logprobs: Tensor  # float32 (tokens, vocabulary)


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Against full computation, over the mirrors of a round.

    Where nobody has KV of another context, it is over all agents.
    """

    kl_next: float  # mean KL divergence (nats) of the next token's distribution
    kl_continuation: float  # mean over the tokens of the forced answers
    top1: float  # share of these tokens at which both put the same token first
    identical: float  # share of agents for which that holds at every token: the same answer
    corrected: float  # corrected tokens per mirror
    corrected_share: float  # the same as a share of the shared tokens that it reads
    agents: tuple[str, ...]  # names of those that this is about


def reference_answers(exact: LLM, prompts: Sequence[Prompt], num_tokens: int) -> list[Reference]:
    """Greedy answers, `num_tokens` or less, of an engine that computes everything.

    Raises:
        TokenDanceError: if a prompt cannot be run.
    """
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, keep_logprobs=True)
    result = exact.run_round(prompts, params)
    result.raise_for_errors()
    answers = []
    for output in result.outputs:
        ends = (
            index + 1
            for index, token in enumerate(output.token_ids)
            if token in exact.model.stop_ids
        )
        length = next(ends, len(output.token_ids))
        answers.append(Reference(output.token_ids[:length], torch.stack(output.logprobs[:length])))
    return answers


def forced_reference(
    exact: LLM, prompts: Sequence[Prompt], answers: Sequence[tuple[int, ...]]
) -> list[Reference]:
    """What an engine that computes everything says of given answers, at least a token each.

    Raises:
        TokenDanceError: if a prompt cannot be run.
    """
    result = exact.run_round(prompts, _forced(answers))
    result.raise_for_errors()
    return [
        Reference(ids, torch.stack(output.logprobs))
        for ids, output in zip(answers, result.outputs, strict=True)
    ]


def measure_fidelity(
    llm: LLM, prompts: Sequence[Prompt], reference: Sequence[Reference]
) -> Fidelity:
    """Run a round with the reference's tokens forced, and compare distributions.

    The engine's store may hold the private parts, and in a session what it has computed of earlier
    rounds, but no shared block that is new, or the round would have no owner. `reference` has an
    answer for each of the prompts.

    Raises:
        TokenDanceError: if a prompt cannot be run.
    """
    compared = compare_round(llm, prompts, reference)
    return fidelity_of([agent for agent in compared if agent.is_mirror] or compared)


@dataclass(frozen=True, slots=True, eq=False)
class ComparedAgent:
    """One agent's answer beside that of full computation."""

    output: Output
    kl: Tensor  # float32 (tokens,), nats
    same: Tensor  # (tokens,), whether both put the same token first
    num_shared: int  # shared tokens of its prompt

    @property
    def is_mirror(self) -> bool:
        """Whether its prompt has KV of another context, or had any that it corrected."""
        return bool(self.output.approximate_tokens or self.output.corrected_tokens)


def compare_round(
    llm: LLM, prompts: Sequence[Prompt], reference: Sequence[Reference]
) -> list[ComparedAgent]:
    """Run a round with the reference's tokens forced; each of its agents, see `measure_fidelity`.

    Raises:
        TokenDanceError: if a prompt cannot be run.
    """
    result = llm.run_round(prompts, _forced([answer.token_ids for answer in reference]))
    result.raise_for_errors()
    return [
        ComparedAgent(
            output,
            *compare_logprobs(answer.logprobs, torch.stack(output.logprobs)),
            sum(len(segment) for _, segment in llm.encoder.encode(prompt).shared_segments()),
        )
        for prompt, answer, output in zip(prompts, reference, result.outputs, strict=True)
    ]


def fidelity_of(agents: Sequence[ComparedAgent]) -> Fidelity:
    """Means over some agents of a round."""
    return Fidelity(
        kl_next=float(torch.stack([agent.kl[0] for agent in agents]).mean()),
        kl_continuation=float(torch.cat([agent.kl for agent in agents]).mean()),
        top1=float(torch.cat([agent.same for agent in agents]).mean()),
        identical=statistics.mean(float(agent.same.min()) for agent in agents),
        corrected=statistics.mean(agent.output.corrected_tokens for agent in agents),
        corrected_share=statistics.mean(
            agent.output.corrected_tokens / max(1, agent.num_shared) for agent in agents
        ),
        agents=tuple(agent.output.agent for agent in agents),
    )


def _forced(answers: Sequence[tuple[int, ...]]) -> list[SamplingParams]:
    return [
        SamplingParams(max_tokens=len(ids), forced_tokens=ids, keep_logprobs=True)
        for ids in answers
    ]
