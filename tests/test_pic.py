"""Per-request reuse (`pic`): the engine against a slow reference that is easy to follow."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from test_exactness import KEEP, logprobs, random_ids, random_round
from tiny_models import MODELS
from tokendance import LLM, Prompt, private, shared
from tokendance.attention.interface import LayerKind
from tokendance.errors import ConfigError
from tokendance.models import hook
from tokendance.models.fused import FusedLayer
from tokendance.models.loader import LoadedModel, load_model

MakeLLM = Callable[..., LLM]
LAYERS = 6


@pytest.fixture(scope="module")
def deep(model_folder: Callable[..., Path]) -> LoadedModel:
    return load_model(str(model_folder("llama", num_hidden_layers=LAYERS)), "float32")


@pytest.fixture(scope="module", params=[name for name in MODELS if name != "llama"])
def other(model_folder: Callable[..., Path], request: pytest.FixtureRequest) -> LoadedModel:
    return load_model(str(model_folder(request.param, num_hidden_layers=LAYERS)), "float32")


@dataclass
class DenseHook(hook.LayerHook):
    """Plain causal attention over one whole prompt, with some keys and values replaced.

    Attributes:
        layers: of the model.
        sources: position -> (owner's keys and values by layer, owner's position).
        kv: (key, value), each (KVH, T, D), by layer, as attended to.
        chosen: positions recomputed, once layer 1 is done.
        recomputed_share: of the replaced positions.
    """

    layers: tuple[LayerKind, ...]
    sources: dict[int, tuple[list[tuple[Tensor, Tensor]], int]] = field(default_factory=dict)
    kv: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    chosen: set[int] = field(default_factory=set)
    recomputed_share: float = 0.15

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        extra: dict[str, Any],
    ) -> Tensor:
        del extra
        rope, window = self.layers[layer].rope, self.layers[layer].window
        query = query.transpose(0, 1)
        key, value = key.transpose(0, 1).clone(), value.transpose(0, 1).clone()
        moved: dict[int, Tensor] = {}
        for position, (owner, at) in self.sources.items():
            table = rope.tables(np.array([position - at]), torch.device("cpu"))
            moved[position] = rope.rotate(owner[layer][0][:, [at]], table)[:, 0]
        if layer == 1:
            deviation = {p: float(((key[:, p] - copy) ** 2).sum()) for p, copy in moved.items()}
            ranked = sorted(deviation, key=lambda position: -deviation[position])
            self.chosen = set(ranked[: math.ceil(self.recomputed_share * len(ranked))])
        for position, (owner, at) in self.sources.items():
            if layer >= 1 and position not in self.chosen:
                key[:, position] = moved[position]
                value[:, position] = owner[layer][1][:, at]
        self.kv.append((key, value))
        group = len(query) // len(key)
        scores = query @ key.repeat_interleave(group, 0).transpose(-1, -2) * scale
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        if window is not None:
            hidden |= torch.ones(scores.shape[-2:], dtype=torch.bool).tril(-window)
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        return (weights @ value.repeat_interleave(group, 0)).transpose(0, 1)


def dense_pass(model: LoadedModel, tokens: list[int], dense: DenseHook) -> Tensor:
    """Log-probabilities of the token after `tokens`."""
    length = len(tokens)
    with torch.inference_mode():
        logits = hook.forward(
            model.module,
            torch.tensor(tokens),
            torch.arange(length),
            torch.tensor([length - 1]),
            dense,
        )
    return logits[0].log_softmax(-1)


def reference(model: LoadedModel, llm: LLM, prompts: list[Prompt]) -> list[Tensor]:
    """The first token's log-probabilities of each prompt, by one dense pass per prompt.

    The first prompt that has a segment owns it.
    """
    owners: dict[bytes, tuple[list[tuple[Tensor, Tensor]], int]] = {}
    found = []
    for prompt in prompts:
        encoded = llm.encoder.encode(prompt)
        dense = DenseHook(model.layers)
        for start, segment in encoded.shared_segments():
            if segment.hash in owners:
                kv, at = owners[segment.hash]
                dense.sources |= {start + i: (kv, at + i) for i in range(len(segment))}
        found.append(dense_pass(model, encoded.token_ids.tolist(), dense))
        for start, segment in encoded.shared_segments():
            owners.setdefault(segment.hash, (dense.kv, start))
    return found


def some_blocks_only(seed: int) -> list[Prompt]:
    """Agents that each have some of the blocks, in orders of their own, with text between them."""
    rng = np.random.default_rng(seed)
    blocks = [shared(random_ids(rng, int(rng.integers(8, 30)))) for _ in range(5)]
    prompts = []
    for index in range(4):
        parts = [private(random_ids(rng, int(rng.integers(3, 40))))]
        for block in rng.permutation(5)[: int(rng.integers(2, 6))]:
            parts.append(blocks[block])
            if rng.random() < 0.4:
                parts.append(private(random_ids(rng, 3)))
        prompts.append(Prompt([*parts, private(random_ids(rng, 5))], agent=f"agent {index}"))
    return prompts


@pytest.mark.parametrize("reuse", ["pic", "pic-batched"])
@pytest.mark.parametrize("budget", [4096, 64])
@pytest.mark.parametrize("make_round", [random_round, some_blocks_only])
@pytest.mark.parametrize("seed", [0, 1])
def test_pic_equals_the_slow_reference(
    reuse: str,
    budget: int,
    make_round: Callable[[int], list[Prompt]],
    seed: int,
    deep: LoadedModel,
    make_llm: MakeLLM,
) -> None:
    prompts = make_round(seed)
    llm = make_llm(model=deep, reuse=reuse, max_num_batched_tokens=budget)
    expected = torch.stack(reference(deep, llm, prompts))
    result = llm.run_round(prompts, KEEP)
    found = logprobs(result)[:, 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    # Reuse that changes nothing would pass for the wrong reason.
    exact = logprobs(make_llm(model=deep, reuse="none").run_round(prompts, KEEP))[:, 0]
    assert float((found[1:] - exact[1:]).abs().max()) > 1e-2


def test_pic_equals_the_reference_on_other_architectures(
    other: LoadedModel, make_llm: MakeLLM
) -> None:
    prompts = some_blocks_only(3)
    llm = make_llm(model=other, reuse="pic-batched")
    expected = torch.stack(reference(other, llm, prompts))
    found = logprobs(llm.run_round(prompts, KEEP))[:, 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_pic_enters_layers_that_are_one_call(
    model_folder: Callable[..., Path], make_llm: MakeLLM
) -> None:
    """Which would compute a blend as if nothing was copied."""
    pytest.importorskip("tokendance.attention._native")
    folder = model_folder("llama", num_hidden_layers=4)
    model = load_model(str(folder), "float32", weights="int8")
    layers = [layer for layer in model.module.modules() if isinstance(layer, FusedLayer)]
    assert layers
    assert all(layer._whole is not None for layer in layers)
    prompts = some_blocks_only(3)
    found = logprobs(make_llm(model=model, reuse="pic-batched").run_round(prompts, KEEP))
    for layer in layers:
        layer._whole = None
    expected = logprobs(make_llm(model=model, reuse="pic-batched").run_round(prompts, KEEP))
    assert torch.equal(found, expected)


def test_equal_beginnings_wait_for_whoever_computes_them(
    deep: LoadedModel, make_llm: MakeLLM
) -> None:
    """A copy may follow on a beginning that another request of the same step has yet to compute."""
    rng = np.random.default_rng(4)
    block, begin = shared(random_ids(rng, 40)), private(random_ids(rng, 48))
    first = Prompt([private(random_ids(rng, 5)), block, private(random_ids(rng, 200))], agent="0")
    long = Prompt([begin, block, private(random_ids(rng, 150))], agent="long")
    short = Prompt([begin, block, private(random_ids(rng, 4))], agent="short")
    apart = make_llm(model=deep, reuse="pic-batched")
    apart.run_round([first, long], KEEP)
    expected = logprobs(apart.run_round([short], KEEP))[0]
    for budget in (64, 256, 4096):
        llm = make_llm(model=deep, reuse="pic-batched", max_num_batched_tokens=budget)
        together = llm.run_round([first, long, short], KEEP)
        assert together.outputs[2].reused_tokens > 80
        torch.testing.assert_close(logprobs(together)[2], expected, rtol=0, atol=1e-4)


def test_pic_wants_a_third_layer(model_folder: Callable[..., Path], make_llm: MakeLLM) -> None:
    shallow = load_model(str(model_folder("llama", num_hidden_layers=2)), "float32")
    with pytest.raises(ConfigError, match="2 layers"):
        make_llm(model=shallow, reuse="pic")


def test_pic_counts_what_it_recomputes(deep: LoadedModel, make_llm: MakeLLM) -> None:
    prompts = random_round(5)
    owner, *mirrors = make_llm(model=deep, reuse="pic").run_round(prompts, KEEP).outputs
    num_shared = sum(len(part.content) for part in prompts[0].content if part.shared)  # type: ignore[union-attr, misc]
    assert owner.corrected_tokens == 0
    assert owner.computed_tokens == owner.prompt_tokens
    for mirror in mirrors:
        assert mirror.corrected_tokens == math.ceil(0.15 * num_shared)
        assert mirror.reused_tokens == num_shared - mirror.corrected_tokens


def test_pic_decodes_from_its_own_copy(deep: LoadedModel, make_llm: MakeLLM) -> None:
    """Every answer token reads what the prompt's pass left: replayed by one dense pass each."""
    prompts = random_round(6, agents=2)
    llm = make_llm(model=deep, reuse="pic-batched")
    result = llm.run_round(prompts, KEEP)
    answer = list(result.outputs[1].token_ids)
    again = make_llm(model=deep, reuse="pic-batched")
    longer = [prompts[0], Prompt([*prompts[1].content, private(answer[:-1])], agent="b")]
    last = logprobs(again.run_round(longer, KEEP))[1, 0]
    # The chosen tokens are the same, since they depend on what stands before them only.
    torch.testing.assert_close(last, logprobs(result)[1, -1], rtol=0, atol=1e-4)


def test_a_second_round_continues_from_the_copy(deep: LoadedModel, make_llm: MakeLLM) -> None:
    prompts = random_round(7, agents=3)
    llm = make_llm(model=deep, reuse="pic")
    llm.run_round(prompts, KEEP)
    again = llm.run_round(prompts, KEEP)
    assert all(output.computed_tokens <= llm.engine.options.page_size for output in again.outputs)
