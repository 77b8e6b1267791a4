"""How near the answers of reused KV are to those of full computation."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tokendance.engine.sampling import SamplingParams
from tokendance.llm import LLM
from tokendance.outputs import Output
from tokendance.rounds.prompts import Prompt


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Against full computation, over the agents of a round, the exact owner included.

    Attributes:
        kl_next: mean KL divergence (nats) of the next token's distribution.
        kl_continuation: mean over a forced continuation.
        top1: share of the continuation's tokens at which both put the same token first.
        corrected: corrected tokens per agent that has any.
    """

    kl_next: float
    kl_continuation: float
    top1: float
    corrected: float


def reference_answers(exact: LLM, prompts: Sequence[Prompt], num_tokens: int) -> list[Output]:
    """Greedy answers with their distributions, by an engine that computes everything."""
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, keep_logprobs=True)
    result = exact.run_round(prompts, params)
    result.raise_for_errors()
    return list(result.outputs)


def measure_fidelity(llm: LLM, prompts: Sequence[Prompt], reference: Sequence[Output]) -> Fidelity:
    """Run a round with the reference's tokens forced, and compare distributions."""
    params = [
        SamplingParams(
            max_tokens=len(output.token_ids), forced_tokens=output.token_ids, keep_logprobs=True
        )
        for output in reference
    ]
    result = llm.run_round(prompts, params)
    result.raise_for_errors()
    expected = torch.stack([torch.stack(output.logprobs) for output in reference])
    found = torch.stack([torch.stack(output.logprobs) for output in result.outputs])
    kl = (expected.exp() * (expected - found)).sum(dim=-1)  # (agents, tokens)
    same = expected.argmax(dim=-1) == found.argmax(dim=-1)
    corrected = [o.corrected_tokens for o in result.outputs if o.corrected_tokens]
    return Fidelity(
        kl_next=float(kl[:, 0].mean()),
        kl_continuation=float(kl.mean()),
        top1=float(same.float().mean()),
        corrected=sum(corrected) / max(1, len(corrected)),
    )
