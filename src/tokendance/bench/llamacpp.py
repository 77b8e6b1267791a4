"""Drives llama.cpp by its library, in an environment of its own.

    with LlamaCpp(checkpoint) as llama:
        with llama.open(Mode("bf16"), sequences=10, tokens=4096) as context:
            context.prefill(prompts, cached=300)  # of each prompt, before the clock starts
            print(context.step())                 # seconds of a token for each

See `bench/worker.py` for its process; what runs in it is `llamacpp_engine.py`. It gets the token
ids that our engine gets, and the weights of the same checkpoint.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch

from tokendance.bench.worker import WORKER_MAIN, Environment, Worker, inherited_variables

LLAMACPP_ENVIRONMENT = Environment(
    "llama.cpp", "TOKENDANCE_LLAMACPP_PYTHON", ".venv-llamacpp", "llamacpp"
)
SCRIPTS = (WORKER_MAIN, Path(__file__).with_name("llamacpp_engine.py"))

Weights = Literal["bf16", "q4_0"]


@dataclass(frozen=True, slots=True)
class Mode:
    """How a user of llama.cpp may have it.

    Attributes:
        weights: in bfloat16, or as its own tool quantizes them to 4 bits.
        in_front: what all read is moved to the front of each prompt, which makes it another
            prompt, and lies once in memory. Else each sequence has its prompt for itself.
    """

    weights: Weights
    in_front: bool = False

    def __str__(self) -> str:
        return f"llama.cpp {self.weights.upper()}{', shared in front' if self.in_front else ''}"


MODES = (Mode("bf16"), Mode("q4_0"), Mode("bf16", in_front=True), Mode("q4_0", in_front=True))


@dataclass(frozen=True, slots=True)
class Prefilled:
    """What a prefill gave."""

    seconds: float
    computed_tokens: int  # within these seconds
    token_ids: tuple[int, ...]  # the first of each answer


class LlamaCpp:
    """llama.cpp in a process of its own. Close it, or use it as a context manager.

    Args:
        model: folder of the checkpoint, of Llama's architecture.
        threads: of one pass; by default as many as our own engine takes.
        python: of the environment that has it; by default what `LLAMACPP_ENVIRONMENT` finds.
        scripts: what that Python runs; it speaks the protocol of `llamacpp_engine.py`.
        start_timeout_s: seconds that it may take to convert the weights.

    Attributes:
        settings: what a reader of figures must know.
        weight_bytes: of its files.

    Raises:
        BaselineError: There is no llama.cpp, or it does not take the model.
    """

    def __init__(
        self,
        model: Path,
        threads: int | None = None,
        *,
        python: Path | None = None,
        scripts: Sequence[Path] = SCRIPTS,
        start_timeout_s: float = 600.0,
    ) -> None:
        python = python or LLAMACPP_ENVIRONMENT.require()
        threads = threads or torch.get_num_threads()
        self._num_opened = 0
        self._files = tempfile.TemporaryDirectory(prefix="tokendance-gguf-")
        try:
            self._worker = Worker(LLAMACPP_ENVIRONMENT, python, scripts, inherited_variables())
            request = {
                "op": "start", "model": str(model), "files": self._files.name, "threads": threads,
            }  # fmt: skip
            started = self.ask(request, start_timeout_s)
        except BaseException:
            self._files.cleanup()
            raise
        self.weight_bytes: dict[str, int] = started["bytes"]
        self.settings = (
            f"llama.cpp of llama-cpp-python {started['version']}: {threads} threads, keys and "
            "values in float16, its defaults else. Where the shared text is in front, all "
            "sequences lie in one buffer."
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self, mode: Mode, sequences: int, tokens: int) -> "Context":
        """Make a context for so many sequences, each with room for so many tokens.

        Raises:
            BaselineError: it failed, died or hung; it is closed then.
        """
        self._num_opened += 1
        return Context(self, mode, str(self._num_opened), sequences, tokens)

    def ask(self, request: dict[str, object], timeout_s: float) -> dict[str, Any]:
        """Send one request and wait for its reply; see `Worker.ask`."""
        return self._worker.ask(request, timeout_s)

    def close(self) -> None:
        """End the process, and remove its files; may come again."""
        self._worker.close()
        self._files.cleanup()


class Context:
    """Sequences of llama.cpp that are computed together; see `LlamaCpp.open`.

    Attributes:
        kv_bytes: of the keys and values of one token.
    """

    def __init__(
        self, engine: LlamaCpp, mode: Mode, name: str, sequences: int, tokens: int
    ) -> None:
        self._engine = engine
        self._name = name
        reply = engine.ask(
            {
                "op": "open",
                "name": name,
                "weights": mode.weights,
                "one_buffer": mode.in_front,
                "sequences": sequences,
                "tokens": tokens,
            },
            600.0,
        )
        self.kv_bytes: int = reply["kv_bytes"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error the engine is closed, or about to be, and the error is what is told.
        if kind is None:
            self._engine.ask({"op": "close", "name": self._name}, 60.0)

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        cached: Sequence[int] | None = None,
        in_front: int = 0,
        timeout_s: float = 3600.0,
    ) -> Prefilled:
        """Compute prompts, and the first token of each answer. What was there before is forgotten.

        Args:
            prompts: token ids, at most as many prompts as there are sequences.
            cached: so many tokens of each prompt are computed before the clock starts.
            in_front: so many tokens, which all prompts begin with, are computed once.
            timeout_s: seconds after which llama.cpp is taken to hang.

        Raises:
            BaselineError: it failed, died or hung; it is closed then.
        """
        reply = self._engine.ask(
            {
                "op": "prefill",
                "name": self._name,
                "prompts": [[int(token) for token in prompt] for prompt in prompts],
                "cached": list(cached or [0] * len(prompts)),
                "in_front": in_front,
            },
            timeout_s,
        )
        return Prefilled(reply["seconds"], reply["computed_tokens"], tuple(reply["token_ids"]))

    def step(self) -> tuple[float, list[int]]:
        """Decode one token of each sequence; return the seconds, and the tokens.

        Raises:
            BaselineError: it failed, died or hung; it is closed then.
        """
        reply = self._engine.ask({"op": "step", "name": self._name}, 600.0)
        return reply["seconds"], reply["token_ids"]
