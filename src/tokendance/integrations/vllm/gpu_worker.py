"""vLLM's GPU worker with rounds, for the V2 model runner."""

from vllm.v1.worker.gpu_worker import Worker

from tokendance.integrations.vllm.worker import RoundWorkerMixin


class RoundWorker(RoundWorkerMixin, Worker):  # type: ignore[misc]
    """The worker; the plug-in registers the attention backend."""
