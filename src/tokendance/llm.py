"""The offline entry: load a model, run prompts and rounds."""

import itertools
import reprlib
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch

from tokendance.build import assemble
from tokendance.collector.correction import CorrectionPolicy
from tokendance.conversation import Agent, Conversation
from tokendance.disk.records import SessionKey
from tokendance.disk.store import NO_BUDGET, DiskStore
from tokendance.engine.figures import RoundFigures
from tokendance.engine.request import Request, make_output
from tokendance.errors import ConfigError, RoundError, StoreError
from tokendance.executor.kv_pool import KVPool
from tokendance.executor.step import Executor
from tokendance.fidelity.balanced import Balanced
from tokendance.fidelity.shadow import ShadowReport, Shadows
from tokendance.fidelity.shipped import best_table
from tokendance.fidelity.target import FidelityTarget
from tokendance.kinds import is_number
from tokendance.models.encoder import PromptEncoder
from tokendance.models.identity import identity_of
from tokendance.models.loader import (
    LoadedModel,
    choose_device,
    choose_dtype,
    load_model,
    precision_name,
)
from tokendance.options import EngineOptions
from tokendance.outputs import Output, Progress, RoundResult
from tokendance.params import SamplingParams, check_params
from tokendance.request_maker import RequestMaker
from tokendance.rounds.prompts import Prompt, PromptLike, as_prompt
from tokendance.rounds.segments import make_salt
from tokendance.session import Session
from tokendance.tier.tier import DiskTier
from tokendance.turns import Turns, in_event_loop
from tokendance.units import parse_bytes

