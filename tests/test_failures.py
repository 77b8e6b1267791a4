"""Bad input and failures: one sentence, and nobody else is harmed."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel

from tokendance import LLM, Agent, Prompt, SamplingParams, private, shared
from tokendance.collector.correction import Edges
from tokendance.collector.plan import FRESH_END
from tokendance.errors import (
    AbortedError,
    ConfigError,
    ModelNotFoundError,
    NumericsError,
    PromptError,
    RoundError,
    TraceError,
    UnsupportedModelError,
)
from tokendance.executor.step import StepInput
from tokendance.executor.torch_executor import TorchExecutor
from tokendance.models.loader import LoadedModel, load_model
from tokendance.models.support import why_unsupported
from tokendance.options import EngineOptions
from tokendance.rounds.trace import read_trace
from tokendance.units import parse_bytes

MakeLLM = Callable[..., LLM]
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)
BAD = 251  # a token that spoils the logits of whoever has it


def round_of(own: Sequence[int], blocks: int = 3) -> list[Prompt]:
    heard = [shared([10 + index] * 20) for index in range(blocks)]
    return [
        Prompt([private([token] * 5), *heard, private([token])], agent=f"agent {index}")
        for index, token in enumerate(own)
    ]


def executor_of(llm: LLM) -> TorchExecutor:
    assert isinstance(llm.executor, TorchExecutor)
    return llm.executor


def spoil(step: StepInput, logits: Tensor) -> Tensor:
    """Put NaN into the logits of whoever has the bad token at the end of its prompt."""
    logits = logits.clone()
    wanting = [request for request in step.requests if request.sampling is not None]
    for row, request in enumerate(wanting):
        if BAD in request.token_ids:
            logits[row] = float("nan")
    return logits


def test_nan_fails_one_request_and_its_readers_begin_anew(make_llm: MakeLLM) -> None:
    own = [BAD, 101, 102, 103]
    alone = make_llm().run_round(round_of(own)[1:], PARAMS)
    llm = make_llm()
    executor_of(llm).on_logits = spoil
    result = llm.run_round(round_of(own), PARAMS)
    assert isinstance(result.outputs[0].error, NumericsError)
    assert [o.error for o in result.outputs[1:]] == [None] * 3
    # The failed agent was the owner; another took over.
    assert [o.token_ids for o in result.outputs[1:]] == [o.token_ids for o in alone.outputs]
    assert result.stats.agents == 3
    bad = llm.encoder.encode(round_of(own)[0])
    assert llm.kv_store.match_prefix(bad.prefix_hashes, exact=False) == []


def test_real_nan_in_kv_is_not_handed_on(
    model_folder: Callable[..., Path], make_llm: MakeLLM
) -> None:
    model = load_model(str(model_folder("llama")), "float32")
    module: Any = model.module
    module.get_input_embeddings().weight.data[BAD] = float("nan")
    for budget in (4096, 30):
        own = [101, BAD, 102, 103]
        llm = make_llm(model=model, max_num_batched_tokens=budget)
        # The bad agent owns the run: it misses most.
        prompts = round_of(own, blocks=2)
        content = prompts[1].content
        prompts[1] = Prompt([*content[:-1], shared([50] * 30), private([7])], agent="bad")
        result = llm.run_round(prompts, PARAMS)
        assert isinstance(result.outputs[1].error, NumericsError)
        good = make_llm(model=model).run_round([prompts[i] for i in (0, 2, 3)], PARAMS)
        found = [o.token_ids for i, o in enumerate(result.outputs) if i != 1]
        assert [o.error for i, o in enumerate(result.outputs) if i != 1] == [None] * 3
        assert found == [o.token_ids for o in good.outputs]


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
@pytest.mark.parametrize("victim", [0, 2])
def test_aborted_requests_leave_the_others(make_llm: MakeLLM, steps: int, victim: int) -> None:
    prompts = round_of([100, 101, 102, 103])
    llm = make_llm(max_num_batched_tokens=25)
    engine = llm.engine
    round_id = engine.new_round_id()
    requests = [llm.requests.make(p, PARAMS, round_id, "") for p in prompts]
    engine.add(requests)
    for _ in range(steps):
        engine.tick()
        engine.check_integrity()
    engine.abort(requests[victim])
    engine.abort(requests[victim])  # twice does no harm
    engine.check_integrity()
    while engine.has_work:
        engine.tick()
        engine.check_integrity()
    assert isinstance(requests[victim].error, AbortedError)
    others = [r for i, r in enumerate(requests) if i != victim]
    assert all(r.error is None and len(r.generated) == 6 for r in others)
    assert all(r.finish_reason == "length" for r in others)


def test_an_interrupted_round_is_taken_back(make_llm: MakeLLM) -> None:
    llm = make_llm()

    def interrupt(phase: str, count: int) -> None:
        raise KeyboardInterrupt(phase, count)

    with pytest.raises(KeyboardInterrupt):
        llm.run_round(round_of([100, 101]), PARAMS, interrupt)
    assert not llm.engine.has_work
    llm.engine.check_integrity()
    assert llm.run_round(round_of([100, 101]), PARAMS).stats.agents == 2


def test_an_interrupt_inside_the_model_leaves_no_unwritten_kv(
    make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm()
    prompts = round_of([100, 101, 102])
    exact = make_llm().run_round(prompts, PARAMS)
    executor = executor_of(llm)
    attend = executor.attend

    def interrupted(layer: int, *arguments: Any) -> Tensor:
        if layer == 2:
            raise KeyboardInterrupt
        return attend(layer, *arguments)

    monkeypatch.setattr(executor, "attend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.run_round(prompts, PARAMS)
    monkeypatch.undo()
    assert not llm.engine.has_work
    result = llm.run_round(prompts, PARAMS)
    assert result.stats.computed_tokens == exact.stats.computed_tokens
    assert [o.token_ids for o in result.outputs] == [o.token_ids for o in exact.outputs]


def test_a_bad_mirror_does_not_wipe_sound_runs(make_llm: MakeLLM) -> None:
    llm = make_llm()
    llm.run_round(round_of([100, 101]), PARAMS)
    executor_of(llm).on_logits = spoil
    result = llm.run_round(round_of([BAD, 102]), PARAMS)
    assert isinstance(result.outputs[0].error, NumericsError)
    assert result.outputs[1].computed_tokens == 5 + 2 * 4 + FRESH_END  # the third block is in it


@pytest.mark.parametrize(
    "bad",
    [
        Prompt([{"role": "user", "content": 5}]),
        Prompt([{"role": "user<|end|>", "content": "x"}]),
        Prompt([{"role": "user", "content": "x", "tool_calls": []}]),
        Prompt("half a character: \ud800"),
        Prompt([]),
    ],
)
def test_a_bad_prompt_fails_alone(make_llm: MakeLLM, bad: Prompt) -> None:
    result = make_llm().run_round([*round_of([100, 101]), bad], PARAMS)
    assert isinstance(result.outputs[2].error, PromptError)
    assert [o.error for o in result.outputs[:2]] == [None, None]


def test_tokens_outside_the_vocabulary_fail_alone(make_llm: MakeLLM) -> None:
    for wrong in (
        SamplingParams(forced_tokens=(9999, 5)),
        SamplingParams(logit_bias=((3, 1.0), (9999, 1.0))),
    ):
        result = make_llm().run_round(round_of([100, 101]), [PARAMS, wrong])
        assert result.outputs[0].error is None
        assert isinstance(result.outputs[1].error, PromptError)


def test_parts_of_a_wrong_kind() -> None:
    with pytest.raises(PromptError, match="NoneType"):
        private(None)  # type: ignore[arg-type]


def test_a_long_prompt_fails_alone(make_llm: MakeLLM) -> None:
    prompts = round_of([100, 101])
    long = Prompt([5] * 600, agent="long")
    result = make_llm().run_round([*prompts, long], PARAMS)
    assert isinstance(result.outputs[2].error, PromptError)
    assert "600 tokens" in str(result.outputs[2].error)
    assert "512" in str(result.outputs[2].error)
    assert result.stats.agents == 2
    with pytest.raises(PromptError):
        result.raise_for_errors()


def test_answers_end_where_the_context_does(make_llm: MakeLLM) -> None:
    output = make_llm().generate([[5] * 500], SamplingParams(max_tokens=99, ignore_eos=True))[0]
    assert output.finish_reason == "length"
    assert len(output.token_ids) == 12


def test_wrong_rounds(make_llm: MakeLLM) -> None:
    llm = make_llm()
    with pytest.raises(RoundError, match="empty"):
        llm.run_round([])
    with pytest.raises(RoundError, match="'Ann'"):
        llm.run_round([Prompt("a", agent="Ann"), Prompt("b", agent="Ann")])
    with pytest.raises(ConfigError, match="2 prompts and 1"):
        llm.run_round(["a", "b"], [PARAMS])
    with pytest.raises(RoundError, match="no agents"):
        llm.session().run("x")
    session = llm.session(agents=[Agent("Ann", "x")])
    with pytest.raises(RoundError, match="already"):
        session.join(Agent("Ann", "y"))
    with pytest.raises(RoundError, match="'Bo'"):
        session.leave("Bo")
    with pytest.raises(RoundError, match="no task"):
        session.run({"Bo": "go"})


@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens": -1},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"stop": "text"},
        {"stop": ("",)},
        {"forced_tokens": ()},
    ],
)
def test_wrong_sampling(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        SamplingParams(**settings)


def test_wrong_settings(tiny: LoadedModel, model_folder: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="sometimes"):
        EngineOptions(reuse="sometimes")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="smaller than one page"):
        LLM.from_loaded(tiny, EngineOptions(kv_budget=10))
    with pytest.raises(ConfigError, match="lots"):
        LLM(str(model_folder("llama")), kv_budget="lots")
    with pytest.raises(ConfigError, match="float8"):
        LLM(str(model_folder("llama")), dtype="float8")
    with pytest.raises(ConfigError, match="first_k"):
        LLM(str(model_folder("llama")), correction=Edges(2, 0), first_k=3)
    with pytest.raises(ConfigError, match="first_k"):
        LLM(str(model_folder("llama")), correction="none", first_k=3)
    with pytest.raises(ConfigError, match="first_k is -1"):
        LLM(str(model_folder("llama")), first_k=-1)
    with pytest.raises(ConfigError, match="'hkvd'"):
        LLM(str(model_folder("llama")), correction="hkvd")
    assert parse_bytes("1.5 KiB") == 1536
    assert parse_bytes("2gb") == 2 * 10**9


def test_an_attention_that_cannot_serve_is_refused(model_folder: Callable[..., Path]) -> None:
    folder = str(model_folder("llama"))
    with pytest.raises(ConfigError, match="native attention kernel cannot be used"):
        LLM(folder, attention="native", dtype="float16", kv_budget="20MiB")
    with pytest.raises(ConfigError, match="no attention 'fast'"):
        LLM(folder, attention="fast", kv_budget="20MiB")


@pytest.mark.parametrize(
    ("architecture", "changes", "word"),
    [
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "dynamic",
        ),
    ],
)
def test_models_that_do_not_fit_are_refused(
    architecture: str, changes: dict[str, Any], word: str, model_folder: Callable[..., Path]
) -> None:
    with pytest.raises(UnsupportedModelError, match=word):
        load_model(str(model_folder(architecture, **changes)), "float32")


def test_models_without_rope_are_refused(tmp_path: Path, tiny: LoadedModel) -> None:
    GPT2LMHeadModel(
        GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    ).save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="RoPE"):
        load_model(str(tmp_path), "float32")


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("mamba", "without a KV cache"),
        ("jamba", "without a KV cache"),
        ("qwen3_next", "without a KV cache"),
        ("deepseek_v3", "MLA"),
        ("t5", "encoder-decoder"),
        ("bloom", "RoPE"),
    ],
)
def test_kinds_that_do_not_fit_are_named(kind: str, word: str) -> None:
    reason = why_unsupported(AutoConfig.for_model(kind))
    assert reason is not None
    assert word in reason


def test_a_layer_without_rope_is_found_by_the_probe(tmp_path: Path, tiny: LoadedModel) -> None:
    config = AutoConfig.for_model(
        "smollm3",
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        no_rope_layers=[1, 1, 1, 0],
        max_position_embeddings=128,
        use_sliding_window=False,
        pad_token_id=0,
    )
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="do not turn"):
        load_model(str(tmp_path), "float32")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 1e4,
        },
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "rope_theta": 1e4,
        },
    ],
)
def test_fixed_rope_types_are_exact(
    rope: dict[str, Any], model_folder: Callable[..., Path], make_llm: MakeLLM
) -> None:
    model = load_model(str(model_folder("llama", rope_parameters=rope)), "float32")
    prompts = round_of([100, 101, 102])
    exact = make_llm(model=model, reuse="none").run_round(prompts, PARAMS)
    result = make_llm(model=model, correction="all").run_round(prompts, PARAMS)
    assert [o.token_ids for o in result.outputs] == [o.token_ids for o in exact.outputs]


def test_missing_weights_are_noticed(tmp_path: Path, model_folder: Callable[..., Path]) -> None:
    shutil.copytree(model_folder("llama"), tmp_path / "short")
    config = tmp_path / "short" / "config.json"
    text = config.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 5')
    config.write_text(text.replace('"layer_types"', '"unused"'))
    with pytest.raises(ModelNotFoundError, match="missing"):
        load_model(str(tmp_path / "short"))


@pytest.mark.parametrize(
    ("file", "content"),
    [("model.safetensors", b"garbage"), ("config.json", b"[]"), ("tokenizer.json", b"{}")],
)
def test_broken_files_are_reported(
    tmp_path: Path, model_folder: Callable[..., Path], file: str, content: bytes
) -> None:
    shutil.copytree(model_folder("llama"), tmp_path / "broken")
    (tmp_path / "broken" / file).write_bytes(content)
    with pytest.raises(ModelNotFoundError, match="cannot be loaded"):
        load_model(str(tmp_path / "broken"))


def test_missing_and_broken_models(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no/such-model"):
        load_model("no/such-model")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelNotFoundError, match="cannot be loaded"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"type": "song"}', "'song'"),
        ('{"agent": "A"}', "'type'"),
        ('{"type": "agent", "agent": "A"}', "'persona'"),
        ('{"type": "agent", "agent": 3, "system": "x"}', "'agent' is not a text"),
        ('{"type": "agent", "agent": "Ann", "system": "x"}', "given before"),
        ('{"type": "round", "round": 0, "shared": [], "requests": []}', "no requests"),
        (
            '{"type": "round", "round": 0, "shared": [], "requests": [{"agent": "Zoe", '
            '"private_history": "", "task": "", "recorded_output": ""}]}',
            "'Zoe'",
        ),
        (
            '{"type": "round", "round": 0, "shared": 3, "requests": [{"agent": "Ann", '
            '"private_history": "", "task": "", "recorded_output": ""}]}',
            "not a list",
        ),
        (b"\xff\xfe", "UTF-8"),
    ],
)
def test_broken_lines_of_a_trace_are_named(tmp_path: Path, line: str | bytes, word: str) -> None:
    path = tmp_path / "trace.jsonl"
    raw = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b'{"type": "agent", "agent": "Ann", "system": "x"}\n\n' + raw + b"\n")
    with pytest.raises(TraceError, match=f"line 3.*{word}"):
        read_trace(path)


def test_a_stop_text_at_the_very_beginning(make_llm: MakeLLM) -> None:
    llm = make_llm()
    prompt = [list(range(3, 40))]
    whole = llm.generate(prompt, SamplingParams(max_tokens=9, ignore_eos=True))[0].text
    stop = (whole[0],)
    output = llm.generate(prompt, SamplingParams(max_tokens=9, ignore_eos=True, stop=stop))[0]
    assert (output.text, output.finish_reason) == ("", "stop")


def test_stop_strings_and_ids(make_llm: MakeLLM) -> None:
    llm = make_llm()
    prompt = [list(range(3, 40))]
    whole = llm.generate(prompt, SamplingParams(max_tokens=20, ignore_eos=True))[0]
    stop = next(c for c in whole.text[3:] if c.isascii() and whole.text.index(c) >= 3)
    by_text = llm.generate(prompt, SamplingParams(max_tokens=20, ignore_eos=True, stop=(stop,)))[0]
    assert by_text.finish_reason == "stop"
    assert by_text.text == whole.text[: whole.text.index(stop)]
    token = whole.token_ids[5]
    by_id = llm.generate(
        prompt, SamplingParams(max_tokens=20, ignore_eos=True, stop_token_ids=(token,))
    )[0]
    assert by_id.token_ids == whole.token_ids[: whole.token_ids.index(token)]
