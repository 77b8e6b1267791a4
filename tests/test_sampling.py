"""How tokens are drawn: the distribution, and the same tokens as by the plain way."""

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from conftest import examples
from tokendance import LLM, SamplingParams
from tokendance.engine.penalties import SeenTokens
from tokendance.engine.stops import text_up_to_stop
from tokendance.executor.sampler import _penalize, sample
from tokendance.executor.step import Penalties, SamplingRow


def choose_tokens(
    logits: Tensor, params: Sequence[SamplingParams], generators: Sequence[random.Random]
) -> list[int]:
    """Draw from rows in which -inf marks what is forbidden."""
    rows = [
        SamplingRow(
            one.temperature,
            one.top_k,
            one.top_p,
            generator.random(),
            forbidden=row.isneginf().numpy(),
        )
        for row, one, generator in zip(logits, params, generators, strict=True)
    ]
    output = sample(logits.clamp(min=-100.0), rows)
    assert all(output.is_finite)
    return list(output.token_ids)


def plainly(logits: Tensor, params: SamplingParams, uniform: float) -> tuple[int, float]:
    """The token that a number falls on, and how near an edge it is, token by token in float64."""
    values = logits.double().numpy()
    weights = np.exp((values - values.max()) / params.temperature)
    ordered = np.sort(weights)[::-1]
    if 0 < params.top_k < len(weights):
        weights[weights < ordered[params.top_k - 1]] = 0.0
    if params.top_p < 1:
        ordered = np.sort(weights)[::-1]
        reached = np.cumsum(ordered) >= params.top_p * weights.sum()
        weights[weights < ordered[int(np.argmax(reached))]] = 0.0
    ends = np.cumsum(weights) / weights.sum()
    token = int(np.searchsorted(ends, uniform, side="right"))
    return token, float(np.abs(ends[weights > 0] - uniform).min())


@pytest.mark.parametrize("vocabulary", [3, 256, 700, 5000])
@pytest.mark.parametrize("filters", [{}, {"top_k": 7}, {"top_p": 0.8}, {"top_k": 50, "top_p": 0.5}])
def test_as_the_plain_way(vocabulary: int, filters: dict[str, float]) -> None:
    torch.manual_seed(vocabulary)
    # Of bfloat16, as models give them: many are equal.
    logits = (4 * torch.randn(40, vocabulary)).bfloat16().float()
    logits[:, ::3] = -torch.inf  # what a grammar forbids
    logits[:, 1] = 0.0
    params = [
        SamplingParams(temperature=0.1 + 0.05 * row, **filters)  # type: ignore[arg-type]
        for row in range(len(logits))
    ]
    found = choose_tokens(logits, params, [random.Random(row) for row in range(len(logits))])
    near_edges = 0
    for row, token in enumerate(found):
        assert logits[row, token] > -torch.inf
        expected, distance = plainly(logits[row], params[row], random.Random(row).random())
        near_edges += distance < 1e-5
        assert token == expected or distance < 1e-5
    assert near_edges < 5


def test_a_flat_distribution_needs_more_than_few_tokens() -> None:
    logits = torch.zeros(1, 5000)
    logits[0, :4000] = torch.linspace(0, 1e-3, 4000)
    params = SamplingParams(temperature=1.0, top_p=0.5)
    generator = random.Random(0)
    drawn = [choose_tokens(logits, [params], [generator])[0] for _ in range(300)]
    assert min(drawn) >= 1400
    assert max(drawn) < 4000
    assert len(set(drawn)) > 200


def test_neighbours_and_greedy_rows_change_nothing() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 1000)
    params = [SamplingParams(temperature=value) for value in (0.0, 1.0, 0.0, 0.5, 2.0, 0.7)]
    together = choose_tokens(logits, params, [random.Random(row) for row in range(6)])
    for row in range(6):
        alone = choose_tokens(logits[row : row + 1], [params[row]], [random.Random(row)])
        assert alone == [together[row]]
    assert together[0] == int(logits[0].argmax())


@settings(max_examples=examples(200))
@given(
    uniform=st.one_of(st.just(0.0), st.just(1 - 2**-53), st.floats(0, 1, exclude_max=True)),
    likely=st.integers(0, 599),
    temperature=st.sampled_from([1e-6, 0.3, 1.0]),
)
def test_what_cannot_be_is_never_chosen(uniform: float, likely: int, temperature: float) -> None:
    """Whatever the number, and wherever the only tokens that may be."""
    logits = torch.full((1, 600), -torch.inf)
    logits[0, likely] = 3.0
    logits[0, (likely + 300) % 600] = 2.9

    class Fixed(random.Random):
        def random(self) -> float:
            return uniform

    (token,) = choose_tokens(logits, [SamplingParams(temperature=temperature)], [Fixed()])
    assert token in (likely, (likely + 300) % 600)


