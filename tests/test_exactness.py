"""What must be exact: packing, prefix reuse, `correction=all`, and requests marked exact."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tiny_models import MODELS, greedy
from tokendance import LLM, Prompt, RoundResult, SamplingParams, private, shared
from tokendance.attention.backends import native_is_there
from tokendance.attention.names import AttentionName
from tokendance.models.loader import load_model

MakeLLM = Callable[..., LLM]


def random_ids(rng: np.random.Generator, length: int) -> list[int]:
    return [int(token) for token in rng.integers(3, 250, length)]


def random_round(seed: int, agents: int = 5, blocks: int = 4, shortest: int = 3) -> list[Prompt]:
    """A round where all agents read the same blocks behind private parts of other lengths."""
    rng = np.random.default_rng(seed)
    heard = [shared(random_ids(rng, int(rng.integers(5, 30)))) for _ in range(blocks)]
    return [
        Prompt(
            [
                private(random_ids(rng, int(rng.integers(shortest, 60)))),
                *heard,
                private(random_ids(rng, int(rng.integers(2, 12)))),
            ],
            agent=f"agent {index}",
        )
        for index in range(agents)
    ]


def logprobs(result: RoundResult) -> torch.Tensor:
    result.raise_for_errors()
    return torch.stack([torch.stack(output.logprobs) for output in result.outputs])


KEEP = SamplingParams(max_tokens=8, ignore_eos=True, keep_logprobs=True)


@pytest.mark.parametrize("architecture", MODELS)
def test_packed_runs_equal_transformers_generate(
    architecture: str, model_folder: Callable[..., Path], make_llm: MakeLLM
) -> None:
    from transformers import AutoModelForCausalLM

    folder = model_folder(architecture)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rng = np.random.default_rng(1)
    prompts = [random_ids(rng, length) for length in (1, 17, 50, 90)]
    llm = make_llm(model=load_model(str(folder), "float32"), reuse="none")
    outputs = llm.generate(prompts, SamplingParams(max_tokens=20, ignore_eos=True))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert list(output.token_ids) == greedy(plain, prompt, 20)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["gemma3", "olmo3"])
def test_each_layer_has_its_own_rotation(
    architecture: str, dtype: str, model_folder: Callable[..., Path]
) -> None:
    model = load_model(str(model_folder(architecture)), dtype)
    buffers = dict(model.module.named_buffers())
    types: list[str] = model.module.config.layer_types  # type: ignore[union-attr, assignment]
    assert len(set(types)) == 2
    for layer, kind in zip(model.layers, types, strict=True):
        (own,) = [found for name, found in buffers.items() if name.endswith(f"{kind}_inv_freq")]
        assert torch.equal(layer.rope.inv_freq, own.float())
        assert (layer.window is None) == (kind == "full_attention")


@pytest.mark.parametrize("architecture", MODELS)
def test_correcting_all_is_exact(
    architecture: str, model_folder: Callable[..., Path], make_llm: MakeLLM
) -> None:
    model = load_model(str(model_folder(architecture)), "float32")
    prompts = random_round(3)
    exact = make_llm(model=model, reuse="none").run_round(prompts, KEEP)
    result = make_llm(model=model, correction="all").run_round(prompts, KEEP)
    torch.testing.assert_close(logprobs(result), logprobs(exact), rtol=0, atol=1e-4)
    assert [o.token_ids for o in result.outputs] == [o.token_ids for o in exact.outputs]


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_every_attention_gives_the_same_round(
    architecture: str, model_folder: Callable[..., Path]
) -> None:
    found = {}
    fastest: AttentionName = "native" if native_is_there() else "torch"
    names: list[AttentionName] = ["auto", fastest, "torch", "reference"]
    for attention in names:
        llm = LLM(
            str(model_folder(architecture)),
            dtype="float32",
            kv_budget="20MiB",
            attention=attention,
        )
        found[attention] = logprobs(llm.run_round(random_round(4), KEEP))
    for attention, values in found.items():
        torch.testing.assert_close(values, found["reference"], rtol=0, atol=1e-4, msg=attention)
    assert torch.equal(found["auto"], found[fastest])


@pytest.mark.parametrize("budget", [4096, 64, 7])
@pytest.mark.parametrize(
    ("reuse", "correction"),
    [("none", "first-k"), ("prefix", "first-k"), ("collective", "all")],
)
@pytest.mark.parametrize("seed", range(3))
def test_exact_modes_agree_in_chunks_and_over_rounds(
    seed: int, reuse: str, correction: str, budget: int, make_llm: MakeLLM
) -> None:
    reference = make_llm(reuse="none")
    llm = make_llm(reuse=reuse, correction=correction, max_num_batched_tokens=budget)
    prompts = random_round(seed)
    for _ in range(2):
        exact = reference.run_round(prompts, KEEP)
        result = llm.run_round(prompts, KEEP)
        torch.testing.assert_close(logprobs(result), logprobs(exact), rtol=0, atol=1e-4)
        assert [o.token_ids for o in result.outputs] == [o.token_ids for o in exact.outputs]
        prompts = [
            Prompt([*prompt.content, private(output.token_ids), private([9, 8, 7])])
            for prompt, output in zip(prompts, exact.outputs, strict=True)
        ]


def test_the_owner_is_exact_and_mirrors_are_near(make_llm: MakeLLM) -> None:
    prompts = random_round(5)
    exact = make_llm(reuse="none").run_round(prompts, KEEP)
    result = make_llm().run_round(prompts, KEEP)
    owners = [i for i, output in enumerate(result.outputs) if output.reused_tokens == 0]
    assert len(owners) == 1
    difference = (logprobs(result)[:, 0] - logprobs(exact)[:, 0]).abs().amax(dim=-1)
    assert difference[owners[0]] < 1e-4
    # Mirrors differ, or nothing was shared; a random model is no measure of how much.
    others = [i for i in range(len(prompts)) if i not in owners]
    assert (difference[others] > 1e-4).all()


@pytest.mark.parametrize("chunk", [4096, 40, 9])
def test_chunks_do_not_change_what_is_shared(chunk: int, make_llm: MakeLLM) -> None:
    prompts = random_round(6)
    whole = make_llm().run_round(prompts, KEEP)
    chunked = make_llm(max_num_batched_tokens=chunk).run_round(prompts, KEEP)
    assert chunked.stats.computed_tokens == whole.stats.computed_tokens
    torch.testing.assert_close(logprobs(chunked), logprobs(whole), rtol=0, atol=1e-4)


def test_exact_requests_do_not_depend_on_the_batch(make_llm: MakeLLM) -> None:
    prompts = random_round(7)
    marked = Prompt(prompts[2].content, agent="judge", reuse="exact")
    alone = make_llm().run_round([marked], KEEP).outputs[0]
    llm = make_llm()
    llm.run_round(prompts, KEEP)
    busy = llm.run_round([*prompts, marked], KEEP).outputs[-1]
    assert busy.computed_tokens == busy.prompt_tokens
    assert torch.equal(torch.stack(busy.logprobs), torch.stack(alone.logprobs))


def test_seeded_sampling_does_not_depend_on_the_batch(make_llm: MakeLLM) -> None:
    prompts = random_round(8)
    params = [
        SamplingParams(max_tokens=12, temperature=1.0, top_p=0.9, top_k=50, seed=index)
        for index in range(len(prompts))
    ]
    together = make_llm(reuse="none").generate(prompts, params)
    alone = [
        make_llm(reuse="none").generate([prompt], [one])[0]
        for prompt, one in zip(prompts, params, strict=True)
    ]
    assert [o.token_ids for o in together] == [o.token_ids for o in alone]
    assert len({o.token_ids for o in together}) > 1


@pytest.mark.parametrize("reuse", ["prefix", "collective"])
@pytest.mark.parametrize(
    ("budget", "prompts"),
    [
        (4096, [[5], [5, 6]]),
        (32, [list(range(3, 36)), [*range(3, 36), 7, 8, 9]]),  # the second chunk is one token
        (4096, [list(range(3, 40)), [*range(3, 40), 9], [*range(3, 40), 9, 8]]),
    ],
)
def test_a_single_row_that_others_read(
    reuse: str, budget: int, prompts: list[list[int]], make_llm: MakeLLM
) -> None:
    exact = make_llm(reuse="none").run_round(prompts, KEEP)
    result = make_llm(reuse=reuse, max_num_batched_tokens=budget).run_round(prompts, KEEP)
    torch.testing.assert_close(logprobs(result), logprobs(exact), rtol=0, atol=1e-4)
    assert result.stats.reused_tokens > 0


def test_generate_shares_beginnings_only(make_llm: MakeLLM) -> None:
    """Single requests are exact, whatever rounds have left in the store."""
    prompts = random_round(9)
    llm = make_llm()
    llm.run_round(prompts, KEEP)
    exact = make_llm(reuse="none").generate(prompts, KEEP)
    for output, expected in zip(llm.generate(prompts, KEEP), exact, strict=True):
        found, wanted = torch.stack(output.logprobs), torch.stack(expected.logprobs)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
