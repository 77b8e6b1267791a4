"""Two vLLM servers behind Ray Serve, with TokenDance's router or Ray's own.

    pip install 'tokendance[ray]'
    VLLM_PYTHON=/path/to/python python examples/ray_replicas.py MODEL [--router rounds|default]

Each replica starts `vllm.entrypoints.openai.api_server` with the Python that VLLM_PYTHON names, and
hands requests on to it: Ray and vLLM may have environments of their own. Then, in another shell:

    python examples/replicas.py http://127.0.0.1:8000 http://127.0.0.1:9601 http://127.0.0.1:9602
"""

import argparse
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig
from starlette.requests import Request
from starlette.responses import Response

ROUTERS = {
    "rounds": "tokendance.integrations.ray_router.RoundRouter",
    "default": "ray.serve._private.request_router:PowerOfTwoChoicesRequestRouter",
    "consistent": "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter",
}


@serve.deployment(max_ongoing_requests=100)
class Replica:
    """A vLLM server and the way to it."""

    def __init__(self, python: str, model: str, name: str, arguments: list[str]) -> None:
        self._port = 9601 + serve.get_replica_context().rank.rank
        command = [python, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        command += ["--port", str(self._port), "--served-model-name", name, *arguments]
        self._vllm = subprocess.Popen(command, start_new_session=True)
        url = f"http://127.0.0.1:{self._port}/health"
        while True:
            if self._vllm.poll() is not None:
                raise RuntimeError(f"vLLM ended with status {self._vllm.returncode}.")
            try:
                with urllib.request.urlopen(url, timeout=5):
                    return
            except OSError:
                time.sleep(0.5)

    def _forward(self, path: str, body: bytes) -> tuple[int, bytes]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}{path}", body, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as refusal:
            return refusal.code, refusal.read()

    async def __call__(self, request: Request) -> Response:
        """Hand a request on."""
        import anyio.to_thread

        body = await request.body()
        status, answer = await anyio.to_thread.run_sync(self._forward, request.url.path, body)
        return Response(answer, status, media_type="application/json")

    def __del__(self) -> None:
        if self._vllm.poll() is None:
            os.killpg(self._vllm.pid, signal.SIGTERM)


def main() -> None:
    """Deploy them, and wait."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or name of a model")
    parser.add_argument("--router", choices=ROUTERS, default="rounds")
    parser.add_argument("--name", default="smollm2-135m", help="of the model, for clients")
    options, arguments = parser.parse_known_args()
    settings: Any = {"request_router_class": ROUTERS[options.router]}
    app = Replica.options(  # type: ignore[attr-defined]
        num_replicas=2,
        ray_actor_options={"num_cpus": 0.5},
        request_router_config=RequestRouterConfig(**settings),
    ).bind(os.environ["VLLM_PYTHON"], options.model, options.name, arguments)
    serve.run(app, blocking=True)


if __name__ == "__main__":
    main()