def test_sampling_follows_the_distribution() -> None:
    torch.manual_seed(1)
    logits = torch.randn(1, 8)
    generator = random.Random(0)
    params = SamplingParams(temperature=0.7)
    draws = [choose_tokens(logits, [params], [generator])[0] for _ in range(4000)]
    expected = (logits[0] / 0.7).softmax(0).numpy()
    assert np.bincount(draws, minlength=8) / 4000 == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 3}, {"top_p": 0.9, "top_k": 3}])
def test_next_to_no_temperature_is_none(filters: dict[str, float]) -> None:
    torch.manual_seed(2)
    logits = torch.randn(1, 600) * 20
    for temperature in (1e-3, 1e-6, 1e-40, 5e-324):
        params = SamplingParams(temperature=temperature, **filters)  # type: ignore[arg-type]
        assert choose_tokens(logits, [params], [random.Random(0)]) == [int(logits[0].argmax())]


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 3}])
def test_a_row_that_allows_nothing_harms_no_other(filters: dict[str, float]) -> None:
    """What its constraint says of the token that is chosen all the same ends that request alone."""
    logits = torch.randn(2, 600)
    logits[0] = -torch.inf
    params = SamplingParams(temperature=0.8, **filters)  # type: ignore[arg-type]
    together = choose_tokens(logits, [params] * 2, [random.Random(0), random.Random(1)])
    assert together[1:] == choose_tokens(logits[1:], [params], [random.Random(1)])


def decode_bytes(token_ids: Sequence[int]) -> str:
    return bytes(token_ids).decode("utf-8", "replace")


def decode_with_fallback(token_ids: Sequence[int]) -> str:
    """As tokenizers of Llama 2 do: of a run of bytes all is read, or nothing."""
    pieces = []
    for is_letter, run in itertools.groupby(token_ids, lambda token: token in b"ab "):
        read = bytes(run)
        try:
            pieces.append(read.decode())
        except UnicodeDecodeError:
            assert not is_letter
            pieces.append("\ufffd" * len(read))
    return "".join(pieces)


@settings(max_examples=examples(200))
@given(
    text=st.text("ab é🧀\n", min_size=1, max_size=60),
    # Half a character is never there, and may be asked for.
    stops=st.lists(st.text("ab é🧀\n\ud835", min_size=1, max_size=5), min_size=1, max_size=3),
    decode=st.sampled_from([decode_bytes, decode_with_fallback]),
)
@example("🧀" * 9 + "\n", ["\n"], decode_with_fallback)
def test_a_stop_text_is_found_when_its_last_byte_is_there(
    text: str, stops: list[str], decode: Callable[[Sequence[int]], str]
) -> None:
    """Only the end of an answer is read at each token; the whole answer says the same."""
    tokens = list(text.encode())
    for length in range(1, len(tokens) + 1):
        whole = decode(tokens[:length])
        places = [place for place in map(whole.find, stops) if place >= 0]
        expected = whole[: min(places)] if places else None
        assert text_up_to_stop(tokens[:length], stops, decode) == expected
        if expected is not None:
            break


def penalize(logits: Tensor, penalties: Sequence[Penalties | None]) -> Tensor:
    """Log-probabilities of all rows after penalties: float32 (R, vocabulary)."""
    rows = [SamplingRow(penalties=one, distribution=True) for one in penalties]
    found = sample(logits.clone(), rows).distributions
    return torch.stack([torch.from_numpy(one) for one in found if one is not None])


@settings(max_examples=examples(50))
@given(seed=st.integers(0, 1000), with_rows=st.lists(st.booleans(), min_size=1, max_size=5))
def test_penalties_as_one_row_and_token_at_a_time(seed: int, with_rows: list[bool]) -> None:
    chooser = random.Random(seed)
    torch.manual_seed(seed)
    logits = torch.randn(len(with_rows), 30) * 4
    expected, given_penalties = logits.clone(), []
    for row, has_any in enumerate(with_rows):
        params = SamplingParams(
            repetition_penalty=chooser.choice([1.0, 1.3, 0.7]),
            presence_penalty=chooser.choice([0.0, 0.5, -1.0]),
            frequency_penalty=chooser.choice([0.0, 0.25, 2.0]),
        )
        prompt = np.array([chooser.randrange(30) for _ in range(6)], np.int32)
        answer = [chooser.randrange(30) for _ in range(chooser.randrange(9))]
        seen = SeenTokens.of(params, prompt) if has_any else None
        if seen is not None:
            for end in range(len(answer)):  # it counts as the answer grows
                seen.penalties(answer[:end])
        given_penalties.append(None if seen is None else seen.penalties(answer))
        for token in range(30) if seen is not None else ():
            value, count = float(logits[row, token]), answer.count(token)
            if token in prompt or count:
                repetition = params.repetition_penalty
                value = value / repetition if value > 0 else value * repetition
            value -= count * params.frequency_penalty + (count > 0) * params.presence_penalty
            expected[row, token] = value
    torch.testing.assert_close(penalize(logits, given_penalties), expected.log_softmax(-1))


