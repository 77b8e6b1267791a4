"""The generator of rounds: seeds, orders, the formula, and questions with answers."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tiny_models import formula
from tokendance import LLM, SamplingParams
from tokendance.bench.suites.fidelity import measure_recall
from tokendance.bench.workload import (
    NEWS,
    TASK,
    Order,
    RoundTexts,
    RoundWorkload,
    WorkloadSpec,
    generate_workload,
    write_texts,
)
from tokendance.errors import ConfigError, TraceError
from tokendance.fidelity.measure import measure_fidelity, reference_answers
from tokendance.models.loader import LoadedModel, load_model
from tokendance.options import EngineOptions

# The tiny model's tokens are bytes, and blocks must hold a name and a fact. Other knobs are small.
SPEC = WorkloadSpec(agents=3, block_tokens=80, private_tokens=(60, 90), seed=3)
MakeLLM = Callable[..., LLM]


@pytest.fixture(scope="module")
def wide(model_folder: Callable[..., Path]) -> LoadedModel:
    return load_model(str(model_folder("llama", max_position_embeddings=2048)), "float32")


@pytest.fixture(scope="module")
def llm(wide: LoadedModel) -> LLM:
    return LLM.from_loaded(wide, EngineOptions(reuse="prefix", kv_budget=2**22))


@pytest.fixture(scope="module")
def texts(llm: LLM) -> RoundTexts:
    return write_texts(llm, SPEC)


@pytest.fixture(scope="module")
def workload(texts: RoundTexts) -> RoundWorkload:
    return texts.arrange()


def block_texts(llm: LLM, workload: RoundWorkload) -> list[str]:
    return [llm.encoder.decode(list(part.content)) for part in workload.blocks]  # type: ignore[arg-type]


def test_the_same_seed_gives_the_same_round(llm: LLM, workload: RoundWorkload) -> None:
    assert generate_workload(llm, SPEC) == workload
    other = generate_workload(llm, replace(SPEC, seed=4))
    assert other.blocks != workload.blocks
    assert [view.system for view in other.views] != [view.system for view in workload.views]


def test_lengths_are_as_asked(llm: LLM, workload: RoundWorkload) -> None:
    assert {len(part.content) for part in workload.blocks} == {80}
    lengths = [len(llm.encoder.text_ids(view.system)) for view in workload.views]
    assert sorted(lengths) == [60, 75, 90]


def test_texts_do_not_depend_on_the_order(texts: RoundTexts) -> None:
    assert texts.arrange("permuted").blocks == texts.arrange("same").blocks
    same, permuted = texts.arrange("same"), texts.arrange("permuted")
    assert same.questions == permuted.questions


def test_orders(llm: LLM) -> None:
    texts = write_texts(llm, replace(SPEC, agents=4, block_tokens=20))
    assert [view.block_indices for view in texts.arrange("same").views] == [(0, 1, 2, 3)] * 4
    assert [view.block_indices for view in texts.arrange("own-first").views] == [
        (0, 1, 2, 3), (1, 0, 2, 3), (2, 0, 1, 3), (3, 0, 1, 2),
    ]  # fmt: skip
    permuted = [view.block_indices for view in texts.arrange("permuted").views]
    assert all(sorted(heard) == [0, 1, 2, 3] for heard in permuted)
    assert len(set(permuted)) > 1


def test_blocks_are_one_segment_wherever_they_stand(llm: LLM, texts: RoundTexts) -> None:
    workload = texts.arrange("permuted")
    found = {
        segment.hash
        for prompt in workload.prompts()
        for _, segment in llm.encoder.encode(prompt).shared_segments()
    }
    assert len(found) == len(workload.blocks)


def test_answers_stand_in_the_block_of_the_speaker_only(llm: LLM, workload: RoundWorkload) -> None:
    assert len(workload.questions) == len(workload.views)
    speakers = [view.name for view in workload.views]
    said = dict(zip(speakers, block_texts(llm, workload), strict=True))
    for view in workload.views:
        question = view.question
        assert question is not None
        assert question.speaker != view.name
        assert question.speaker in question.text
        assert question.answered_by(said[question.speaker])
        elsewhere = [text for name, text in said.items() if name != question.speaker]
        elsewhere += [view.system + NEWS + TASK for view in workload.views]
        elsewhere += [question.text, question.opening]
        assert not any(question.answered_by(text) for text in elsewhere)


def test_a_block_too_short_for_its_fact_is_not_asked_about(llm: LLM) -> None:
    workload = generate_workload(llm, replace(SPEC, block_tokens=20))
    assert workload.questions == ()
    assert workload.question_prompts(llm) == []
    assert measure_recall(llm, workload) == {}


def test_question_prompts_share_the_blocks_and_begin_the_answer(
    llm: LLM, workload: RoundWorkload
) -> None:
    for plain, asked, question in zip(
        workload.prompts(), workload.question_prompts(llm), workload.questions, strict=True
    ):
        blocks = [one.hash for _, one in llm.encoder.encode(plain).shared_segments()]
        encoded = llm.encoder.encode(asked)
        assert [one.hash for _, one in encoded.shared_segments()] == blocks
        ending = llm.encoder.decode(encoded.segments[-1].token_ids.tolist())
        assert question.text in ending
        assert ending.endswith(question.opening)


def test_computed_tokens_are_the_formula(
    workload: RoundWorkload, make_llm: MakeLLM, wide: LoadedModel
) -> None:
    engine = make_llm("collective", page_size=1, num_pages=6000, model=wide)
    workload.warm(engine)
    result = engine.run_round(workload.prompts(), SamplingParams(max_tokens=1))
    assert result.stats.computed_tokens == formula(workload, engine, k=4)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"agents": 1}, "agents"),
        ({"private_tokens": (9, 3)}, "private_tokens"),
        ({"block_tokens": 0}, "block_tokens"),
        ({"seed": -1}, "seed"),
    ],
)
def test_impossible_specs_are_refused(changes: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        WorkloadSpec(**changes)  # type: ignore[arg-type]


def test_people_of_a_trace_come_again_under_other_names(llm: LLM, tmp_path: Path) -> None:
    path = tmp_path / "people.jsonl"
    lines = [{"type": "agent", "agent": name, "system": f"You are {name}."} for name in "AB"]
    path.write_text("\n".join(map(json.dumps, lines)))
    workload = generate_workload(llm, replace(SPEC, block_tokens=20, source=path))
    names = [view.name for view in workload.views]
    assert len(set(names)) == 3
    assert names[2] == f"{names[0]} 2"
    with pytest.raises(TraceError):
        generate_workload(llm, replace(SPEC, source=tmp_path / "nothing.jsonl"))


def test_fidelity_is_over_mirrors(
    workload: RoundWorkload, make_llm: MakeLLM, wide: LoadedModel
) -> None:
    reference = reference_answers(make_llm("none", model=wide), workload.prompts(), 6)
    full = make_llm("collective", correction="all", model=wide)
    exact = measure_fidelity(full, workload.prompts(), reference)
    assert exact.agents == tuple(view.name for view in workload.views[1:])
    assert exact.kl_continuation < 1e-6
    assert (exact.top1, exact.identical) == (1, 1)
    assert exact.corrected == 240
    assert exact.corrected_share == 1
    partly = make_llm("collective", model=wide)
    found = measure_fidelity(partly, workload.prompts(), reference)
    assert found.corrected == 12
    assert found.kl_continuation > exact.kl_continuation


@pytest.mark.parametrize("order", ["same", "permuted"])
def test_identical_is_what_a_free_answer_shows(
    texts: RoundTexts, make_llm: MakeLLM, wide: LoadedModel, order: Order
) -> None:
    prompts = texts.arrange(order).prompts()
    exact = make_llm("none", model=wide)
    reference = reference_answers(exact, prompts, 8)
    found = measure_fidelity(make_llm("collective", "none", model=wide), prompts, reference)
    params = SamplingParams(max_tokens=8)
    expected = exact.run_round(prompts, params).outputs
    outputs = make_llm("collective", "none", model=wide).run_round(prompts, params).outputs
    equal = [
        one.token_ids == other.token_ids
        for one, other in zip(expected, outputs, strict=True)
        if one.agent in found.agents
    ]
    assert found.identical == pytest.approx(sum(equal) / len(equal))
