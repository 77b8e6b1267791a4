"""llama.cpp, as `worker_main.py` starts it where llama-cpp-python and gguf are.

It answers to `bench/llamacpp.py`. Each request is one line, and so is its reply:

    {"op": "start", "model": FOLDER,             {"version": "0.3.36", "bytes": {"bf16": 270000000,
     "files": FOLDER, "threads": 2}                "q4_0": 92000000}}
    {"op": "open", "name": "a", "weights":       {"kv_bytes": 23040}
     "bf16", "sequences": 2, "tokens": 2048,
     "one_buffer": false}
    {"op": "prefill", "name": "a", "prompts":    {"seconds": 1.5, "computed_tokens": 2,
     [[1, 2], ...], "cached": [1, ...],           "token_ids": [3, ...]}
     "in_front": 0}
    {"op": "step", "name": "a"}                  {"seconds": 0.01, "token_ids": [3, ...]}
    {"op": "close", "name": "a"}                 {}

`start` converts the checkpoint in FOLDER, which has to be of Llama's architecture, to GGUF files
without a tokenizer. `open` makes a context with room for so many tokens in each sequence; with
`one_buffer` all sequences lie in one, so that a copy of a beginning is no second one in memory.
`prefill` forgets what was there. Of each prompt so many tokens as `cached` says are computed before
the clock starts, and the first `in_front` tokens, the same in all, are computed once and copied.
`step` takes each prompt one token further, the likeliest one. `kv_bytes` are those of a token in
all layers.
"""

import ctypes
import importlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# By their names, since type checkers do not find them in the environment that they run in.
llama: Any = importlib.import_module("llama_cpp")
gguf: Any = importlib.import_module("gguf")

# What llama.cpp computes at once, by its own defaults.
_BATCH_TOKENS = 2048

Ids = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


