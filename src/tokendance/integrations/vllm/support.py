"""Which of vLLM's versions and configurations TokenDance serves.

A version that was not tested is refused. A configuration that does not fit runs as plain vLLM, and
says why.
"""

import os
from typing import Any

import torch

from tokendance.errors import ConfigError
from tokendance.integrations.vllm import CUDA_WORKER

TESTED_VERSIONS = ("0.32.",)
ANY_VERSION = "TOKENDANCE_ANY_VERSION"
_ROPE_TYPES = ("default", "llama3")


def check_version(version: str) -> None:
    """Refuse versions of vLLM that were not tested, unless the user wants to try.

    Raises:
        ConfigError: for such a version.
    """
    if version.startswith(TESTED_VERSIONS) or os.environ.get(ANY_VERSION) == "1":
        return
    tested = " and ".join(name + "x" for name in TESTED_VERSIONS)
    raise ConfigError(
        f"TokenDance was tested inside vLLM {tested}, and this is {version}. "
        f"Set {ANY_VERSION}=1 to try it, or start vLLM without TOKENDANCE=1."
    )


def why_not(config: Any, platform: Any = None) -> str | None:
    """Why a configuration runs as plain vLLM, as the end of a sentence; None if it is served.

    Args:
        config: a `vllm.config.VllmConfig`, complete.
        platform: `vllm.platforms.current_platform`; None for a CPU.
    """
    model, parallel = config.model_config, config.parallel_config
    if model is None or model.runner_type != "generate":
        return "the model does not generate"
    text = model.hf_text_config
    rope = getattr(text, "rope_parameters", None) or {}
    layers = set(getattr(text, "layer_types", None) or ())
    reasons = {
        "the model attends in compressed form (MLA)": model.use_mla,
        "the model has layers of several kinds": model.is_hybrid or len(layers) > 1,
        "the model has attention windows": bool(getattr(text, "sliding_window", None)),
        "the model reads more than text": model.is_multimodal_model,
        "the model does not rotate its keys (RoPE)": not rope,
        "the model rotates in another way": rope.get("rope_type", "default") not in _ROPE_TYPES,
        "the model writes by diffusion": config.diffusion_config is not None,
        "the model caps its logits": bool(getattr(text, "attn_logit_softcapping", None)),
        "KV has a dtype of its own": config.cache_config.cache_dtype != "auto",
        "KV goes elsewhere": config.kv_transfer_config is not None,
        "others are told of KV (KV events)": (
            config.kv_events_config is not None and config.kv_events_config.enable_kv_cache_events
        ),
        "KV of one context is on several devices": (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1
        ),
        "batches are halved (DBO)": parallel.enable_dbo,
        "KV is copied in memory (HiSparse)": config.attention_config.hisparse_config is not None,
        "layers share KV": config.cache_config.kv_sharing_fast_prefill,
        "tokens are drafted otherwise than by n-grams": not _drafts_are_known(config),
    }
    if platform is not None and platform.is_cuda():
        reasons |= _reasons_on_cuda(config, platform)
    return next((reason for reason, is_so in reasons.items() if is_so), None)


def _reasons_on_cuda(config: Any, platform: Any) -> dict[str, bool]:
    """What may be in the way on NVIDIA GPUs alone, and whether it is."""
    try:
        from tokendance.attention.triton_backend import can_serve
    except ImportError as error:
        return {f"Triton cannot be used ({error})": True}
    model, attention = config.model_config, config.attention_config
    head_size, chosen = model.get_head_size(), attention.backend
    is_flash = chosen is not None and chosen.name == "FLASH_ATTN"
    # vLLM checks a configuration again where it is copied: the first time has made it ours.
    worker = config.parallel_config.worker_cls
    is_ours = worker == CUDA_WORKER and chosen is not None and chosen.name == "CUSTOM"
    return {
        "the GPU's compute capability is below 8.0": not platform.has_device_capability(80),
        f"there is no kernel for heads of {head_size} in {model.dtype}": not (
            model.dtype in (torch.bfloat16, torch.float16) and can_serve(head_size, model.dtype)
        ),
        "another attention backend than FLASH_ATTN was asked for": (
            bool(attention.backend_per_kind) or not (chosen is None or is_ours or is_flash)
        ),
        "vLLM attends by FlashInfer here (--attention-backend FLASH_ATTN serves rounds)": (
            chosen is None and platform.is_device_capability_family(100)
        ),
        "results must not depend on their batch (VLLM_BATCH_INVARIANT)": (
            os.environ.get("VLLM_BATCH_INVARIANT", "0") != "0"
        ),
        "another worker was asked for": worker
        not in ("vllm.v1.worker.gpu_worker.Worker", CUDA_WORKER),
        "the V1 model runner is used": not config.use_v2_model_runner,
    }


def _drafts_are_known(config: Any) -> bool:
    """Whether the scheduler knows how many drafts were accepted before it plans the next step.

    Otherwise the device alone has the true lengths of a step's contexts. The V2 runner never says.
    """
    drafts = config.speculative_config
    if drafts is None:
        return True
    is_async = config.scheduler_config.async_scheduling
    return drafts.method == "ngram" and not is_async and not config.use_v2_model_runner
