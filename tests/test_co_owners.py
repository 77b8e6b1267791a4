"""Co-owners: a run that several agents compute together, against one pass of transformers."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from test_exactness import KEEP, logprobs, random_ids, random_round
from tokendance import LLM, Agent, Part, Prompt, RoundResult, SamplingParams, private, shared
from tokendance.collector.co_owners import LentText, LentTexts, with_co_owners
from tokendance.collector.owners import Start
from tokendance.engine.request import Request
from tokendance.errors import ConfigError
from tokendance.models.loader import load_model
from tokendance.options import EngineOptions
from tokendance.rounds.segments import EncodedPrompt, as_token_ids, build_prompt, make_salt

MakeLLM = Callable[..., LLM]


def a_round(seed: int, agents: int = 5) -> list[Prompt]:
    """As `random_round`, with texts that are long enough for pages to end within them."""
    return random_round(seed, agents, blocks=3, shortest=10)


def ids_of(part: object) -> list[int]:
    assert isinstance(part, Part)
    assert not isinstance(part.content, str)
    return list(part.content)


def know_texts(llm: LLM, prompts: Sequence[Prompt]) -> None:
    """Let an engine know what stands before the shared blocks of each prompt."""
    llm.generate([ids_of(prompt.content[0]) for prompt in prompts], SamplingParams(max_tokens=1))


def told(
    folder: Path,
    prompts: Sequence[Prompt],
    result: RoundResult,
    owners: int,
    is_corrected: Callable[[int, int], bool],
) -> Tensor:
    """What transformers says of a round whose run has co-owners, in one pass over all its tokens.

    All texts end at the position where the run begins, and what each token sees is a row of a mask.
    """
    from transformers import AutoModelForCausalLM

    texts = [ids_of(prompt.content[0]) for prompt in prompts]
    blocks = [ids_of(part) for part in prompts[0].content[1:-1]]
    begin = max(map(len, texts))
    first = next(index for index, text in enumerate(texts) if len(text) == begin)
    members = [first, *(index for index in range(len(texts)) if index != first)][:owners]

    tokens: list[int] = []
    positions: list[int] = []
    sees: list[set[int]] = []

    def add(token: int, position: int, before: set[int]) -> int:
        here = len(tokens)
        tokens.append(token)
        positions.append(position)
        sees.append(before | {here})
        return here

    of_texts: list[set[int]] = []
    for text in texts:
        seen: set[int] = set()
        for at, token in enumerate(text):
            seen.add(add(token, begin - len(text) + at, seen))
        of_texts.append(seen)
    run: list[tuple[int, int, bool]] = []  # place, token, whether it is corrected
    num_common = 0
    position = begin
    for block in blocks:
        for at, token in enumerate(block):
            is_apart = is_corrected(at, len(block))
            owner = first if is_apart else members[num_common % len(members)]
            num_common += not is_apart
            before = of_texts[owner] | {place for place, _, _ in run}
            run.append((add(token, position, before), token, is_apart))
            position += 1
    ends: list[list[int]] = []
    for index, (prompt, output) in enumerate(zip(prompts, result.outputs, strict=True)):
        seen = set(of_texts[index])
        for at, (place, token, is_apart) in enumerate(run):
            is_afresh = is_apart and index != first
            seen.add(add(token, begin + at, seen) if is_afresh else place)
        own = [*ids_of(prompt.content[-1]), *output.token_ids]
        places = []
        for at, token in enumerate(own):
            places.append(add(token, begin + len(run) + at, seen))
            seen.add(places[-1])
        ends.append(places[-len(output.token_ids) - 1 : -1])
    mask = torch.full((len(tokens), len(tokens)), torch.finfo(torch.float32).min)
    for here, seen in enumerate(sees):
        mask[here, list(seen)] = 0
    plain = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    masks: Tensor | dict[str, Tensor] = mask[None, None]
    if window := getattr(plain.config, "sliding_window", None):
        distance = torch.tensor(positions)[:, None] - torch.tensor(positions)
        near = mask.masked_fill(distance >= window, torch.finfo(torch.float32).min)
        masks = {"full_attention": mask[None, None], "sliding_attention": near[None, None]}
    with torch.inference_mode():
        logits = plain(
            torch.tensor([tokens]),
            attention_mask=masks,
            position_ids=torch.tensor([positions]),
        ).logits[0]
    return torch.stack([logits[places].log_softmax(dim=-1) for places in ends])


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize(
    ("owners", "correction", "chunk", "are_known", "attention"),
    [
        (1, "edges:2+1", 4096, True, "auto"),
        (2, "none", 4096, True, "auto"),
        (3, "edges:2+1", 4096, True, "auto"),
        (3, "edges:2+1", 4096, False, "torch"),
        (3, "edges:2+1", 4096, False, "reference"),
        (7, "edges:2+1", 4096, False, "auto"),
        (3, "edges:2+1", 23, False, "auto"),
        (3, "edges:2+1", 2, False, "auto"),
    ],
)
def test_a_run_of_co_owners_is_what_transformers_computes(
    architecture: str,
    owners: int,
    correction: str,
    chunk: int,
    are_known: bool,
    attention: str,
    model_folder: Callable[..., Path],
    make_llm: MakeLLM,
) -> None:
    folder = model_folder(architecture)
    llm = make_llm(
        model=load_model(str(folder), "float32"),
        owners=owners,
        correction=correction,
        max_num_batched_tokens=chunk,
        attention=attention,
    )
    prompts = a_round(owners)
    if are_known:
        know_texts(llm, prompts)
    result = llm.run_round(prompts, KEEP)

    def is_corrected(at: int, length: int) -> bool:
        return correction != "none" and (at < 2 or at >= length - 1)

    if owners == 1:  # whoever comes first owns alone
        longest = max(range(len(prompts)), key=lambda index: len(ids_of(prompts[index].content[0])))
        prompts = [prompts[longest], *prompts[:longest], *prompts[longest + 1 :]]
        llm.engine.forget()
        result = llm.run_round(prompts, KEEP)
    expected = told(folder, prompts, result, owners, is_corrected)
    torch.testing.assert_close(logprobs(result), expected, rtol=0, atol=3e-4)
    num_inexact = [output.approximate_tokens > 0 for output in result.outputs]
    assert num_inexact.count(False) == (owners == 1)
    llm.engine.check_integrity()


# -- who owns with whom ---------------------------------------------------------------------------


def encoded(*parts: tuple[int, int] | tuple[int, int, str]) -> EncodedPrompt:
    """A prompt of parts (length, token), shared where they say so."""
    return build_prompt(
        [(as_token_ids([token] * length), bool(rest)) for length, token, *rest in parts],
        make_salt(),
    )


NEWS = ((9, 1, "shared"), (9, 2, "shared"))


def lent_by(starts: Sequence[Start]) -> list[tuple[int, list[int]]]:
    """Each start's index, and the lengths of the texts that it is lent."""
    return [
        (start.index, [len(text) for text in start.lenders.texts] if start.lenders else [])
        for start in starts
    ]


