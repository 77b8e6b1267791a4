"""What is given of the wrong kind is refused where it is given, by name."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tokendance import LLM, Agent, Prompt, SamplingParams, private
from tokendance.errors import ConfigError, InputError, PromptError, RoundError, TokenDanceError
from tokendance.options import EngineOptions
from tokendance.rounds.prompts import Part

NAN = float("nan")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_tokens": 2.5}, "max_tokens is 2.5. Give a whole number."),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"max_tokens": None}, "max_tokens is None"),
        ({"temperature": "hot"}, "temperature is 'hot'. Give a number."),
        ({"temperature": NAN}, "temperature is nan"),
        ({"top_p": NAN}, "top_p is nan"),
        ({"top_k": "40"}, "top_k is '40'"),
        ({"seed": 1.5}, "seed is 1.5. Give a whole number or None."),
        ({"stop": "end"}, "stop is 'end'. Give a list of texts."),
        ({"stop": [b"end"]}, "stop is .*b'end'"),
        ({"stop": {"end": 1}}, "stop is"),
        ({"stop": [""]}, "not empty"),
        ({"stop_token_ids": ["x"]}, "stop_token_ids is .* Give a list of whole numbers."),
        ({"forced_tokens": [1.0]}, "forced_tokens is"),
        ({"forced_tokens": []}, "forced_tokens is"),
        ({"ignore_eos": "no"}, "ignore_eos is 'no'. Give True or False."),
        ({"top_logprobs": 10**6}, "top_logprobs is 1000000. It must be 0 to 1000."),
        ({"top_logprobs": True}, "top_logprobs is True"),
        ({"logit_bias": {5: 1.0}}, "logit_bias is .* Give a list of pairs of a whole number and"),
        ({"logit_bias": [(5, float("inf"))]}, "logit_bias is"),
        ({"logit_bias": [(10**30, 1.0)]}, "logit_bias is"),
        ({"logit_bias": [5, 1.0]}, "logit_bias is"),
    ],
)
def test_sampling_parameters(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SamplingParams(**settings)


def test_numbers_of_numpy_and_lists_will_do() -> None:
    found = SamplingParams(
        max_tokens=np.int64(3),  # type: ignore[arg-type]
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        stop=["a"],  # type: ignore[arg-type]
        forced_tokens=np.array([1, 2]),  # type: ignore[arg-type]
        logit_bias=[[1, 2]],  # type: ignore[arg-type]
    )
    assert found == SamplingParams(3, 0.5, stop=("a",), forced_tokens=(1, 2), logit_bias=((1, 2),))
    assert type(found.max_tokens) is int
    hash(found)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"page_size": 16.5}, "page_size is 16.5. Give a whole number."),
        ({"page_size": True}, "page_size is True"),
        ({"threads": "4"}, "threads is '4'. Give a whole number or None."),
        ({"kv_budget": {}}, "kv_budget is {}. Give a whole number or a text or None."),
        ({"kv_budget": "1" + "0" * 400}, "kv_budget is .* no size in bytes"),
        ({"store": 5}, "store is 5. Give a text or a path or None."),
        ({"store_int8": "yes"}, "store_int8 is 'yes'"),
        ({"correction": 5}, "correction is 5. Give a text or a CorrectionPolicy or None."),
        ({"reuse": 5}, "reuse is 5. Give one of none, prefix"),
        ({"shadow": "much"}, "shadow is 'much'"),
        ({"dtype": np.float32}, "dtype is"),
    ],
)
def test_options_of_an_engine(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EngineOptions(**settings)


@pytest.mark.parametrize("params", [{"max_tokens": 3}, "greedy", 5, [{"max_tokens": 3}], [None]])
def test_parameters_of_another_kind(params: Any, make_fake_llm: Callable[..., LLM]) -> None:
    llm = make_fake_llm()
    session = llm.session(agents=[Agent("ann", "You are Ann.")])
    for call in (
        lambda: llm.generate(["a"], params),
        lambda: llm.run_round(["a"], params),
    ):
        with pytest.raises(ConfigError, match=r"params has .* Give SamplingParams"):
            call()
    if not isinstance(params, list):
        with pytest.raises(ConfigError, match=r"params has .* Give SamplingParams"):
            session.run("Speak.", params)
        with pytest.raises(ConfigError, match=r"params has .* Give SamplingParams"):
            llm.session(agents=[Agent("ann", "")], params=params)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda _: Part(5, True), PromptError, "A part is a int"),  # type: ignore[arg-type]
        (lambda _: private([1.5]), PromptError, "A part is a list"),  # type: ignore[list-item]
        (lambda _: Prompt("x", agent=5), PromptError, "agent is a int"),  # type: ignore[arg-type]
        (lambda _: Prompt("x", tools="run"), PromptError, "tools"),  # type: ignore[arg-type]
        (lambda _: Agent("ann", None), ConfigError, "system is None"),  # type: ignore[arg-type]
        (lambda llm: llm.run_round(5), RoundError, "A round is a list"),
        (lambda llm: llm.session(5), InputError, "name is a int"),
        (lambda llm: llm.session(agents=["ann"]), ConfigError, "agents is"),
        (lambda llm: llm.session(max_history="all"), ConfigError, "max_history is 'all'"),
        (lambda llm: llm.session(ttl_s="long"), ConfigError, "ttl_s is 'long'"),
        (lambda llm: llm.session(agents=[Agent("a", "")]).run(5), RoundError, "A task is a int"),
    ],
)
def test_what_agents_are_and_read(
    make: Callable[[LLM], object],
    error: type[TokenDanceError],
    words: str,
    make_fake_llm: Callable[..., LLM],
) -> None:
    with pytest.raises(error, match=words):
        make(make_fake_llm())


def test_a_prompt_of_another_kind_harms_nobody(make_fake_llm: Callable[..., LLM]) -> None:
    odd: list[Any] = [5, None, [None], Prompt([Part((1, None), True)])]  # type: ignore[arg-type]
    result = make_fake_llm().run_round([*odd, "hello"], SamplingParams(max_tokens=2))
    assert [type(output.error) for output in result.outputs] == [PromptError] * 4 + [type(None)]
