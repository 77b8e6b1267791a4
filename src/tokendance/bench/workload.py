"""Rounds for measurements: text that people and the model wrote, lengths and orders from a seed.

A prompt of a round, as chat messages:

    system  who the agent is, what it remembers            private
    user    a line before the news (and its history)       private
            [A: fact, words] [B: fact, words] ...          shared
            the task, or a question about what one said    private

The words of a block are the model's own, written from the speaker's private part. The fact is a
sentence of ours, so that a question about it has an answer that can be searched for: it stands in
the block of the one who said it and nowhere else in the round.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from tokendance.bench.facts import Fact, Question, ask_about_one, draw_facts, shuffled
from tokendance.errors import ConfigError
from tokendance.llm import LLM
from tokendance.options import check_range
from tokendance.params import SamplingParams
from tokendance.rounds.prompts import Message, Part, Prompt, private, shared
from tokendance.rounds.segments import EncodedPrompt, PrefixHashes
from tokendance.rounds.trace import TraceAgent, example_trace, read_trace
from tokendance.store.entries import Entry

Order = Literal["same", "permuted", "own-first"]
Source = str | Path

TOWN = "town"
TASK = "In one sentence, what will you do now, and whom do you need?"
NEWS = "This is what was said today:\n"
_ASKED = (
    TASK,
    "What worries you most tonight, and why?",
    "What do you know that the others should hear?",
)
_TURNS = 9  # times that a person is asked before an answer may go on past its end
_DIARY = "Looking back, {name} remembers what is known of the others. {text}\n"


@dataclass(frozen=True, slots=True)
class WorkloadSpec:
    """What a round looks like.

    Attributes:
        agents: as many as there are blocks. The people of the source come again under other
            names where it has fewer.
        block_tokens: length of a block, its speaker's name and the line break counted.
        private_tokens: shortest and longest private part; the lengths lie evenly between.
        source: "town" for the example town, or the path of a trace with its people.
        seed: of people, lengths, texts, facts and orders.
    """

    agents: int = 10
    block_tokens: int = 94
    private_tokens: tuple[int, int] = (200, 1000)
    source: Source = TOWN
    seed: int = 0

    def __post_init__(self) -> None:
        check_range(self, 2, "agents")
        check_range(self, 1, "block_tokens")
        check_range(self, 0, "seed")
        shortest, longest = self.private_tokens
        if not 1 <= shortest <= longest:
            raise ConfigError(
                f"private_tokens is {self.private_tokens}. Give 1 or more, the shortest first."
            )


@dataclass(frozen=True, slots=True)
class AgentView:
    """What one agent reads.

    Attributes:
        name: of the agent.
        system: private text, the system message.
        block_indices: of the blocks that it reads, in `RoundWorkload.blocks`, in its order.
        question: to ask instead of the task; None where there is none.
    """

    name: str
    system: str
    block_indices: tuple[int, ...]
    question: Question | None = None


@dataclass(frozen=True, slots=True)
class RoundWorkload:
    """One round."""

    views: tuple[AgentView, ...]  # what each agent reads
    blocks: tuple[Part, ...]  # shared parts, what each agent has said

    def prompts(self) -> list[Prompt]:
        """Prompts of the round, each with its task."""
        return [self._prompt(view, TASK) for view in self.views]

    def encoded(self, llm: LLM) -> list[EncodedPrompt]:
        """The same as segments; the first of each is the private part."""
        return [llm.encoder.encode(prompt) for prompt in self.prompts()]

    @property
    def questions(self) -> tuple[Question, ...]:
        """What is asked by `question_prompts`, in its order."""
        return tuple(view.question for view in self.views if view.question is not None)

    def question_prompts(self, llm: LLM) -> list[Prompt]:
        """Prompts of the agents that have a question, up to where the answer goes on.

        They have the question in place of the task, and are made of token ids, since chat
        templates end an answer that is given.
        """
        prompts = []
        for view in self.views:
            if view.question is not None:
                encoded = llm.encoder.encode(self._prompt(view, view.question.text))
                parts = [
                    Part(tuple(segment.token_ids.tolist()), segment.shared)
                    for segment in encoded.segments
                ]
                opening = llm.encoder.text_ids(view.question.opening).tolist()
                prompts.append(Prompt([*parts, private(opening)], agent=view.name))
        return prompts

    def head(self, agents: int, blocks: int | None = None) -> "RoundWorkload":
        """Return the round of the first agents, who read the first blocks: as many, or `blocks`."""
        count = agents if blocks is None else blocks
        views = tuple(
            replace(
                view, block_indices=tuple(block for block in view.block_indices if block < count)
            )
            for view in self.views[:agents]
        )
        return RoundWorkload(views, self.blocks[:count])

    def _prompt(self, view: AgentView, task: str) -> Prompt:
        blocks = [self.blocks[index] for index in view.block_indices]
        return _chat_prompt(view.system, [private(NEWS), *blocks, private(task)], view.name)

    def warm(self, llm: LLM, *, keep: bool = False, also: Iterable[Entry] = ()) -> None:
        """Leave an engine with every agent's private part in its store, and nothing else.

        `keep` what it has of them already, and of other entries `also`, only where no other engine
        writes over its KV memory.
        """
        keep_private_parts(llm, self.encoded(llm), keep=keep, also=also)


def keep_private_parts(
    llm: LLM, prompts: Sequence[EncodedPrompt], *, keep: bool = False, also: Iterable[Entry] = ()
) -> None:
    """Leave an engine with the first segments of prompts in its store; see `RoundWorkload.warm`."""
    store = llm.kv_store
    beginnings = [prompt.segments[0].token_ids for prompt in prompts]
    kept = set(also)
    if keep:
        for token_ids in beginnings:
            hashes = PrefixHashes(token_ids, prompts[0].salt)
            kept.update(store.match_prefix(hashes, exact=True))
    store.clear(keep=kept)
    llm.generate([ids.tolist() for ids in beginnings], SamplingParams(max_tokens=1))


@dataclass(frozen=True, slots=True)
class RoundTexts:
    """The texts of a round, before anybody is given any; made by `write_texts`."""

    spec: WorkloadSpec  # what they were made from
    names: tuple[str, ...]  # of the agents, who are the speakers of the blocks too
    systems: tuple[str, ...]  # private text of each agent
    blocks: tuple[Part, ...]  # what each has said
    facts: tuple[Fact | None, ...]  # what each has stated, or None

    def arrange(self, order: Order = "same") -> RoundWorkload:
        """Let each agent read all blocks.

        Args:
            order: of the blocks: "same" for all, "permuted" (another for every agent), or
                "own-first" (an agent's own block in front, the others in the common order).
        """
        orders = np.random.default_rng([self.spec.seed, 1])
        askers = np.random.default_rng([self.spec.seed, 2])
        views = []
        for index, (name, system) in enumerate(zip(self.names, self.systems, strict=True)):
            indices = list(range(len(self.blocks)))
            if order == "permuted":
                indices = shuffled(indices, orders)
            elif order == "own-first":
                indices.insert(0, indices.pop(index))
            question = ask_about_one(index, self.names, self.facts, askers)
            views.append(AgentView(name, system, tuple(indices), question))
        return RoundWorkload(tuple(views), self.blocks)


def generate_workload(llm: LLM, spec: WorkloadSpec) -> RoundWorkload:
    """Build a round in one order for all. The same spec and model give the same round.

    Raises:
        TraceError: if the source cannot be read.
    """
    return write_texts(llm, spec).arrange()


def write_texts(llm: LLM, spec: WorkloadSpec) -> RoundTexts:
    """Write private parts, and let the model write each block from its speaker's.

    Raises:
        TraceError: if the source cannot be read.
    """
    rng = np.random.default_rng(spec.seed)
    people = shuffled(read_people(spec.source), rng)
    lengths = np.linspace(*spec.private_tokens, spec.agents).astype(int)
    rng.shuffle(lengths)
    names, systems = [], []
    for index, length in enumerate(lengths):
        repeats, who = divmod(index, len(people))
        person = people[who]
        names.append(f"{person.name} {repeats + 1}" if repeats else person.name)
        systems.append(_private_text(llm, person, people, int(length), rng))
    words = _written_words(llm, systems, spec)
    facts = draw_facts(spec.agents, " ".join([*systems, *words, *names]), rng)
    blocks, facts_said = [], []
    for name, fact, text in zip(names, facts, words, strict=True):
        ids, fits = _block(llm, name, fact, text, spec.block_tokens)
        blocks.append(shared(ids))
        facts_said.append(fact if fits else None)
    return RoundTexts(spec, tuple(names), tuple(systems), tuple(blocks), tuple(facts_said))


def read_people(source: Source) -> list[TraceAgent]:
    """The people of a source, in its order; a TraceError if it cannot be read."""
    path = example_trace() if source == TOWN else Path(source)
    return list(read_trace(path).agents.values())


def _private_text(
    llm: LLM,
    person: TraceAgent,
    people: Sequence[TraceAgent],
    length: int,
    rng: np.random.Generator,
) -> str:
    """A person's own text, filled up to `length` tokens with what it knows of others."""
    text = person.system + "\n"
    while len(llm.encoder.text_ids(text)) < length:
        other = people[int(rng.integers(len(people)))]
        text += _DIARY.format(name=person.name, text=" ".join(other.system.split("\n")))
    ids = llm.encoder.text_ids(text)[:length]
    return llm.encoder.decode(ids.tolist())


def _written_words(llm: LLM, systems: Sequence[str], spec: WorkloadSpec) -> list[str]:
    """What the model says as each person, `block_tokens` tokens or more.

    Where an answer ends too soon, the person is asked something else. Only the last answer goes on
    past its end, so that the length is reached: what a model writes there is other people's turns,
    and blocks full of these make all agents answer alike, whatever their private part.
    """
    texts = [""] * len(systems)
    for turn in range(_TURNS):
        short = [
            index
            for index, text in enumerate(texts)
            if len(llm.encoder.text_ids(text)) < spec.block_tokens
        ]
        if not short:
            break
        asked = private(_ASKED[turn % len(_ASKED)])
        openings = [_chat_prompt(systems[index], [asked]) for index in short]
        params = [
            SamplingParams(
                max_tokens=spec.block_tokens,
                temperature=0.7,
                top_p=0.95,
                seed=1_000_000 * spec.seed + 1000 * turn + index,
                ignore_eos=turn == _TURNS - 1,
            )
            for index in short
        ]
        for index, output in zip(short, llm.generate(openings, params), strict=True):
            said = " ".join(output.text.split())
            texts[index] = f"{texts[index]} {said}".strip()
    return texts


def _chat_prompt(system: str, content: list[Part], agent: str | None = None) -> Prompt:
    messages: list[Message] = [
        {"role": "system", "content": [private(system)]},
        {"role": "user", "content": content},
    ]
    return Prompt(messages, agent=agent)


def _block(
    llm: LLM, name: str, fact: Fact | None, words: str, length: int
) -> tuple[list[int], bool]:
    """Token ids of a block of `length` tokens with its line break; whether the fact is in it."""
    said = words if fact is None else f"{fact.sentence} {words}"
    end = llm.encoder.text_ids("\n").tolist()
    ids = llm.encoder.text_ids(f"{name}: {said}")[: max(1, length - len(end))].tolist()
    fits = fact is not None and fact.sentence in llm.encoder.decode(ids)
    return [*ids, *end], fits