def chosen(prompts: Sequence[EncodedPrompt], most: int, known: Sequence[int] = ()) -> list[Start]:
    hashes = {encoded((9, token, "shared")).segments[0].hash for token in known}
    starts = [Start(index) for index in range(len(prompts))]
    return with_co_owners(starts, prompts, hashes, most)


def test_the_longest_text_owns_and_others_lend() -> None:
    prompts = [encoded((length, 50 + length), *NEWS, (3, 9)) for length in (4, 8, 6, 5)]
    assert lent_by(chosen(prompts, 3)) == [(1, [4, 6]), (0, []), (2, []), (3, [])]
    assert lent_by(chosen(prompts, 9)) == [(1, [4, 6, 5]), (0, []), (2, []), (3, [])]
    assert lent_by(chosen(prompts, 1)) == [(0, []), (1, []), (2, []), (3, [])]


def test_who_reads_otherwise_lends_nothing() -> None:
    prompts = [
        encoded((4, 50), *NEWS),
        encoded((5, 51), *reversed(NEWS)),
        encoded((6, 52), NEWS[0], (2, 9), NEWS[1]),  # a word in between
        encoded(*NEWS, (7, 53)),  # no text before
        encoded((8, 54), NEWS[0]),
    ]
    assert [start.lenders for start in chosen(prompts, 5)] == [None] * 5
    # What is known stands before a run like any other text.
    prompts = [encoded((n, 60), *NEWS) for n in (4, 6)]
    assert lent_by(chosen(prompts, 5, known=[1])) == [(1, [13]), (0, [])]
    # Who reads a part of what another owns owns nothing.
    prompts = [encoded((5, 50), *NEWS, (9, 3, "shared"))]
    prompts += [encoded((n, 60), *NEWS) for n in (4, 6)]
    assert lent_by(chosen(prompts, 5)) == [(0, []), (1, []), (2, [])]


