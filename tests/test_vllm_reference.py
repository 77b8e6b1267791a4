"""What a mirror says inside vLLM, against a dense forward pass by transformers alone.

None of our code computes the reference. The owner's keys and values come from transformers' cache;
keys are turned by the offset with transformers' own rotation, and stand as past KV where the mirror
reads them. Its own tokens (private, corrected, task, answer) are computed in one pass at their true
positions, each seeing what stands before it, whoever computed that:

    prompt     [ private | c c c | reused ......... | c | task | answer ]
    past KV                       owner's, turned
    computed   [ private | c c c ]                  [ c | task | answer ]
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM
from transformers.models.llama.modeling_llama import rotate_half

from test_vllm import FINISH, NUM_AGENTS, PYTHON, Round, model, run_in_vllm
from test_vllm_workers import V2

__all__ = ["model"]  # a fixture

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(PYTHON is None, reason="vLLM is not installed (make vllm)"),
]
ROUND = Round(1)
OWNER = 0  # the first that arrives computes what all read
FIRST, LAST = 3, 1  # of the run, corrected (`CORRECTION`)
ANSWER_TOKENS = 8
WHOLE_VOCABULARY = -1
SCRIPTS = {"round": [ROUND.add(logprobs=WHOLE_VOCABULARY, max_tokens=ANSWER_TOKENS), FINISH]}
ENGINE = {"max_logprobs": WHOLE_VOCABULARY, "max_num_seqs": 8}
RUNNERS: list[dict[str, Any]] = [{}, V2]
# Sums in another order, in float32: 0.0002 measured; 17 without the shift.
TOLERANCE = 1e-3  # nats


def turned(network: LlamaForCausalLM, keys: Tensor, offset: int) -> Tensor:
    """Keys (1, heads, tokens, size), moved by so many positions."""
    cos, sin = network.model.rotary_emb(keys, torch.tensor([[offset]]))
    result: Tensor = keys * cos[:, None] + rotate_half(keys) * sin[:, None]
    return result


@torch.inference_mode()
def reference(network: LlamaForCausalLM, index: int, answer: list[int]) -> Tensor:
    """Log-probabilities (tokens, vocabulary) of a mirror's answer."""
    own, owners = ROUND.private[index], ROUND.private[OWNER]
    text = [*own, *ROUND.shared, *ROUND.tasks[index], *answer[:-1]]
    begin, end = len(own) + FIRST, len(own) + len(ROUND.shared) - LAST  # of what is reused
    offset = len(own) - len(owners)

    owner = network(torch.tensor([owners + ROUND.shared])).past_key_values
    past = DynamicCache()
    for layer, of_owner in enumerate(owner.layers):
        reused = slice(begin - offset, end - offset)
        keys = turned(network, of_owner.keys[:, :, reused], offset)
        past.update(keys, of_owner.values[:, :, reused], layer)

    computed = torch.tensor([*range(begin), *range(end, len(text))])
    stands_at = torch.cat([torch.arange(begin, end), computed])  # past KV, then new
    unseen = stands_at[None, :] > computed[:, None]
    mask = torch.zeros(unseen.shape).masked_fill(unseen, -torch.inf)[None, None]
    logits = network(
        torch.tensor([text])[:, computed],
        position_ids=computed[None],
        past_key_values=past,
        attention_mask=mask,
    ).logits
    return torch.log_softmax(logits[0, -len(answer) :].float(), dim=-1)


def farthest(network: LlamaForCausalLM, result: Mapping[str, Any]) -> float:
    """Largest difference of any log-probability that vLLM gave of a mirror's answer, in nats."""
    answers = result["round"]["answers"]
    differences: list[float] = []
    for index in range(NUM_AGENTS):
        if index == OWNER:
            continue
        answer = answers[str(index)]
        assert answer["num_cached"] == len(ROUND.shared) - FIRST - LAST
        expected = reference(network, index, answer["tokens"])
        assert len(answer["logprobs"]) == len(expected) == ANSWER_TOKENS
        for row, entries in zip(expected, answer["logprobs"], strict=True):
            assert len(entries) == len(row)
            differences += [abs(float(row[int(token)]) - said) for token, said in entries.items()]
    return max(differences)


@pytest.fixture(scope="module")
def network(model: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


@pytest.mark.parametrize("runner", RUNNERS, ids=["V1", "V2"])
def test_mirrors_say_what_a_dense_pass_over_turned_kv_says(
    runner: dict[str, Any], model: Path, network: LlamaForCausalLM
) -> None:
    result = run_in_vllm(model, SCRIPTS, engine=ENGINE, **runner)
    assert farthest(network, result) < TOLERANCE


@pytest.mark.parametrize("runner", RUNNERS, ids=["V1", "V2"])
def test_without_the_shift_they_do_not(
    runner: dict[str, Any], model: Path, network: LlamaForCausalLM
) -> None:
    """A control: the comparison can fail."""
    result = run_in_vllm(
        model, SCRIPTS, engine=ENGINE, TEST_WITHOUT_SHIFT="1", TEST_WITHOUT_CHECK="1", **runner
    )
    assert farthest(network, result) > 100 * TOLERANCE
