"""How near the answers of reused KV are to those of full computation.

Both engines read the same prompts in the same dtype. The one that computes everything answers
greedily; the other is made to say the same tokens, and the distributions of each are compared.

All figures are means over the mirrors, that is over agents that reused shared tokens. Whoever owns
a run has computed it exactly, so counting owners too would flatter: by half in a round of two.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokendance.bench.workload import RoundWorkload
from tokendance.disk.kv_file import compress_rows, decompress_rows
from tokendance.engine.sampling import SamplingParams, compare_logprobs
from tokendance.llm import LLM
from tokendance.outputs import Output
from tokendance.rounds.prompts import Prompt
from tokendance.rounds.segments import Segment
from tokendance.store.pages import Holder

RECALL_TOKENS = 6  # the word that is asked for comes first


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """What full computation answers.

    Attributes:
        token_ids: the answer, with the token that ends it if it came to an end.
        logprobs: float32 (tokens, vocabulary).
    """

    token_ids: tuple[int, ...]
    logprobs: Tensor


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Against full computation, over the mirrors of a round.

    Where nobody reuses shared tokens, it is over all agents.

    Attributes:
        kl_next: mean KL divergence (nats) of the next token's distribution.
        kl_continuation: mean over the tokens of the forced answers.
        top1: share of these tokens at which both put the same token first.
        identical: share of agents for which that holds at every token, so that the free greedy
            answer is the same from its first token to its last.
        corrected: corrected tokens per mirror.
        corrected_share: the same as a share of the shared tokens that it reads.
        agents: names of those that this is about.
    """

    kl_next: float
    kl_continuation: float
    top1: float
    identical: float
    corrected: float
    corrected_share: float
    agents: tuple[str, ...]


def reference_answers(exact: LLM, prompts: Sequence[Prompt], num_tokens: int) -> list[Reference]:
    """Greedy answers with their distributions, by an engine that computes everything.

    Args:
        exact: the engine.
        prompts: of the round.
        num_tokens: most tokens of an answer.

    Raises:
        TokenDanceError: if a prompt cannot be run.
    """
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, keep_logprobs=True)
    result = exact.run_round(prompts, params)
    result.raise_for_errors()
    answers = []
    for output in result.outputs:
        ends = (at + 1 for at, t in enumerate(output.token_ids) if t in exact.model.stop_ids)
        length = next(ends, len(output.token_ids))
        answers.append(Reference(output.token_ids[:length], torch.stack(output.logprobs[:length])))
    return answers


def measure_fidelity(
    llm: LLM, prompts: Sequence[Prompt], reference: Sequence[Reference]
) -> Fidelity:
    """Run a round with the reference's tokens forced, and compare distributions.

    The engine's store may hold the private parts, but no shared block, or the round would have no
    owner.

    Args:
        llm: the engine to measure.
        prompts: of the round.
        reference: for each prompt, from the same prompts.

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
    kl, same, corrected, share, names = [], [], [], [], []
    shared = [llm.encoder.encode(prompt).shared_segments() for prompt in prompts]
    mirrors = _mirrors(shared, result.outputs)
    for index in mirrors:
        output = result.outputs[index]
        one_kl, one_same = compare_logprobs(reference[index].logprobs, torch.stack(output.logprobs))
        kl.append(one_kl)
        same.append(one_same)
        corrected.append(output.corrected_tokens)
        num_shared = sum(len(segment) for _, segment in shared[index])
        share.append(output.corrected_tokens / max(1, num_shared))
        names.append(output.agent)
    return Fidelity(
        kl_next=float(torch.stack([values[0] for values in kl]).mean()),
        kl_continuation=float(torch.cat(kl).mean()),
        top1=float(torch.cat(same).mean()),
        identical=statistics.mean(float(values.min()) for values in same),
        corrected=statistics.mean(corrected),
        corrected_share=statistics.mean(share),
        agents=tuple(names),
    )


def pass_through_int8(llm: LLM) -> None:
    """Put all KV that an engine has stored through compression and back, as a cold store does."""
    engine = llm.engine
    pool = engine.store.pool
    pages = np.flatnonzero(pool.num_refs(pool.all_pages(), Holder.INDEX))
    size = pool.page_size
    slots = (pages[:, None] * size + np.arange(size)).reshape(-1)
    slots = slots[engine.store.slot_ready[slots]].astype(np.int32)
    memory = engine.runner.memory
    rows = memory.read(slots, engine.store.slot_position[slots])
    memory.write(slots, decompress_rows(rows.positions, compress_rows(rows)))


def measure_recall(llm: LLM, workload: RoundWorkload) -> dict[str, bool]:
    """Ask each agent what another one said.

    Right after `measure_fidelity` on the same engine the questions follow on the KV that the
    agents read there, and little is computed.

    Returns:
        For each agent that has a question, whether its greedy answer has the word asked for.

    Raises:
        TokenDanceError: if a prompt cannot be run.
    """
    prompts = workload.question_prompts(llm)
    if not prompts:
        return {}
    result = llm.run_round(prompts, SamplingParams(max_tokens=RECALL_TOKENS))
    result.raise_for_errors()
    return {
        output.agent: question.answered_by(output.text)
        for output, question in zip(result.outputs, workload.questions, strict=True)
    }


def recall_share(answered: dict[str, bool], agents: Sequence[str]) -> float | None:
    """Share of right answers among these agents; None if none of them was asked."""
    asked = [answered[name] for name in agents if name in answered]
    return statistics.mean(asked) if asked else None


def _mirrors(shared: Sequence[list[tuple[int, Segment]]], outputs: Sequence[Output]) -> list[int]:
    """Places of the agents that reused shared tokens, or corrected them; all if there are none."""
    found = []
    for index, (segments, output) in enumerate(zip(shared, outputs, strict=True)):
        beginning = segments[0][0] if segments else output.prompt_tokens
        if output.corrected_tokens or output.reused_tokens > beginning:
            found.append(index)
    return found or list(range(len(outputs)))