def test_no_text_is_lent_twice() -> None:
    prompts = [encoded((length, 50 + length), *NEWS) for length in (4, 4, 8, 6, 8, 6)]
    assert lent_by(chosen(prompts, 9)) == [(2, [4, 6]), *((n, []) for n in (1, 0, 3, 4, 5))]
    assert lent_by(chosen(prompts[:2], 9)) == [(0, []), (1, [])]


@given(st.integers(0, 9), st.sets(st.integers(0, 40)), st.sets(st.integers(0, 60)))
def test_each_token_has_one_owner(num_lent: int, common: set[int], positions: set[int]) -> None:
    texts = tuple(LentText((), 1) for _ in range(num_lent))
    lent = LentTexts(texts, 0, np.array(sorted(common), np.int64))
    asked = np.array(sorted(positions), np.int64)
    parts = lent.divide(asked)
    assert len(parts) == num_lent + 1
    assert sorted(np.concatenate(parts).tolist()) == sorted(positions)
    by_turn = {token: turn % len(parts) for turn, token in enumerate(sorted(common))}
    for owner, part in enumerate(parts):
        assert [by_turn.get(token, 0) for token in part.tolist()] == [owner] * len(part)
        assert (np.diff(part) > 0).all()


# -- rounds ---------------------------------------------------------------------------------------


def num_owners(request: Request) -> int:
    assert request.plan is not None
    return 1 + (len(request.plan.lent.texts) if request.plan.lent is not None else 0)


def run(llm: LLM, prompts: Sequence[Prompt], params: SamplingParams = KEEP) -> list[Request]:
    round_id = llm.engine.new_round_id()
    requests = [llm.requests.make(prompt, params, round_id, "") for prompt in prompts]
    llm.engine.run(requests)
    return requests


def test_who_guards_its_text_lends_nothing(make_fake_llm: MakeLLM) -> None:
    prompts = a_round(1, agents=4)
    assert max(map(num_owners, run(make_fake_llm(owners=7), prompts))) == 4
    isolated = [Prompt(p.content, agent=p.agent, private="isolated") for p in prompts[:2]]
    llm = make_fake_llm(owners=7)
    assert sorted(map(num_owners, run(llm, [*isolated, *prompts[2:]]))) == [1, 1, 1, 2]
    assert set(map(num_owners, run(make_fake_llm(owners=7, private="isolated"), prompts))) == {1}


@pytest.mark.parametrize("correction", ["all", "edges:30+0"])
def test_where_all_is_corrected_nothing_is_lent(correction: str, make_fake_llm: MakeLLM) -> None:
    found = run(make_fake_llm(owners=7, correction=correction), a_round(6))
    assert set(map(num_owners, found)) == {1}
    assert sorted(request.plan.num_approximate for request in found if request.plan)[0] == 0


