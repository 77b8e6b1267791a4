"""The offline entry: load a model, run prompts and rounds."""

import itertools
import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tokendance.collector.correction import CorrectionPolicy, make_correction
from tokendance.collector.target import FidelityTable, FidelityTarget
from tokendance.config import (
    AttentionName,
    EngineConfig,
    ReuseMode,
    StoreConfig,
    default_kv_budget,
    parse_bytes,
)
from tokendance.disk.records import SessionKey
from tokendance.disk.store import DiskStore
from tokendance.engine.engine import Engine, RoundRecord
from tokendance.engine.request import Request
from tokendance.engine.runner import KVMemory
from tokendance.engine.sampling import SamplingParams
from tokendance.engine.shadow import ShadowReport, compare, exact_request
from tokendance.errors import ConfigError, PromptError, RoundError, TokenDanceError
from tokendance.models.calibration import table_path
from tokendance.models.encoder import PromptEncoder
from tokendance.models.identity import identity_of
from tokendance.models.loader import LoadedModel, dtype_name, load_model
from tokendance.outputs import KVBytes, Output, RoundResult, RoundStats
from tokendance.rounds.prompts import Prompt, PromptLike, as_prompt
from tokendance.rounds.segments import EncodedPrompt, make_salt
from tokendance.session import Agent, Session
from tokendance.store.entries import RoundId
from tokendance.tier.tier import DiskTier

ParamsLike = SamplingParams | Sequence[SamplingParams] | None
Progress = Callable[[str, int], None]