ParamsLike = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """A model with an engine around it.

    What one prompt computes stays in memory for the next ones, within `kv_budget`.

    Attributes:
        model: the loaded model.
        correction: which tokens of reused segments are computed afresh, with "collective".
        engine: the loop under it, for callers that add and step by themselves.
        encoder: text to token ids and back.
        kv_store: what the engine knows of KV, and where that lies.
        executor: holds the KV.
        shadows: mirrors that are kept to be computed again.
        requests: makes requests of prompts.
        tier: memory and disk, where sessions last; None without a store.
        turns: calls from several threads and coroutines are served one after the other.
    """

    def __init__(
        self, model: str | Path, options: EngineOptions | None = None, **settings: Any
    ) -> None:
        """Load a model and allocate its memory.

        Args:
            model: "smollm2-135m", a local folder, or the id of a model on the Hugging Face hub.
            options: see `EngineOptions`; the defaults if left out.
            **settings: likewise, by name, in place of those in `options`.

        Raises:
            ConfigError: for a setting that does not exist, or cannot be.
            StoreError: for a folder that cannot be used.
            ModelNotFoundError: if there is no such model.
            UnsupportedModelError: if the arithmetic does not hold for it.
        """
        options = EngineOptions.of(options, **settings)
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        dtype = choose_dtype(options.dtype, choose_device(options.device))
        precision = precision_name(dtype, options.weights)
        correction = _read_correction(options, str(model), precision)  # may fail: before loading
        loaded = load_model(str(model), options.dtype, options.device, options.weights)
        self._start(loaded, options, correction)

    @classmethod
    def from_loaded(
        cls,
        model: LoadedModel,
        options: EngineOptions | None = None,
        *,
        pool: KVPool | None = None,
        executor: Executor | None = None,
    ) -> "LLM":
        """Put an engine around a model that is loaded already; several may share one model.

        Args:
            model: to run.
            options: see `EngineOptions`; what they say of loading (`dtype`, `weights`, `device`,
                `threads`)
                has no effect.
            pool: KV memory to use; those that are never used at the same time may take turns on it.
            executor: to use in place of one that runs the model.
        """
        options = options or EngineOptions()
        correction = _read_correction(options, model.name, model.precision)
        llm = cls.__new__(cls)
        llm._start(model, options, correction, pool=pool, executor=executor)
        return llm

    def _start(
        self,
        model: LoadedModel,
        options: EngineOptions,
        correction: CorrectionPolicy,
        *,
        pool: KVPool | None = None,
        executor: Executor | None = None,
    ) -> None:
        self.model = model
        self.correction = correction
        self.encoder = PromptEncoder(
            model.tokenizer, model.shape.vocab_size, make_salt(*model.salt_names)
        )
        made = assemble(model, options, correction, self.encoder, pool=pool, executor=executor)
        self.engine, self.kv_store, self.executor = made.loop, made.store, made.executor
        self._figures = RoundFigures(self.engine.kv_bytes_per_token, self.engine.page_bytes)
        self.engine.observe(self._figures)
        self.turns = Turns()
        self.shadows = Shadows(options.shadow, self.engine.emit)
        self.engine.attach(self.shadows)
        self.requests = RequestMaker(model, self.encoder, self.shadows, options)
        self.tier: DiskTier | None = None
        self._is_closed = False  # its store, if it had one
        self._sessions: WeakValueDictionary[SessionKey, Session] = WeakValueDictionary()
        if options.store is not None:
            self.open_store(Path(options.store), options.store_budget, int8=options.store_int8)

    @property
    def kv_bytes(self) -> int:
        """Size of the KV memory."""
        return self.kv_store.pool.num_pages * self.engine.page_bytes

    def open_store(
        self, folder: Path, budget: int | str | None = None, *, int8: bool = False
    ) -> None:
        """Let sessions with a name last in a folder.

        Args:
            folder: made if it does not exist.
            budget: see `store_budget` of `EngineOptions`.
            int8: see `store_int8` there.

        Raises:
            StoreError: if it cannot be used, holds KV of another model, or was written with the
                other `private`.
        """
        with self.turns.take():
            # What was read of others in open rounds is in everybody's own KV.
            private = self.engine.options.private
            disk = DiskStore(
                folder,
                identity_of(self.model) | ({"private": private} if private != "open" else {}),
                compressed=int8,
                budget=NO_BUDGET if budget is None else parse_bytes(budget),
            )
            self.tier = DiskTier(
                self.kv_store,
                self.executor,
                disk,
                bytes_per_token=self.engine.kv_bytes_per_token,
                seconds_per_token=self.engine.seconds_per_token,
                num_kept=self.engine.num_kept,
            )
            self.engine.attach(self.tier)
            self._is_closed = False

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
        if isinstance(prompts, str | Prompt) or not isinstance(prompts, Sequence):
            prompts = [prompts]
        with self.turns.take():
            round_id = self.engine.new_round_id()
            requests = [
                self.requests.make(prompt, own_params, round_id, f"prompt {index}", in_round=False)
                for index, (prompt, own_params) in enumerate(self._pair(prompts, params))
            ]
            if requests:
                self._run(requests, None)
            return [make_output(request) for request in requests]

    async def agenerate(
        self, prompts: str | Prompt | Sequence[PromptLike], params: ParamsLike = None
    ) -> list[Output]:
        """Do what `generate` does while the event loop goes on; see `arun_round`."""
        return await self.turns.in_background(lambda: self.generate(prompts, params))

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
        if isinstance(prompts, str | Prompt) or not isinstance(prompts, Sequence):
            raise RoundError("A round is a list of prompts, one per agent. Put yours into a list.")
        if not prompts:
            raise RoundError("The round is empty. Give it at least one prompt.")
        pairs = self._pair(prompts, params)
        names = [prompt.agent for prompt, _ in pairs if prompt.agent is not None]
        for name, count in Counter(names).items():
            if count > 1:
                raise RoundError(f"Two agents are called {name!r}. Give each its own name.")
        unused = (name for name in map("agent {}".format, itertools.count()) if name not in names)
        with self.turns.take():
            round_id = self.engine.new_round_id()
            requests = [
                self.requests.make(prompt, own_params, round_id, prompt.agent or next(unused))
                for prompt, own_params in pairs
            ]
            for request in requests:
                request.session = session
            self._figures.watch(round_id, time.perf_counter())
            try:
                self._run(requests, progress)
            except BaseException:
                self._figures.forget(round_id)
                raise
            outputs = tuple(make_output(request) for request in requests)
            return RoundResult(outputs, self._figures.take(round_id))

    async def arun_round(
        self,
        prompts: Sequence[PromptLike],
        params: ParamsLike = None,
        progress: Progress | None = None,
    ) -> RoundResult:
        """Do what `run_round` does while the event loop goes on.

        Several at a time are run one after the other. If the awaiting task is cancelled, the round
        is taken back at the end of its step. `progress` is called in the event loop.
        """
        told = in_event_loop(progress)
        return await self.turns.in_background(lambda: self.run_round(prompts, params, told))

    def session(
        self,
        name: str | None = None,
        agents: Sequence[Agent] = (),
        *,
        params: SamplingParams | None = None,
        max_history: int | None = None,
        ttl_s: float | None = None,
        share_reasoning: bool | None = None,
    ) -> Session:
        """Begin a session, or go on with one: agents that hear each other from round to round.

        Args:
            name: of the session. With a `store`, each round is on disk when it is done, and a
                session of this name goes on where it stopped, in this process or a later one. One
                that is still in use here is shared: who asks for it again gets the same object.
            agents: who is there at first; of a session that goes on, those who are new.
            params: of every answer, if a round does not say otherwise. Of a session that is shared,
                this and what follows holds from now on if it is given.
            max_history: past rounds that agents remember; as many as fit the context if left out.
            ttl_s: seconds after its last round in which it is sure to be kept; for ever if left
                out.
            share_reasoning: whether agents hear what the others thought before they spoke, where
                the model thinks. They do not if left out, and none remembers its own thoughts.

        Raises:
            InputError: for a name that cannot be.
            ConfigError: for other values that cannot be.
            StoreError: if what is stored cannot be read.
        """
        for setting, value, is_fit, wanted in (
            ("agents", agents, _are_agents(agents), "a list of Agents"),
            ("max_history", max_history, isinstance(max_history, int | None), "a whole number"),
            ("share_reasoning", share_reasoning, share_reasoning in (None, True, False), "a bool"),
            ("ttl_s", ttl_s, ttl_s is None or is_number(ttl_s), "a number of seconds"),
        ):
            if not is_fit:
                raise ConfigError(f"{setting} is {reprlib.repr(value)}. Give {wanted}.")
        key = SessionKey("", name) if name is not None else None
        with self.turns.take():
            if key is not None and self._is_closed:
                raise StoreError(f"The store of the session {name!r} is closed. Open it again.")
            session = self._sessions.get(key) if key is not None else None
            if session is None:
                conversation = Conversation(self.encoder, self.model.shape.max_context)
                session = Session(
                    conversation, self.run_round, key=key, tier=self.tier, turns=self.turns
                )
                session.load()
                if key is not None and self.tier is not None:
                    self._sessions[key] = session
            session.configure(
                params=params,
                max_history=max_history,
                ttl_s=ttl_s,
                share_reasoning=share_reasoning,
            )
            here = {agent.name for agent in session.agents}
            for agent in agents:
                if agent.name not in here:
                    session.join(agent)
            return session

    def close(self) -> None:
        """Let others use the store, where its sessions end. An LLM without one needs no closing."""
        with self.turns.take():
            if self.tier is not None:
                self.engine.detach(self.tier)
                self.tier.close()
                self.tier = None
                self._is_closed = True
                self._sessions.clear()

    def check_shadow(self) -> ShadowReport | None:
        """Compute one mirror again, exactly, and compare; None if none waits.

        With `shadow=P`, a share P of mirrors waits for this after each round. It costs a whole
        prompt, so call it when there is nothing else to do.
        """
        with self.turns.take():
            request = self.shadows.next_request(self.engine.new_round_id())
            if request is None:
                return None
            try:
                self._run([request], None)
            except BaseException:
                self.shadows.put_back(request)
                raise
            report = self.shadows.finish(request)
        if request.error is not None:
            raise request.error
        return report

    def _pair(
        self, prompts: Sequence[PromptLike], params: ParamsLike
    ) -> list[tuple[Prompt, SamplingParams]]:
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        for own_params in params if isinstance(params, Sequence) else [params]:
            check_params(own_params)
        if len(params) != len(prompts):
            raise ConfigError(
                f"There are {len(prompts)} prompts and {len(params)} sampling parameters. "
                "Give one for all, or one for each."
            )
        return list(zip(map(as_prompt, prompts), params, strict=True))

    def _run(self, requests: list[Request], progress: Progress | None) -> None:
        """Run requests until all are done; take them back if the caller is interrupted."""
        try:
            with self.turns.driving():
                self.engine.run(requests, progress, self.turns.check_stop)
        except BaseException:
            for session in {request.session for request in requests}:
                if self.tier is not None and session is not None:
                    self.tier.give_up(session)
            raise


def _are_agents(agents: object) -> bool:
    return isinstance(agents, Sequence) and all(isinstance(agent, Agent) for agent in agents)


def _read_correction(options: EngineOptions, model: str, precision: str) -> CorrectionPolicy:
    """The correction of an engine; some go by what was measured of the model."""
    return options.read_correction(
        {
            "balanced": lambda _: Balanced(best_table(model, precision)),
            "target:": lambda kl: FidelityTarget.read(kl, model, precision),
        }
    )