@pytest.mark.parametrize("num_pages", [30, 40, 200])
def test_texts_that_do_not_fit_are_not_read(num_pages: int, make_fake_llm: MakeLLM) -> None:
    """With little memory, a run has one owner, and nothing is computed that others have."""
    rng = np.random.default_rng(8)
    heard = [shared(random_ids(rng, 64)) for _ in range(2)]
    prompts = [
        Prompt([private(random_ids(rng, 100 + n)), *heard, private([5])], agent=str(n))
        for n in range(5)
    ]
    rows = {}
    for owners in (1, 5):
        llm = make_fake_llm(owners=owners, num_pages=num_pages, correction="edges:2+1")
        found = run(llm, prompts, SamplingParams(max_tokens=2, ignore_eos=True))
        assert all(request.error is None for request in found)
        steps = llm.executor.steps  # type: ignore[attr-defined]
        rows[owners] = sum(step.num_tokens for step in steps)
    assert rows[5] <= rows[1] + 3 * 5  # beginnings of texts end within pages


def test_probabilities_of_a_prompt_are_those_of_its_own_context(make_llm: MakeLLM) -> None:
    prompts = a_round(2)
    scored = SamplingParams(max_tokens=1, prompt_logprobs=0)
    found = run(make_llm(owners=3), prompts, scored)
    assert set(map(num_owners, found)) == {1}


@pytest.mark.parametrize(
    ("num_ticks", "owners", "failed"),
    [(2, [1, 2, 1, 1, 1], []), (6, [1, 3, 1, 1, 1], [1])],
    ids=["text", "owner"],
)
def test_a_text_that_failed_is_not_lent(
    num_ticks: int, owners: list[int], failed: list[int], make_fake_llm: MakeLLM
) -> None:
    """Its owner does without it, and where the owner fails it is alone in that."""
    llm = make_fake_llm(owners=3, max_num_batched_tokens=16)
    round_id = llm.engine.new_round_id()
    requests = [llm.requests.make(prompt, KEEP, round_id, "") for prompt in a_round(3)]
    llm.engine.add(requests)
    for _ in range(num_ticks):
        llm.engine.tick()
    assert [num_owners(request) for request in requests] == [1, 3, 1, 1, 1]
    llm.executor.fail = RuntimeError("once")  # type: ignore[attr-defined]
    while llm.engine.has_work:
        llm.engine.tick()
        llm.engine.check_integrity()
    assert [num_owners(request) for request in requests] == owners
    assert [at for at, request in enumerate(requests) if request.error is not None] == failed


def test_over_rounds_what_was_said_is_text(make_llm: MakeLLM) -> None:
    """In the second round each agent lends all that it has read and said."""
    llm = make_llm(owners=3)
    agents = [Agent(f"a{n}", "who I am " * (3 + n)) for n in range(4)]
    session = llm.session("talk", agents)
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    for number in range(3):
        result = session.run("what now?", params)
        result.raise_for_errors()
        inexact = [output.approximate_tokens > 0 for output in result.outputs]
        assert all(inexact) == (number > 0)
    llm.engine.check_integrity()


def test_without_co_owners_nothing_changes(make_llm: MakeLLM) -> None:
    """Owners stand in another order at most where there are none to share with."""
    prompts = random_round(5, agents=1)
    one, other = (logprobs(make_llm(owners=n).run_round(prompts, KEEP)) for n in (1, 7))
    assert torch.equal(one, other)


def test_what_owners_do_not_go_with() -> None:
    with pytest.raises(ConfigError, match=r"owners.*--reuse collective"):
        EngineOptions(owners=2, reuse="prefix")


@pytest.mark.parametrize("owners", [0, 17, 2.5, "many"])
def test_how_many_there_may_be(owners: object) -> None:
    with pytest.raises(ConfigError, match="owners"):
        EngineOptions(owners=owners)  # type: ignore[arg-type]