class LLM:
    """A model with an engine around it.

    What one prompt computes stays in memory for the next ones, within `kv_budget`.

    Attributes:
        model: the loaded model.
        engine: the loop under it, for callers that add and step by themselves.
        encoder: text to token ids and back.
        tiers: memory and disk, where sessions last; None without a store.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        reuse: ReuseMode = "collective",
        correction: str | CorrectionPolicy | None = None,
        first_k: int | None = None,
        fidelity_target: float | None = None,
        shadow: float = 0.0,
        kv_budget: int | str | None = None,
        dtype: str = "auto",
        device: str = "cpu",
        max_batch_tokens: int | None = None,
        page_size: int | None = None,
        max_reuse_rounds: int | None = None,
        attention: AttentionName = "auto",
        store: str | Path | None = None,
        store_budget: int | str | None = None,
        store_int8: bool = False,
    ) -> None:
        """Load a model and allocate its memory.

        Args:
            model: "smollm2-135m", a local folder, or the id of a model on the Hugging Face hub.
            reuse: "none", "prefix", "pic", "pic-batched" or "collective"; see `EngineConfig`.
            correction: "edges" (the first 3 tokens and the last of each shared segment), "first-k",
                "epic", "none", "all", or a policy of your own; "edges" if left out.
            first_k: tokens at the beginning of each shared segment that a mirror computes afresh;
                makes the correction "first-k".
            fidelity_target: KL divergence (nats per token) from full computation; chooses the
                correction of each reuse by what `tokendance calibrate` has measured.
            shadow: share of mirrors that `check_shadow()` computes again, exactly.
            kv_budget: bytes of KV memory, as a number or like "2GiB"; a quarter of the machine's
                memory if left out, half of what is free on another device.
            dtype: "auto", "bfloat16", "float16" or "float32".
            device: as torch names it.
            max_batch_tokens: most tokens of one forward pass.
            page_size: tokens per page.
            max_reuse_rounds: see `StoreConfig`.
            attention: what computes it; see `EngineConfig`.
            store: folder in which sessions with a name last; made if it does not exist.
            store_budget: most bytes of KV in it, as a number or like "10GiB"; without bound if
                left out.
            store_int8: write new KV with a byte per number, half of what bfloat16 takes; what it
                costs is in docs/benchmarks.md.

        Raises:
            ConfigError: for a setting that cannot be.
            StoreError: for a folder that cannot be used.
            ModelNotFoundError: if there is no such model.
            UnsupportedModelError: if the arithmetic does not hold for it.
        """
        if correction is None and first_k is not None:
            correction = "first-k"
        if isinstance(correction, str):
            if first_k is not None and correction != "first-k":
                raise ConfigError(f"first_k goes with correction 'first-k', not {correction!r}.")
            correction = make_correction(correction, **_given(first_k=first_k))
        elif first_k is not None:
            raise ConfigError("first_k goes with correction 'first-k', not with another policy.")
        if correction is not None and (fidelity_target is not None or reuse != "collective"):
            raise ConfigError(
                "correction and first_k go with reuse 'collective', and without fidelity_target, "
                "which chooses the correction itself."
            )
        memory = StoreConfig(
            _default_budget(device) if kv_budget is None else parse_bytes(kv_budget),
            **_given(page_size=page_size, max_reuse_rounds=max_reuse_rounds),
        )
        if store is None and (store_budget is not None or store_int8):
            raise ConfigError(
                "store_budget and store_int8 go with store. Give a folder, or leave them out."
            )
        loaded = load_model(str(model), dtype, device)
        target = None
        if fidelity_target is not None:
            table = FidelityTable.read(table_path(str(model), dtype_name(loaded.dtype)))
            target = FidelityTarget(fidelity_target, table)
        config = EngineConfig(
            reuse=reuse,
            store=memory,
            target=target,
            shadow=shadow,
            attention=attention,
            **_given(correction=correction, max_batch_tokens=max_batch_tokens),
        )
        self._start(loaded, config)
        if store is not None:
            self.open_store(Path(store), store_budget, int8=store_int8)

    @classmethod
    def from_loaded(
        cls, model: LoadedModel, config: EngineConfig, memory: KVMemory | None = None
    ) -> "LLM":
        """Put an engine around a model that is loaded already; several may share one model.

        Those that are never used at the same time may take turns on one `memory` too.
        """
        llm = cls.__new__(cls)
        llm._start(model, config, memory)
        return llm

    def _start(
        self, model: LoadedModel, config: EngineConfig, memory: KVMemory | None = None
    ) -> None:
        self.model = model
        self.encoder = PromptEncoder(
            model.tokenizer, model.shape.vocab_size, make_salt(model.name, str(model.dtype))
        )
        self.engine = Engine(model, config, self.encoder.decode, memory)
        self.tiers: DiskTier | None = None

    def open_store(
        self, folder: Path, budget: int | str | None = None, *, int8: bool = False
    ) -> None:
        """Let sessions with a name last in a folder.

        Args:
            folder: made if it does not exist.
            budget: see `LLM`.
            int8: likewise.

        Raises:
            StoreError: if it cannot be used, or holds KV of another model.
        """
        disk = DiskStore(
            folder,
            identity_of(self.model),
            compressed=int8,
            **_given(budget=None if budget is None else parse_bytes(budget)),
        )
        engine = self.engine
        self.tiers = DiskTier(
            engine.store,
            engine.runner.memory,
            disk,
            bytes_per_token=engine.kv_bytes_per_token,
            seconds_per_token=lambda: engine.seconds_per_token,
        )

    def generate(
        self,
        prompts: str | Prompt | Sequence[PromptLike],
        params: ParamsLike = None,
    ) -> list[Output]:
        """Run prompts that have nothing to do with each other, batched together.

        They share equal beginnings only, so each answer is what the prompt alone would give (but
        for rounding). For blocks that several prompts read, use `run_round`.

        Args:
            prompts: a list of prompts; a single text or Prompt will do too.
            params: for all prompts, or one for each.

        Returns:
            One output per prompt. A prompt that cannot be run has its `error` set.
        """
        if isinstance(prompts, str | Prompt):
            prompts = [prompts]
        round_id = self.engine.new_round_id()
        requests = [
            self.make_request(prompt, one, round_id, f"prompt {index}", in_round=False)
            for index, (prompt, one) in enumerate(self._pair(prompts, params))
        ]
        if requests:
            self._run(requests, None)
            self.engine.pop_round(round_id)
        return [make_output(request) for request in requests]

    def run_round(
        self,
        prompts: Sequence[PromptLike],
        params: ParamsLike = None,
        progress: Progress | None = None,
        *,
        session: SessionKey | None = None,
    ) -> RoundResult:
        """Run the prompts of one round as one batch, sharing what they all read.

        Args:
            prompts: one per agent.
            params: for all agents, or one for each.
            progress: called after each step with a phase ("prefill" or "decode") and the number
                of agents that are done with it.
            session: that saves the round when it has heard it; `Session.run` gives its own.

        Returns:
            One output per prompt, in their order. An agent that cannot be run has its `error`
            set; the others are unharmed.

        Raises:
            RoundError: for a round without prompts, or two agents of one name.
        """
        if isinstance(prompts, str | Prompt):
            raise RoundError("A round is a list of prompts, one per agent. Put yours into a list.")
        if not prompts:
            raise RoundError("The round is empty. Give it at least one prompt.")
        pairs = self._pair(prompts, params)
        given = [prompt.agent for prompt, _ in pairs if prompt.agent is not None]
        for name, count in Counter(given).items():
            if count > 1:
                raise RoundError(f"Two agents are called {name!r}. Give each its own name.")
        free = (name for name in map("agent {}".format, itertools.count()) if name not in given)
        round_id = self.engine.new_round_id()
        requests = [
            self.make_request(prompt, one, round_id, prompt.agent or next(free))
            for prompt, one in pairs
        ]
        for request in requests:
            request.session = session
        self._run(requests, progress)
        record = self.engine.pop_round(round_id)
        outputs = tuple(make_output(request) for request in requests)
        return RoundResult(outputs, self._stats(record))

    def session(
        self,
        name: str | None = None,
        agents: Sequence[Agent] = (),
        *,
        params: SamplingParams | None = None,
        max_history: int | None = None,
        ttl_s: float | None = None,
    ) -> Session:
        """Begin a session, or go on with one: agents that hear each other from round to round.

        Args:
            name: of the session. With a `store`, each round is on disk when it is done, and a
                session of this name goes on where it stopped, in this process or a later one.
            agents: who is there at first; of a session that goes on, those who are new.
            params: of every answer, if a round does not say otherwise.
            max_history: past rounds that agents remember; as many as fit the context if left out.
            ttl_s: seconds after its last round in which it is sure to be kept; for ever if left
                out.

        Raises:
            InputError: for a name that cannot be.
            StoreError: if what is stored cannot be read.
        """
        return Session(self, name, agents, params=params, max_history=max_history, ttl_s=ttl_s)

    def close(self) -> None:
        """Let others use the store. An LLM without one needs no closing."""
        if self.tiers is not None:
            self.tiers.close()
            self.tiers = None

    def check_shadow(self) -> ShadowReport | None:
        """Compute one mirror again, exactly, and compare; None if none waits.

        With `shadow=P`, a share P of mirrors waits for this after each round. It costs a whole
        prompt, so call it when there is nothing else to do.
        """
        if not self.engine.shadows.pending:
            return None
        shadow = self.engine.shadows.pending.pop()
        request = exact_request(shadow, self.engine.new_round_id())
        self._run([request], None)
        self.engine.pop_round(request.round_id)
        if request.error is not None:
            raise request.error
        return compare(shadow, tuple(request.logprobs))

    def make_request(
        self,
        prompt: PromptLike,
        params: SamplingParams,
        round_id: RoundId,
        name: str,
        *,
        in_round: bool = True,
    ) -> Request:
        """Encode a prompt into a request. A prompt that cannot be run has its `error` set."""
        prompt = as_prompt(prompt)
        error: TokenDanceError | None = None
        try:
            encoded = self.encoder.encode(prompt)
        except PromptError as reason:
            encoded, error = EncodedPrompt((), make_salt()), reason
        request = self.request_of(
            encoded,
            params,
            prompt.agent or name,
            round_id,
            in_round=in_round,
            exact=prompt.reuse == "exact",
        )
        request.error = error or request.error
        return request

    def request_of(
        self,
        encoded: EncodedPrompt,
        params: SamplingParams,
        name: str,
        round_id: RoundId,
        *,
        in_round: bool = True,
        exact: bool = False,
    ) -> Request:
        """Make a request of an encoded prompt; one that cannot be run has its `error` set."""
        error: TokenDanceError | None = None
        forced = params.forced_tokens or ()
        biased = [token for token, _ in params.logit_bias]
        for what, tokens in (("forced tokens", forced), ("tokens of logit_bias", biased)):
            if any(not 0 <= token < self.model.shape.vocab_size for token in tokens):
                error = PromptError(
                    f"The {what} of {name!r} are not all in the model's "
                    "vocabulary. Encode them with this model's tokenizer."
                )
        max_context = self.model.shape.max_context
        if len(encoded) >= max_context:
            error = PromptError(
                f"The prompt of {name!r} has {len(encoded)} tokens, and the "
                f"model's context holds {max_context}, the answer included. Shorten the prompt."
            )
        wanted = min(params.max_tokens, len(forced)) if forced else params.max_tokens
        request = Request(
            name,
            round_id,
            encoded,
            params,
            max_new_tokens=min(wanted, max(1, max_context - len(encoded))),
            in_round=in_round,
            exact=exact,
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            stop_ids=self.model.stop_ids,
        )
        request.error = error
        return request

    def _pair(
        self, prompts: Sequence[PromptLike], params: ParamsLike
    ) -> list[tuple[Prompt, SamplingParams]]:
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise ConfigError(
                f"There are {len(prompts)} prompts and {len(params)} sampling parameters. "
                "Give one for all, or one for each."
            )
        return list(zip(map(as_prompt, prompts), params, strict=True))

    def _run(self, requests: list[Request], progress: Progress | None) -> None:
        """Run requests until all are done; take them back if the caller is interrupted."""
        self.engine.add(requests)
        try:
            while any(request.finish_reason is None for request in requests):
                self.engine.step()
                if self.tiers is not None:
                    self.tiers.after_step(time.perf_counter(), requests)
                if progress is not None:
                    _report(requests, progress)
        except BaseException:
            for request in requests:
                self.engine.abort(request)
            for session in {request.session for request in requests}:
                if self.tiers is not None and session is not None:
                    self.tiers.give_up(session)
            for round_id in {request.round_id for request in requests}:
                self.engine.pop_round(round_id)
            raise

    def _stats(self, record: RoundRecord) -> RoundStats:
        done = [request for request in record.requests if request.error is None]
        first = max((r.first_token_s for r in done if r.first_token_s), default=record.started_s)
        last = max((r.finished_s for r in done if r.finished_s), default=first)
        outputs = [make_output(request) for request in done]
        tokens = sum(len(r.prompt) + len(r.generated) for r in done)
        return RoundStats(
            agents=len(done),
            prompt_tokens=sum(output.prompt_tokens for output in outputs),
            computed_tokens=sum(output.computed_tokens for output in outputs),
            reused_tokens=sum(output.reused_tokens for output in outputs),
            corrected_tokens=sum(output.corrected_tokens for output in outputs),
            generated_tokens=sum(len(output.token_ids) for output in outputs),
            prefill_s=first - record.started_s,
            decode_s=last - first,
            kv_bytes=KVBytes(
                dense=tokens * self.engine.kv_bytes_per_token,
                resident=record.resident_pages * self.engine.page_bytes,
            ),
        )


def make_output(request: Request) -> Output:
    """Turn a finished request into what the caller gets."""
    failed = request.error is not None
    length = 0 if failed else len(request.prompt)
    reused = 0 if failed else request.num_cached
    return Output(
        agent=request.agent,
        text=request.text or "",
        token_ids=tuple(request.generated),
        finish_reason=request.finish_reason or "error",
        error=request.error,
        prompt_token_ids=request.prompt.token_ids[:length],
        prompt_tokens=length,
        computed_tokens=length - reused,
        reused_tokens=reused,
        corrected_tokens=0 if failed else request.num_corrected,
        stopped_by_text=request.stopped_by_text,
        logprobs=tuple(request.logprobs) if request.params.keep_logprobs else (),
    )


def _report(requests: Sequence[Request], progress: Progress) -> None:
    ended = sum(request.finish_reason is not None for request in requests)
    begun = sum(
        request.finish_reason is not None or request.first_token_s is not None
        for request in requests
    )
    if begun < len(requests):
        progress("prefill", begun)
    else:
        progress("decode", ended)


def _default_budget(device: str) -> int:
    if device == "cpu":
        return default_kv_budget()
    free, _ = torch.get_device_module(device).mem_get_info(device)
    return int(free) // 2


def _given(**settings: Any) -> dict[str, Any]:
    """Settings that were given; the others keep the default of their configuration class."""
    return {name: value for name, value in settings.items() if value is not None}
