"""TokenDance inside vLLM: rounds of unmodified clients, computed collectively on a stock install.

    pip install 'tokendance[vllm]'
    TOKENDANCE=1 vllm serve MODEL

vLLM finds `register` as a plug-in (entry point `vllm.general_plugins`) and calls it in each of its
processes. Without TOKENDANCE=1 it does nothing.
"""

import logging
import multiprocessing
import os
from typing import Any

log = logging.getLogger("vllm.tokendance")  # below vllm's, so that it is shown as vllm's are

_SAID: set[str] = set()
SCHEDULER = "tokendance.integrations.vllm.scheduler.make_scheduler"
CPU_WORKER = "tokendance.integrations.vllm.cpu_worker.RoundWorker"
CUDA_WORKER = "tokendance.integrations.vllm.gpu_worker.RoundWorker"


def register() -> None:
    """Put our scheduler, worker and attention where vLLM looks for its own, if asked to.

    Raises:
        ConfigError: for a version of vLLM that was not tested.
    """
    if os.environ.get("TOKENDANCE") != "1":
        return
    import vllm
    from vllm.platforms import current_platform

    from tokendance.integrations.vllm.support import check_version

    check_version(vllm.__version__)
    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        log.warning("TokenDance inside vLLM serves CPUs and NVIDIA GPUs: vLLM runs as it is.")
        return
    platform = type(current_platform)
    if getattr(platform, "has_tokendance", False):
        return
    check = platform.check_and_update_config

    def check_and_configure(vllm_config: Any) -> None:
        check(vllm_config)
        _configure(vllm_config)

    platform.check_and_update_config = staticmethod(check_and_configure)
    from tokendance.integrations.vllm.metrics import install

    install()
    platform.has_tokendance = True


def _configure(vllm_config: Any) -> None:
    """Choose our scheduler, worker and attention for a configuration that can be served."""
    from vllm.platforms import current_platform

    from tokendance.integrations.vllm.support import why_not

    if (reason := why_not(vllm_config, current_platform)) is not None:
        _say_once(f"vLLM runs without TokenDance: {reason}.")
        return
    vllm_config.scheduler_config.scheduler_cls = SCHEDULER
    if current_platform.is_cuda():
        vllm_config.parallel_config.worker_cls = CUDA_WORKER
        _choose_attention(vllm_config)
    else:
        vllm_config.parallel_config.worker_cls = CPU_WORKER


def _say_once(text: str) -> None:
    """Warn, in the process that the user has started; vLLM checks a configuration in each."""
    if multiprocessing.parent_process() is None and text not in _SAID:
        _SAID.add(text)
        log.warning(text)


def _choose_attention(vllm_config: Any) -> None:
    """Have GPUs attend by ours, outside of CUDA graphs."""
    from vllm.config import CUDAGraphMode
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    vllm_config.attention_config.backend = AttentionBackendEnum.CUSTOM
    compilation = vllm_config.compilation_config
    if compilation.cudagraph_mode.has_full_cudagraphs():
        log.info(
            "CUDA graphs are PIECEWISE in place of %s: mirrors attend otherwise in each step.",
            compilation.cudagraph_mode.name,
        )
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
