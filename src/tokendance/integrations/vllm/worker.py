"""What our workers do beside vLLM's, on whatever device."""

from typing import Any

from tokendance.integrations.vllm.check import check_round


class RoundWorkerMixin:
    """Installs the V2 runner's state before the model is loaded, and checks a tiny round at last.

    A base before one of vLLM's workers.
    """

    use_v2_model_runner: bool

    def init_device(self) -> None:
        """Make the runner; see vLLM's."""
        if self.use_v2_model_runner:
            from tokendance.integrations.vllm import model_state

            model_state.install()
        super().init_device()  # type: ignore[misc]

    def compile_or_warm_up_model(self) -> Any:
        """Warm up, and refuse to go on if a round is not computed as it has to be; see vLLM's."""
        times = super().compile_or_warm_up_model()  # type: ignore[misc]
        check_round(self)
        return times