def test_an_answer_that_begins_anew_is_counted_anew() -> None:
    seen = SeenTokens.of(SamplingParams(presence_penalty=1.0), np.array([1, 2], np.int32))
    assert seen is not None
    assert seen.penalties([5, 5, 6]).tokens.tolist() == [5, 6]
    again = seen.penalties([7])
    assert (again.tokens.tolist(), again.counts.tolist()) == ([7], [1.0])
    assert SeenTokens.of(SamplingParams(), np.array([1], np.int32)) is None


def test_what_was_counted_is_not_counted_or_listed_again() -> None:
    """However long the prompt and the answer are; and no step changes when the answer grows."""
    prompt, answer = np.arange(500, dtype=np.int32), [number % 700 for number in range(3000)]
    seen = SeenTokens.of(SamplingParams(repetition_penalty=1.1), prompt)
    assert seen is not None
    steps = [(end, seen.penalties(answer[:end])) for end in range(0, len(answer), 50)]
    pairs = itertools.pairwise(step.tokens for _, step in steps)
    num_listed_anew = sum(not np.shares_memory(one, other) for one, other in pairs)
    assert num_listed_anew == 1  # where room was made for twice as many
    for end, step in steps:
        counts = Counter(answer[:end])
        expected = {token: counts[token] for token in {*prompt.tolist(), *answer[:end]}}
        assert dict(zip(step.tokens.tolist(), step.counts.tolist(), strict=True)) == expected


def test_only_rows_with_penalties_are_touched() -> None:
    logits = torch.randint(-40, 40, (32, 1000)) / 8  # no sum of these is rounded
    penalties = Penalties(np.array([5, 7]), np.array([0.0, 2.0], np.float32), 2.0, 0.5, 0.25)
    rows = [SamplingRow(penalties=penalties if row == 3 else None) for row in range(32)]
    expected = logits.clone()
    for token, taken in ((5, 0.0), (7, 1.0)):
        value = expected[3, token]
        expected[3, token] = (value / 2 if value > 0 else value * 2) - taken
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        _penalize(logits, rows)
    assert torch.equal(logits, expected)
    sizes = [math.prod(shape) for event in profiled.events() or () for shape in event.input_shapes]
    assert set(sizes) <= {0, 1, 2, logits.numel()}  # two tokens; the logits are looked up alone
    taking = {event.name for event in profiled.events() or () if [32, 1000] in event.input_shapes}
    assert taking <= {"aten::take", "aten::put_"}


def test_only_what_is_likely_enough() -> None:
    logits = torch.tensor([[0.0, -1.0, -2.0, -3.0]]).repeat(2, 1)
    drawn = set()
    for number in range(200):
        rows = [
            SamplingRow(temperature=1.0, uniform=number / 200, min_p=least) for least in (0.2, 0.0)
        ]
        drawn.add(tuple(sample(logits.clone(), rows).token_ids))
    assert {pair[0] for pair in drawn} == {0, 1}  # 1, 0.37, 0.14, 0.05 of the likeliest
    assert {pair[1] for pair in drawn} == {0, 1, 2, 3}


def test_an_answer_has_so_many_tokens_at_least(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm()
    ends = dict.fromkeys(llm.model.stop_ids, 100.0)
    biased = tuple(ends.items())
    for least in (0, 1, 5):
        params = SamplingParams(max_tokens=9, min_tokens=least, logit_bias=biased)
        (output,) = llm.generate(["abc"], params)
        assert (len(output.token_ids), output.finish_reason) == (least, "stop")


def test_penalties_reach_the_model(make_llm: Callable[..., LLM]) -> None:
    """A token that is made likely comes again and again, unless it is penalized for it."""
    llm = make_llm()
    biased = ((70, 200.0), (71, 100.0))
    params = SamplingParams(max_tokens=6, logit_bias=biased, ignore_eos=True)
    assert set(llm.generate(["abc"], params)[0].token_ids) == {70}
    fair = SamplingParams(max_tokens=6, logit_bias=biased, ignore_eos=True, frequency_penalty=60.0)
    both = llm.generate(["abc", "abc"], [params, fair])
    assert set(both[0].token_ids) == {70}
    assert set(both[1].token_ids) == {70, 71}
