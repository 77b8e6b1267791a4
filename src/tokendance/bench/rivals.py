"""Other engines in the suites: vLLM and llama.cpp, started where a user asks for them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

from tokendance.bench.llamacpp import LLAMACPP_ENVIRONMENT, MODES, LlamaCpp, Mode
from tokendance.bench.settings import BenchSettings, Rival
from tokendance.bench.vllm import VLLM, VLLM_ENVIRONMENT, VLLMConfig, VLLMResult
from tokendance.bench.worker import Environment
from tokendance.bench.workload import RoundWorkload
from tokendance.llm import LLM
from tokendance.models.loader import LoadedModel, checkpoint_source
from tokendance.rounds.segments import EncodedPrompt

if TYPE_CHECKING:
    from rich.console import Console


def vllm_round(
    vllm: VLLM,
    llm: LLM,
    workload: RoundWorkload,
    num_tokens: int,
    *,
    tagged: bool = False,
    together: bool = False,
) -> VLLMResult:
    """Run a round that `llm` encodes through vLLM, with the private parts in its prefix cache.

    `tagged`: TokenDance inside is told the blocks. `together`: see `warm_vllm`.
    """
    encoded = workload.encoded(llm)
    warm_vllm(vllm, encoded, together=together)
    blocks = [places_of_blocks(prompt) for prompt in encoded] if tagged else None
    return vllm.run([prompt.token_ids.tolist() for prompt in encoded], num_tokens, blocks=blocks)


def warm_vllm(vllm: VLLM, prompts: Sequence[EncodedPrompt], *, together: bool = False) -> None:
    """Leave vLLM with the first segment of each prompt in its prefix cache, and nothing else.

    As in `RoundWorkload.warm` each is computed by itself: that no block is shared is said. Or
    `together`, as the first requests of agents come: what these texts have in common is then found,
    and read from one of them.
    """
    vllm.reset()
    beginnings = [prompt.segments[0].token_ids.tolist() for prompt in prompts]
    vllm.run(beginnings, 1, blocks=None if together else [[] for _ in beginnings])


def places_of_blocks(prompt: EncodedPrompt) -> list[int]:
    """Positions begin, end, begin, end, ... of a prompt's shared segments."""
    return [
        place
        for begin, segment in prompt.shared_segments()
        for place in (begin, begin + len(segment))
    ]


@contextmanager
def started_vllm(
    settings: BenchSettings,
    console: "Console",
    model: LoadedModel,
    notes: list[str],
    *,
    max_context: int,
    num_tokens: int,
) -> Iterator[VLLM | None]:
    """Start vLLM if the user asks for it and it is installed; say so where it is not.

    Its settings are added to `notes`. It has room for `num_tokens` tokens of KV, and for
    `max_context` in a prompt with its answer.
    """
    if not _is_wanted("vllm", VLLM_ENVIRONMENT, settings, console):
        yield None
        return
    kv_bytes = num_tokens * model.shape.kv_bytes_per_token(torch.bfloat16)
    config = VLLMConfig(max_context=max_context, kv_bytes=kv_bytes)
    with console.status("Starting vLLM (it compiles the model: about two minutes) ..."):
        vllm = VLLM(Path(checkpoint_source(settings.model)), config)
    with vllm:
        notes.append(vllm.settings)
        yield vllm


@contextmanager
def started_llamacpp(
    settings: BenchSettings, console: "Console", notes: list[str]
) -> Iterator[LlamaCpp | None]:
    """Start llama.cpp if the user asks for it and it is installed; see `started_vllm`."""
    if not _is_wanted("llamacpp", LLAMACPP_ENVIRONMENT, settings, console):
        yield None
        return
    with console.status("Starting llama.cpp (it converts the model) ..."):
        llama = LlamaCpp(Path(checkpoint_source(settings.model)))
    with llama:
        notes.append(llama.settings)
        yield llama


def _is_wanted(
    rival: Rival, environment: Environment, settings: BenchSettings, console: "Console"
) -> bool:
    """Whether the user asks for an engine that is installed; say so where it is not."""
    if settings.against != rival:
        return False
    if environment.find() is None:
        console.print(
            f"{environment.engine} is left out: it is not installed. {environment.how_to_install}"
        )
        return False
    return True


def least_over_modes(times: Mapping[str, float]) -> dict[str, float]:
    """Of llama.cpp's fastest mode, as it is and with the shared text in front, where measured.

    `times` has, by mode, how many times as long as ours it took.
    """
    found: dict[str, list[float]] = {}
    for mode in MODES:
        if str(mode) in times:
            name = "llamacpp_in_front" if mode.in_front else "llamacpp"
            found.setdefault(name, []).append(times[str(mode)])
    return {name: min(of_modes) for name, of_modes in found.items()}


@dataclass(frozen=True, slots=True)
class LlamaCppPrompts:
    """Prompts of a round for llama.cpp.

    Attributes:
        token_ids: of each.
        cached: tokens of each that were read before: its own beginning.
        in_front: tokens that all begin with, and that are computed once.
    """

    token_ids: list[list[int]]
    cached: list[int]
    in_front: int

    @classmethod
    def of(cls, prompts: Sequence[EncodedPrompt], mode: Mode) -> Self:
        """Prompts as they are, or with what all read in front."""
        if not mode.in_front:
            cached = [len(prompt.segments[0].token_ids) for prompt in prompts]
            return cls([prompt.token_ids.tolist() for prompt in prompts], cached, 0)
        run = [segment for _, segment in prompts[0].shared_segments()]
        moved = [
            np.concatenate(
                [part.token_ids for part in (*run, *(p for p in prompt.segments if not p.shared))]
            ).tolist()
            for prompt in prompts
        ]
        # The private part stands behind the run now, so none of it can be there before.
        return cls(moved, [0] * len(moved), sum(map(len, run)))