def convert(folder: Path, target: Path) -> None:
    """Write a checkpoint of Llama's architecture as a GGUF file in bfloat16, without tokenizer.

    Names and keys are those of llama.cpp's own `convert_hf_to_gguf.py`.

    Raises:
        ValueError: The model is of another architecture, or has what is not converted here.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    biases = config.get("attention_bias") or config.get("mlp_bias")
    if config.get("model_type") != "llama" or biases:
        raise ValueError(f"only models of Llama's architecture are converted, not {folder}")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"positions of the kind {kind!r} are not converted")
    writer = gguf.GGUFWriter(str(target), "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope.get("rope_theta") or config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for file in sorted(folder.glob("*.safetensors")):
        for name, values in _tensors(file):
            if name.endswith("q_proj.weight"):
                values = _in_pairs(values, heads)
            elif name.endswith("k_proj.weight"):
                values = _in_pairs(values, kv_heads)
            matrix = values.ndim > 1
            kind = gguf.GGMLQuantizationType.BF16 if matrix else gguf.GGMLQuantizationType.F32
            writer.add_tensor(
                names.get_name(name, try_suffixes=(".weight",)),
                gguf.quants.quantize(values, kind),
                raw_dtype=kind,
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(file: Path) -> Iterator[tuple[str, Floats]]:
    """Names and values, float32, of a file: a length in 8 bytes, so long a header, the numbers.

    Raises:
        ValueError: They are of a dtype that is not read here.
    """
    data = np.memmap(file, np.uint8, "r")
    begin = 8 + int(data[:8].view("<u8")[0])
    header = json.loads(data[8:begin].tobytes())
    for name, about in header.items():
        if name == "__metadata__":
            continue
        first, last = about["data_offsets"]
        raw = data[begin + first : begin + last]
        match about["dtype"]:
            case "BF16":  # the upper half of a float32
                values = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
            case "F16" | "F32" as dtype:
                values = raw.view(f"<{dtype[0].lower()}{int(dtype[1:]) // 8}").astype(np.float32)
            case dtype:
                raise ValueError(f"{name} is of dtype {dtype}")
        yield name, values.reshape(about["shape"])


def _in_pairs(weights: Floats, heads: int) -> Floats:
    """Order the rows of each head as llama.cpp rotates them: neighbours, not halves."""
    halves = weights.reshape(heads, 2, -1, weights.shape[-1])
    return halves.swapaxes(1, 2).reshape(weights.shape)


class _Engine:
    """Weights in files, loaded when a context first asks for them, and the contexts."""

    def __init__(self, request: dict[str, Any]) -> None:
        llama.llama_backend_init()
        self._threads = int(request["threads"])
        files = Path(request["files"])
        self._paths = {kind: files / f"{kind}.gguf" for kind in ("bf16", "q4_0")}
        convert(Path(request["model"]), self._paths["bf16"])
        params = llama.llama_model_quantize_default_params()
        params.ftype = llama.LLAMA_FTYPE_MOSTLY_Q4_0
        params.nthread = self._threads
        source, target = (os.fsencode(self._paths[kind]) for kind in ("bf16", "q4_0"))
        if llama.llama_model_quantize(source, target, ctypes.byref(params)) != 0:
            raise RuntimeError("llama.cpp did not quantize the model")
        self._models: dict[str, Any] = {}
        self._contexts: dict[str, _Context] = {}

    def started(self) -> dict[str, Any]:
        sizes = {kind: path.stat().st_size for kind, path in self._paths.items()}
        return {"version": llama.__version__, "bytes": sizes}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        name = request["name"]
        match request["op"]:
            case "open":
                context = _Context(self._model(request["weights"]), self._threads, request)
                self._contexts[name] = context
                return {"kv_bytes": context.kv_bytes}
            case "prefill":
                return self._contexts[name].prefill(
                    [np.array(prompt, np.int32) for prompt in request["prompts"]],
                    request["cached"],
                    request["in_front"],
                )
            case "step":
                return self._contexts[name].step()
            case "close":
                self._contexts.pop(name).close()
                return {}
            case operation:
                raise ValueError(f"there is no operation {operation!r}")

    def _model(self, weights: str) -> Any:
        if weights not in self._models:
            params = llama.llama_model_default_params()
            model = llama.llama_model_load_from_file(os.fsencode(self._paths[weights]), params)
            if not model:
                raise RuntimeError("llama.cpp did not load the model")
            self._models[weights] = model
        return self._models[weights]


class _Context:
    """KV of some sequences, and how far each has come."""

    def __init__(self, model: Any, threads: int, request: dict[str, Any]) -> None:
        sequences, tokens = request["sequences"], request["tokens"]
        params = llama.llama_context_default_params()
        params.n_seq_max = sequences
        params.kv_unified = request["one_buffer"]
        params.n_ctx = sequences * tokens
        params.n_batch = _BATCH_TOKENS
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        self._context = llama.llama_init_from_model(model, params)
        if not self._context:
            raise RuntimeError("llama.cpp did not make a context")
        self._vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        self._batch = llama.llama_batch_init(_BATCH_TOKENS, 0, 1)
        self._lengths: list[int] = []
        self._last: list[int] = []
        layers, kv_heads = llama.llama_model_n_layer(model), llama.llama_model_n_head_kv(model)
        head_dim = llama.llama_model_n_embd(model) // llama.llama_model_n_head(model)
        # By default keys and values are of 16 bits.
        self.kv_bytes = 2 * 2 * layers * kv_heads * head_dim

    def close(self) -> None:
        llama.llama_batch_free(self._batch)
        llama.llama_free(self._context)

    def prefill(self, prompts: list[Ids], cached: list[int], in_front: int) -> dict[str, Any]:
        memory = llama.llama_get_memory(self._context)
        llama.llama_memory_clear(memory, True)
        for sequence, (prompt, length) in enumerate(zip(prompts, cached, strict=True)):
            self._compute([(sequence, 0, prompt[:length])])
        start = time.perf_counter()
        computed = 0
        if in_front:
            computed += self._compute([(0, 0, prompts[0][:in_front])])
            for sequence in range(1, len(prompts)):
                llama.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
        starts = [max(length, in_front) for length in cached]
        parts = [(sequence, at, prompts[sequence][at:]) for sequence, at in enumerate(starts)]
        computed += self._compute(parts, answers=True)
        seconds = time.perf_counter() - start
        self._lengths = [len(prompt) for prompt in prompts]
        return {"seconds": seconds, "computed_tokens": computed, "token_ids": self._last}

    def step(self) -> dict[str, Any]:
        start = time.perf_counter()
        self._compute(
            [
                (sequence, length, np.array([token], np.int32))
                for sequence, (length, token) in enumerate(
                    zip(self._lengths, self._last, strict=True)
                )
            ],
            answers=True,
        )
        seconds = time.perf_counter() - start
        self._lengths = [length + 1 for length in self._lengths]
        return {"seconds": seconds, "token_ids": self._last}

    def _compute(self, parts: list[tuple[int, int, Ids]], *, answers: bool = False) -> int:
        """Compute tokens of sequences, from a position on each; return how many.

        With `answers`, take the likeliest token behind each part.
        """
        answered: dict[int, int] = {}
        ends: list[tuple[int, int]] = []  # of parts that end in this batch: place, sequence
        batch = self._batch
        batch.n_tokens = 0
        total = 0
        for sequence, begin, tokens in parts:
            for index, token in enumerate(tokens.tolist()):
                place = batch.n_tokens
                batch.token[place] = token
                batch.pos[place] = begin + index
                batch.n_seq_id[place] = 1
                batch.seq_id[place][0] = sequence
                batch.logits[place] = is_last = answers and index == len(tokens) - 1
                if is_last:
                    ends.append((place, sequence))
                batch.n_tokens += 1
                total += 1
                if batch.n_tokens == _BATCH_TOKENS:
                    answered |= self._decode(ends)
                    ends = []
        if batch.n_tokens:
            answered |= self._decode(ends)
        if answers:
            self._last = [answered[sequence] for sequence, _, _ in parts]
        return total

    def _decode(self, ends: list[tuple[int, int]]) -> dict[int, int]:
        if (status := llama.llama_decode(self._context, self._batch)) != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        self._batch.n_tokens = 0
        answered = {}
        for place, sequence in ends:
            pointer = llama.llama_get_logits_ith(self._context, place)
            logits = np.ctypeslib.as_array(pointer, (self._vocabulary,))
            answered[sequence] = int(logits.argmax())
        llama.llama_synchronize(self._context)
        return answered


def start(request: dict[str, Any]) -> tuple[_Engine, dict[str, Any]]:
    """Convert the weights, and return the engine with what is replied."""
    engine = _Engine(request)
    return engine, engine.started()
