"""TokenDance inside vLLM: rounds of unmodified clients, computed collectively on a stock install.

    pip install 'tokendance[vllm]'
    TOKENDANCE=1 vllm serve MODEL

vLLM finds `register` as a plug-in (entry point `vllm.general_plugins`) and calls it in each of its
processes. Without TOKENDANCE=1 it does nothing.
"""

import os

SCHEDULER = "tokendance.integrations.vllm.scheduler.make_scheduler"
CPU_WORKER = "tokendance.integrations.vllm.cpu_worker.RoundWorker"
ATTENTION = "tokendance.integrations.vllm.attention.SharedInPlaceBackend"


def register() -> None:
    """Put our scheduler, worker and attention where vLLM looks for its own."""
    if os.environ.get("TOKENDANCE") != "1":
        return
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, ATTENTION)
    if not current_platform.is_cpu():
        return
    # The CPU platform knows one backend only, by this name.
    register_backend(AttentionBackendEnum.CPU_ATTN, ATTENTION)
    platform = type(current_platform)
    if getattr(platform, "tokendance_configures", False):
        return
    check = platform.check_and_update_config

    def check_and_configure(vllm_config: object) -> None:
        check(vllm_config)
        _configure(vllm_config)

    platform.check_and_update_config = staticmethod(check_and_configure)
    platform.tokendance_configures = True


def _configure(vllm_config: object) -> None:
    scheduler, parallel = vllm_config.scheduler_config, vllm_config.parallel_config  # type: ignore[attr-defined]
    if scheduler.scheduler_cls is None:
        scheduler.scheduler_cls = SCHEDULER
    if parallel.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker":
        parallel.worker_cls = CPU_WORKER
