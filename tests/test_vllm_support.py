"""Which versions and configurations TokenDance serves inside vLLM, without vLLM."""

from collections.abc import Callable
from types import SimpleNamespace as Some
from typing import Any

import pytest

from tokendance.errors import ConfigError
from tokendance.integrations.vllm.support import ANY_VERSION, check_version, why_not


def config() -> Any:
    """A configuration that fits."""
    return Some(
        model_config=Some(
            runner_type="generate",
            hf_text_config=Some(
                rope_parameters={"rope_type": "llama3"}, layer_types=["full_attention"] * 2
            ),
            use_mla=False,
            is_hybrid=False,
            is_multimodal_model=False,
        ),
        cache_config=Some(cache_dtype="auto", kv_sharing_fast_prefill=False),
        kv_transfer_config=None,
        kv_events_config=Some(enable_kv_cache_events=False),
        diffusion_config=None,
        parallel_config=Some(
            decode_context_parallel_size=1, prefill_context_parallel_size=1, enable_dbo=False
        ),
        attention_config=Some(hisparse_config=None),
        speculative_config=None,
        scheduler_config=Some(async_scheduling=False),
        use_v2_model_runner=False,
    )


def drafts(config: Any, method: str) -> None:
    config.speculative_config = Some(method=method)


def test_what_fits_is_served() -> None:
    fitting = config()
    assert why_not(fitting) is None
    drafts(fitting, "ngram")
    assert why_not(fitting) is None
    fitting.speculative_config = None
    fitting.scheduler_config.async_scheduling = fitting.use_v2_model_runner = True
    fitting.model_config.hf_text_config.rope_parameters["rope_type"] = "default"
    assert why_not(fitting) is None


def drafts_ahead(config: Any) -> None:
    drafts(config, "ngram")
    config.scheduler_config.async_scheduling = True


def drafts_on_v2(config: Any) -> None:
    drafts(config, "ngram")
    config.use_v2_model_runner = True


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: setattr(c, "model_config", None), "does not generate"),
        (lambda c: setattr(c.model_config, "runner_type", "pooling"), "does not generate"),
        (lambda c: setattr(c.model_config, "use_mla", True), "MLA"),
        (lambda c: setattr(c.model_config, "is_hybrid", True), "several kinds"),
        (
            lambda c: c.model_config.hf_text_config.layer_types.append("sliding_attention"),
            "several kinds",
        ),
        (lambda c: setattr(c.model_config.hf_text_config, "sliding_window", 512), "windows"),
        (lambda c: setattr(c.model_config, "is_multimodal_model", True), "more than text"),
        (
            lambda c: c.model_config.hf_text_config.rope_parameters.update(rope_type="yarn"),
            "rotates in another way",
        ),
        (
            lambda c: setattr(c.model_config.hf_text_config, "attn_logit_softcapping", 50.0),
            "caps its logits",
        ),
        (lambda c: setattr(c.cache_config, "cache_dtype", "fp8"), "dtype of its own"),
        (lambda c: setattr(c, "kv_transfer_config", Some()), "KV goes elsewhere"),
        (
            lambda c: setattr(c, "kv_events_config", Some(enable_kv_cache_events=True)),
            "KV events",
        ),
        (lambda c: setattr(c, "diffusion_config", Some()), "diffusion"),
        (lambda c: setattr(c.model_config, "hf_text_config", Some()), "RoPE"),
        (
            lambda c: setattr(c.parallel_config, "decode_context_parallel_size", 2),
            "several devices",
        ),
        (
            lambda c: setattr(c.parallel_config, "prefill_context_parallel_size", 2),
            "several devices",
        ),
        (lambda c: setattr(c.parallel_config, "enable_dbo", True), "DBO"),
        (lambda c: setattr(c.attention_config, "hisparse_config", Some()), "HiSparse"),
        (lambda c: setattr(c.cache_config, "kv_sharing_fast_prefill", True), "layers share KV"),
        (lambda c: drafts(c, "eagle"), "drafted"),
        (drafts_ahead, "drafted"),
        (drafts_on_v2, "drafted"),
    ],
)
def test_what_does_not_fit_says_why(change: Callable[[Any], None], reason: str) -> None:
    changed = config()
    change(changed)
    assert reason in (why_not(changed) or "")


def test_versions_that_were_not_tested_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ANY_VERSION, raising=False)
    check_version("0.32.0")
    check_version("0.32.5+cpu")
    for version in ("0.31.9", "0.33.0", "0.320.1", "1.0"):
        with pytest.raises(ConfigError, match=rf"this is {version}.*{ANY_VERSION}=1"):
            check_version(version)
    monkeypatch.setenv(ANY_VERSION, "1")
    check_version("0.33.0")
