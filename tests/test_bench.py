"""Every suite at a tiny size on a tiny model: the shape of what it prints, never its figures."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tokendance.bench.settings import SUITES, BenchOutputs, BenchSettings
from tokendance.bench.suite import between, in_turn, ratio
from tokendance.bench.suites import leak
from tokendance.bench.suites.capacity import Search
from tokendance.bench.worker import Environment
from tokendance.cli import app
from tokendance.commands.bench import run_bench
from tokendance.errors import ConfigError
from tokendance.options import EngineOptions

HEADLINES: dict[str, set[str]] = {
    "prefill": {
        f"{figure}_{agents}"
        for figure in (
            "speedup_vs_prefix", "speedup_vs_pic", "speedup_vs_pic_batched", "floor_ratio",
            "plain_pass_ratio",
        )
        for agents in (10, 50)
    } | {"speedup_vs_vllm_10"},
    "attention": {"vs_bytes_once_32", "speedup_vs_torch_32", "speedup_vs_own_copies_32"},
    "plain": {"speedup_vs_transformers_bfloat16", "speedup_vs_transformers_float32"},
    "decode": {"speedup_vs_dense_32", "speedup_vs_vllm_32"},
    "storage": {
        "mirror_compression", "shared_compression", "resident_compression",
        "mirror_shared_compression", "disk_compression",
    },
    "fidelity": {
        f"{figure}_{mode}"
        for figure in ("kl", "kl_next", "top1", "identical", "recall", "corrected")
        for mode in ("pic", "collective")
    } | {"kl_ratio", "kl_next_ratio"},
    "corrections": {"kl_ratio_2", "kl_ratio_3", "speedup_2", "speedup_3"},
    "rounds": {
        f"kl_{when}_{mode}" for when in ("second", "last") for mode in ("pic", "collective")
    },
    "weights": {"kl_bfloat16", "kl_int8", "perplexity_ratio_int8"},
    "leak": {"p_exact", "p_uncorrected", "p_corrected", "p_isolated"},
    "restore": {
        "speedup_vs_dense_restore", "speedup_vs_fused_restore", "speedup_vs_dense_from_disk",
        "speedup_vs_computing_again", "next_round_vs_computing_again",
    },
    "view": {"times_unrecorded", "share_of_round"},
    "serve": {"round_speed", "lone_latency", "burst_answered"},
    "capacity": {
        "agents_vllm", "agents_prefix", "agents_pic", "agents_collective", "ratio_vs_vllm",
        "ratio_by_memory",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def model(model_folder: Callable[..., Path]) -> str:
    return str(model_folder("llama", max_position_embeddings=4096))


def run(
    suite: str,
    model: str,
    outputs: BenchOutputs,
    capsys: pytest.CaptureFixture[str],
    **settings: Any,
) -> dict[str, Any]:
    """Run a suite as the command does; return the JSON of its last line."""
    chosen = BenchSettings(model, "tiny", repeats=1, **settings)
    run_bench(suite, chosen, outputs, Console())  # type: ignore[arg-type]
    document: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return document


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_prints_its_json_and_draws_its_plot(
    suite: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = BenchOutputs(tmp_path / "a.json", tmp_path / "a.svg", None)
    document = run(suite, model, outputs, capsys)
    assert document["suite"] == suite
    assert document["model"] == model
    assert document["machine"]["threads"] >= 1
    assert set(document["headline"]) == HEADLINES[suite]
    assert document["rows"]
    assert json.loads((tmp_path / "a.json").read_text()) == document
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_prefill_counts_what_each_mode_computes(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run("prefill", model, BenchOutputs(None, None, None), capsys)["rows"]
    computed = {row["mode"]: row["computed_tokens"] for row in rows if row["agents"] == 3}
    assert computed["plain pass"] == computed["floor"]
    assert computed["floor"] < computed["collective"] < computed["pic"] < computed["prefix"]
    assert computed["pic"] == computed["pic-batched"]
    assert computed["prefix"] < computed["none"]


def test_options_of_the_command_line_make_engines(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "decode", "--model", model, "--size", "tiny", "--repeats", "1"]
    app([*command, "--max-num-batched-tokens", "512"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["suite"] == "decode"


def test_storage_counts_shared_parts_once(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run("storage", model, BenchOutputs(None, None, None), capsys)["rows"]
    last = {row["mode"]: row for row in rows if row["round"] == 2}
    assert last["prefix"]["shared_compression"] == 1
    assert last["collective"]["dense_mib"] == last["prefix"]["dense_mib"]
    assert 1 < last["collective"]["shared_compression"] <= 3
    assert last["pic-batched"]["shared_compression"] == 1


def test_leak_counts_what_isolation_computes(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run("leak", model, BenchOutputs(None, None, None), capsys)["rows"]
    of = {row["way"]: row for row in rows}
    assert all(row["trials"] == 8 and 0 < row["p"] <= row["p_holm"] <= 1 for row in rows)
    assert of["exact"]["kl_trial"] == of["exact"]["over_exact"] == 0
    assert of["exact"]["kl"] < 1e-6 < of["isolated"]["kl"]
    computed = {way: row["computed"] for way, row in of.items()}
    # A neutral owner more, so every agent corrects 4 tokens of each of 3 blocks; else all but one.
    assert computed["isolated"] == computed["corrected"] + 4 * 3
    assert computed["uncorrected"] < computed["corrected"] < computed["exact"]


def test_the_test_of_leaks_finds_what_there_is_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(8, size=300)
    scores = rng.normal(size=(300, 8)) + 5 * np.arange(8)  # some are said whatever the secret is
    kinds = np.array(["a", "b"] * 150)
    assert leak.redraw_p_value(leak.log_odds(scores, kinds), labels, 0) > 0.05
    scores[np.arange(300), labels] += 0.4
    odds = leak.log_odds(scores, kinds)
    assert leak.redraw_p_value(odds, labels, 0) < 0.001
    assert odds[np.arange(300), labels].mean() == pytest.approx(0.4 * 7 / 8, abs=0.15)
    assert leak.binomial_tail(0, 10, 0.5) == pytest.approx(1)
    assert leak.binomial_tail(9, 10, 0.5) == pytest.approx(11 / 1024)
    assert leak.holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])


def test_bench_all_writes_a_report(
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("tokendance.commands.bench.SUITES", ("storage", "decode"))
    run_bench(
        None,
        BenchSettings(model, "tiny", repeats=1),
        BenchOutputs(out=tmp_path / "out"),
        Console(),
    )
    report = (tmp_path / "out" / "report.md").read_text()
    assert "## storage" in report
    assert "![decode](decode.svg)" in report
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.md", "storage.json", "storage.svg", "decode.json", "decode.svg",
    }  # fmt: skip
    capsys.readouterr()


def test_without_vllm_its_rows_are_left_out_and_that_is_said(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Environment, "find", lambda _: None)
    run_bench(
        "decode",
        BenchSettings(model, "tiny", repeats=1, against="vllm"),
        BenchOutputs(),
        Console(),
    )
    out = capsys.readouterr().out
    assert "vLLM is left out" in out
    assert "make vllm" in out
    assert json.loads(out.splitlines()[-1])["headline"]["speedup_vs_vllm_32"] is None


@pytest.mark.parametrize(
    ("suite", "outputs"),
    [
        (None, BenchOutputs(None, None, None)),
        (None, BenchOutputs(Path("a.json"), None, Path("out"))),
        ("decode", BenchOutputs(None, None, Path("out"))),
        ("decode", BenchOutputs(Path("no/such/folder/a.json"), None, None)),
    ],
)
def test_outputs_that_do_not_fit_are_refused_before_the_work(
    suite: str | None, outputs: BenchOutputs
) -> None:
    with pytest.raises(ConfigError):
        run_bench(suite, BenchSettings(), outputs, Console())  # type: ignore[arg-type]


def test_what_has_no_effect_on_a_suite_is_refused() -> None:
    for suite, settings in (
        ("attention", BenchSettings(engine=EngineOptions(attention="torch"))),
        ("weights", BenchSettings(engine=EngineOptions(weights="int8"))),
        ("decode", BenchSettings(against="vllm", engine=EngineOptions(device="cuda"))),
        ("storage", BenchSettings(against="vllm")),
        ("storage", BenchSettings(inside="vllm")),
        ("decode", BenchSettings(inside="vllm", against="vllm")),
        ("decode", BenchSettings(inside="vllm", engine=EngineOptions(attention="torch"))),
    ):
        with pytest.raises(ConfigError):
            run_bench(suite, settings, BenchOutputs(), Console())  # type: ignore[arg-type]


def test_runs_in_turn_leave_out_the_warm_up() -> None:
    order: list[str] = []
    values = iter(range(100))

    def kind(name: str) -> Callable[[], float]:
        def call() -> float:
            order.append(name)
            return float(next(values))

        return call

    found = in_turn({"a": kind("a"), "b": kind("b")}, repeats=2)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert found == {"a": [3.0, 4.0], "b": [2.0, 5.0]}
    assert ratio(found["b"], found["a"]) == pytest.approx((2 / 3 + 5 / 4) / 2)


def test_turns_end_in_time_and_one_of_them_counts() -> None:
    assert in_turn({"a": lambda: 1.0}, repeats=5, until_s=0.0) == {"a": [1.0]}
    assert in_turn({"a": lambda: 1.0}, repeats=2, until_s=1e9) == {"a": [1.0, 1.0]}


def test_a_run_between_two_of_its_base() -> None:
    order: list[str] = []
    seconds = {"base": iter([99.0, 1.0, 3.0, 5.0]), "a": iter([8.0]), "b": iter([2.0])}

    def kind(name: str) -> Callable[[], float]:
        def call() -> float:
            order.append(name)
            return next(seconds[name])

        return call

    found, ratios = between({name: kind(name) for name in ("a", "base", "b")}, "base")
    assert order == ["base", "base", "a", "base", "b", "base"]
    assert found == {"base": [1.0, 3.0, 5.0], "a": [8.0], "b": [2.0]}
    assert ratios == {"base": 1.0, "a": 4.0, "b": 0.5}


@pytest.mark.parametrize("limit", [1, 2, 7, 16, 64])
@pytest.mark.parametrize("largest", [0, 1, 2, 3, 5, 16, 63, 64, 200])
def test_the_search_finds_the_largest_size_in_time(largest: int, limit: int) -> None:
    probes: list[int] = []

    def measure(size: int) -> float:
        probes.append(size)
        assert 1 <= size <= limit
        return 1.0 if size <= largest else 3.0

    assert Search(measure, 2.0, limit).largest() == min(largest, limit)
    assert len(set(probes)) <= 14
