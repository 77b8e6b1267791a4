"""How near the answers of reused KV are to those of full computation.

Both engines read the same prompts in the same dtype. The one that computes everything answers
greedily; the other is made to say the same tokens, and the distributions of each are compared.

All figures are means over the mirrors, that is over agents that reused shared tokens. Whoever owns
a run has computed it exactly, so counting owners too would flatter: by half in a round of two.
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

    Where nobody reuses shared tokens, it is over all agents.
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
    params = [
        SamplingParams(max_tokens=len(ids), forced_tokens=ids, keep_logprobs=True)
        for ids in answers
    ]
    result = exact.run_round(prompts, params)
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
    params = [
        SamplingParams(
            max_tokens=len(answer.token_ids), forced_tokens=answer.token_ids, keep_logprobs=True
        )
        for answer in reference
    ]
    result = llm.run_round(prompts, params)
    result.raise_for_errors()
    shared = [llm.encoder.encode(prompt).shared_segments() for prompt in prompts]
    mirrors = _mirrors(result.outputs)
    outputs = [result.outputs[index] for index in mirrors]
    num_shared = [sum(len(segment) for _, segment in shared[index]) for index in mirrors]
    compared = [
        compare_logprobs(reference[index].logprobs, torch.stack(output.logprobs))
        for index, output in zip(mirrors, outputs, strict=True)
    ]
    kl, same = [kl for kl, _ in compared], [same for _, same in compared]
    return Fidelity(
        kl_next=float(torch.stack([of_agent[0] for of_agent in kl]).mean()),
        kl_continuation=float(torch.cat(kl).mean()),
        top1=float(torch.cat(same).mean()),
        identical=statistics.mean(float(of_agent.min()) for of_agent in same),
        corrected=statistics.mean(output.corrected_tokens for output in outputs),
        corrected_share=statistics.mean(
            output.corrected_tokens / max(1, count)
            for output, count in zip(outputs, num_shared, strict=True)
        ),
        agents=tuple(output.agent for output in outputs),
    )


def _mirrors(outputs: Sequence[Output]) -> list[int]:
    """Indices of the agents that read KV of another context, or corrected it; all if none did."""
    mirrors = [
        index
        for index, output in enumerate(outputs)
        if output.approximate_tokens or output.corrected_tokens
    ]
    return mirrors or list(range(len(outputs)))
