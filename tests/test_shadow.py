"""Shadows: which mirrors are kept, what comparing them says, and when they are computed."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from test_exactness import KEEP, random_ids, random_round
from tokendance import LLM, Prompt, SamplingParams, private, shared
from tokendance.engine.request import Request
from tokendance.errors import ConfigError
from tokendance.fidelity.idle_shadows import IDLE_S, IdleShadows
from tokendance.fidelity.shadow import MAX_PENDING, ShadowReport
from tokendance.models.loader import LoadedModel
from tokendance.options import EngineOptions

MakeLLM = Callable[..., LLM]


def shadowed(make_llm: MakeLLM, tiny: LoadedModel, share: float = 1.0) -> LLM:
    options = replace(make_llm().engine.options, correction="first:1", shadow=share)
    return LLM.from_loaded(tiny, options)


def test_shadows_report_what_a_comparison_by_hand_finds(
    make_llm: MakeLLM, tiny: LoadedModel
) -> None:
    prompts = random_round(14, agents=4)
    llm = shadowed(make_llm, tiny)
    result = llm.run_round(prompts, KEEP)
    used = llm.kv_store.pool.num_free
    reports = []
    while (report := llm.check_shadow()) is not None:
        reports.append(report)
    assert llm.kv_store.pool.num_free == used  # nothing is left behind
    assert len(reports) == 3  # the master computed its own
    for report in reports:
        index = [output.agent for output in result.outputs].index(report.agent)
        output = result.outputs[index]
        params = SamplingParams(
            max_tokens=8, forced_tokens=output.token_ids, keep_logprobs=True, ignore_eos=True
        )
        exact = make_llm("none").generate([prompts[index]], params)[0]
        expected = torch.stack(exact.logprobs)
        kl = (expected.exp() * (expected - torch.stack(output.logprobs))).sum(-1)
        assert report.tokens == 8
        assert report.kl_next == pytest.approx(float(kl[0]), abs=1e-4)
        assert report.kl == pytest.approx(float(kl.mean()), abs=1e-4)
    assert max(report.kl for report in reports) > 1e-3


def test_a_silent_mirror_has_a_shadow_too(make_llm: MakeLLM, tiny: LoadedModel) -> None:
    prompts = random_round(16, agents=3)
    plain = shadowed(make_llm, tiny, 0.0)
    tokens = {o.token_ids[0] for o in plain.run_round(prompts, KEEP).outputs}
    assert plain.shadows.num_pending == 0
    llm = shadowed(make_llm, tiny)
    ends = SamplingParams(max_tokens=8, stop_token_ids=tuple(tokens))
    assert all(output.token_ids == () for output in llm.run_round(prompts, ends).outputs)
    reports = [llm.check_shadow(), llm.check_shadow()]
    assert all(report is not None and report.tokens == 1 for report in reports)
    assert llm.check_shadow() is None


def test_shadows_take_a_share_and_never_more_than_fit(make_llm: MakeLLM, tiny: LoadedModel) -> None:
    rng = np.random.default_rng(0)
    llm = shadowed(make_llm, tiny, 0.5)
    quiet = SamplingParams(max_tokens=2, ignore_eos=True)
    for _ in range(30):
        block = shared(random_ids(rng, 12))
        prompts = [Prompt([private(random_ids(rng, 5 + i)), block], agent=str(i)) for i in range(5)]
        outputs = llm.run_round(prompts, quiet).outputs
        assert all(output.logprobs == () for output in outputs)
    assert llm.shadows.num_pending == MAX_PENDING
    assert 30 < MAX_PENDING + llm.shadows.num_dropped < 90  # of 120 mirrors
    assert make_llm().check_shadow() is None


def test_an_interrupted_shadow_waits_again(
    make_llm: MakeLLM, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = shadowed(make_llm, tiny)
    llm.run_round(random_round(19, agents=2), KEEP)
    assert llm.shadows.num_pending == 1

    def interrupt() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "tick", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.check_shadow()
    assert llm.shadows.num_pending == 1
    assert llm.check_shadow() is not None
    assert llm.shadows.num_pending == 0
    llm.engine.check_integrity()


class Loop:
    """An engine whose loop has a clock of the test's own: a step a second, while there is work."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.reports: list[ShadowReport] = []
        self.idle = IdleShadows(llm.shadows, llm.engine, self.reports.append)
        llm.engine.attach(self.idle)
        self.live: list[Request] = []
        self.now = 100.0

    def add(self, prompts: list[Prompt], params: SamplingParams) -> None:
        round_id = self.llm.engine.new_round_id()
        self.live = [self.llm.requests.make(prompt, params, round_id, "") for prompt in prompts]
        self.llm.engine.add(self.live)

    def tick(self) -> None:
        self.now += 1.0
        self.llm.engine.tick(self.now)
        self.live = [request for request in self.live if request.finish_reason is None]


def test_shadows_are_computed_when_nobody_waits(make_llm: MakeLLM, tiny: LoadedModel) -> None:
    llm = shadowed(make_llm, tiny)
    loop = Loop(llm)
    assert loop.idle.due_s() is None
    loop.add(random_round(20, agents=3), SamplingParams(max_tokens=2, ignore_eos=True))
    for _ in range(2):
        loop.tick()
    assert not loop.live
    assert llm.shadows.num_pending == 2
    assert not llm.engine.has_work
    # The engine was busy until this moment.
    assert loop.idle.due_s() == loop.now + IDLE_S
    loop.idle.after_step(loop.now + IDLE_S / 2, ())
    assert not llm.engine.has_work
    loop.tick()
    assert llm.engine.has_work
    assert loop.idle.due_s() is None
    while llm.engine.has_work:
        loop.tick()
    assert [report.tokens for report in loop.reports] == [2, 2]
    assert llm.shadows.num_pending == 0
    llm.engine.check_integrity()


def test_a_shadow_gives_way_and_begins_anew(make_llm: MakeLLM, tiny: LoadedModel) -> None:
    llm = shadowed(make_llm, tiny)
    loop = Loop(llm)
    loop.add(random_round(21, agents=2), SamplingParams(max_tokens=4, ignore_eos=True))
    while loop.live:
        loop.tick()
    loop.tick()
    loop.tick()
    assert llm.engine.has_work  # in the middle of a shadow
    assert llm.shadows.num_pending == 0
    loop.add([Prompt([5, 6, 7])], SamplingParams(max_tokens=1))
    loop.idle.give_way(loop.now)
    assert llm.shadows.num_pending == 1
    assert not loop.reports
    while loop.live:
        loop.tick()
    assert loop.idle.due_s() == loop.now + IDLE_S
    loop.tick()
    assert llm.engine.has_work
    while llm.engine.has_work:
        loop.tick()
    assert len(loop.reports) == 1
    llm.engine.check_integrity()


def test_a_loop_that_ends_leaves_no_shadow_behind(make_llm: MakeLLM, tiny: LoadedModel) -> None:
    llm = shadowed(make_llm, tiny)
    loop = Loop(llm)
    loop.add(random_round(22, agents=2), SamplingParams(max_tokens=4, ignore_eos=True))
    while loop.live:
        loop.tick()
    loop.tick()
    assert llm.engine.has_work
    loop.idle.close()
    assert not llm.engine.has_work
    assert loop.idle.due_s() is None
    for _ in range(3):
        loop.tick()
    assert not llm.engine.has_work
    assert not loop.reports


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_is_a_share(share: float) -> None:
    with pytest.raises(ConfigError, match="shadow"):
        EngineOptions(shadow=share)
