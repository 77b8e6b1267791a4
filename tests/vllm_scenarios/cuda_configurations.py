"""What vLLM and the plug-in choose on an NVIDIA GPU that is not here: run by vLLM's own Python.

    [{"model": FOLDER, "capability": 90, "engine": {...}, "environment": {...}}, ...]

Configurations are vLLM's own, made as a server makes them. The answer is a list; what was chosen,
or in its place the sentence with which TokenDance leaves vLLM as it is.
"""

import json
import os
import sys
from typing import Any

sys.path.append(os.path.dirname(__file__))
import stand_ins

if __name__ == "__main__":  # before vLLM looks for it
    stand_ins.triton_driver()

from vllm import EngineArgs
from vllm.config import set_current_vllm_config
from vllm.plugins import load_general_plugins
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.selector import _cached_get_attn_backend, get_attn_backend
from vllm.v1.worker.gpu_worker import Worker

import tokendance.integrations.vllm as plugin
from tokendance.integrations.vllm import cuda_attention

MEMORY = 2**33
"""Bytes that vLLM would find for KV."""


class Said:
    """Stands in for the plug-in's logger: vLLM takes away handlers whenever it has options."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def warning(self, text: str, *values: object) -> None:
        self.lines.append(text % values)

    info = warning


def chosen(
    said: Said, model: str, capability: int, engine: dict[str, Any], environment: dict[str, str]
) -> dict[str, Any]:
    stand_ins.capability = capability
    said.lines.clear()
    plugin._SAID.clear()  # a process has one configuration otherwise
    os.environ.update(environment)
    config = EngineArgs(model=model, skip_tokenizer_init=True, **engine).create_engine_config()
    for name in environment:
        del os.environ[name]
    compilation, scheduler = config.compilation_config, config.scheduler_config
    answer: dict[str, Any] = {
        "said": list(said.lines),
        "scheduler": scheduler.scheduler_cls,
        "worker": config.parallel_config.worker_cls,
        "graphs": compilation.cudagraph_mode.name,
        "splits_at_attention": compilation.splitting_ops_contain_attention(),
        "compiles": compilation.mode.name,
        "prefix_caching": config.cache_config.enable_prefix_caching,
        "chunked_prefill": scheduler.enable_chunked_prefill,
        "asynchronous": scheduler.async_scheduling,
    }
    if answer["scheduler"] is not None:
        worker_class = resolve_obj_by_qualname(answer["worker"])  # registers what attends, too
        worker = object.__new__(worker_class)
        worker.vllm_config, worker.cache_config = config, config.cache_config
        answer["memory"] = worker.determine_available_memory()
        answer["max_tokens"] = scheduler.max_num_batched_tokens
        _cached_get_attn_backend.cache_clear()
        with set_current_vllm_config(config):
            backend = get_attn_backend(
                config.model_config.get_head_size(), config.model_config.dtype, "auto"
            )
        answer["is_ours"] = backend is cuda_attention.RoundAttentionBackend
        support = backend.get_builder_cls().get_cudagraph_support(config, None)
        answer["graphs_of_attention"] = support.name
    return answer


def main() -> None:
    stand_ins.cuda_platform()
    Worker.determine_available_memory = lambda _: MEMORY
    jobs = json.loads(sys.stdin.readline())
    load_general_plugins()
    said = Said()
    plugin.log = said  # type: ignore[assignment]
    print("\n" + json.dumps([chosen(said, **job) for job in jobs]), flush=True)


if __name__ == "__main__":
    main()
