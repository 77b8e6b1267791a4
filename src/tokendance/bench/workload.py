"""A round for measurements: people of the example town, and blocks that the model has written."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tokendance.engine.sampling import SamplingParams
from tokendance.llm import LLM
from tokendance.rounds.prompts import Part, Prompt, private
from tokendance.rounds.trace import TraceAgent, example_trace, read_trace

TASK = "In one sentence, what will you do now, and whom do you need?"
_DIARY = "Looking back, {name} remembers what is known of the others. {text}\n"


@dataclass(frozen=True, slots=True)
class RoundWorkload:
    """One round: each agent's private text, the blocks that all of them read, and the task.

    Attributes:
        systems: (agent, private text) for each agent.
        blocks: shared parts in one order for all, each by one agent.
    """

    systems: tuple[tuple[str, str], ...]
    blocks: tuple[Part, ...]

    def prompts(self) -> list[Prompt]:
        """Prompts of the round, as chat messages."""
        return [self._prompt(name, text) for name, text in self.systems]

    def _prompt(self, name: str, text: str) -> Prompt:
        content = [*self.blocks, private(TASK)]
        return Prompt(
            [
                {"role": "system", "content": [private(text)]},
                {"role": "user", "content": content},
            ],
            agent=name,
        )

    def formula(self, llm: LLM, k: int) -> int:
        """Tokens that a round should compute, private parts cached: S + t + (N - 1)(k B + t).

        S and t are counted on a prompt: the chat template's text before the first block belongs
        to it, and the text after the task to the task.
        """
        prompt = llm.encoder.encode(self.prompts()[0])
        num_shared = sum(len(segment) for segment in prompt.segments if segment.shared)
        num_task = len(prompt.segments[-1])
        mirrors = len(self.systems) - 1
        return num_shared + num_task + mirrors * (k * len(self.blocks) + num_task)

    def warm(self, llm: LLM) -> None:
        """Leave an engine with every agent's private part in its store, and nothing else."""
        llm.engine.store.clear()
        beginnings = [
            llm.encoder.encode(prompt).segments[0].token_ids.tolist() for prompt in self.prompts()
        ]
        llm.generate(beginnings, SamplingParams(max_tokens=1))


def make_workload(
    llm: LLM,
    num_agents: int,
    block_tokens: int = 90,
    private_tokens: tuple[int, int] = (200, 1000),
    seed: int = 0,
) -> RoundWorkload:
    """Build a round.

    Args:
        llm: writes the blocks, each from its agent's private part, and counts tokens.
        num_agents: as many as there are blocks; the town's people come again under new names
            where it has fewer.
        block_tokens: length of what each agent says, its name not counted.
        private_tokens: shortest and longest private part.
        seed: of lengths and texts.
    """
    rng = np.random.default_rng(seed)
    people = list(read_trace(example_trace()).agents.values())
    lengths = np.linspace(*private_tokens, num_agents).astype(int)
    rng.shuffle(lengths)
    systems = []
    for index, length in enumerate(lengths):
        person = people[index % len(people)]
        name = person.name if index < len(people) else f"{person.name} {index // len(people) + 1}"
        systems.append((name, _private_text(llm, person, people, int(length), rng)))
    openings = [
        Prompt(
            [
                {"role": "system", "content": [private(text)]},
                {"role": "user", "content": [private(TASK)]},
            ]
        )
        for _, text in systems
    ]
    params = [
        SamplingParams(
            max_tokens=block_tokens, temperature=0.7, top_p=0.95, seed=seed + index, ignore_eos=True
        )
        for index in range(num_agents)
    ]
    said = llm.generate(openings, params)
    session = llm.session()
    stop_ids = llm.model.stop_ids
    blocks = [
        session.block(name, [token for token in output.token_ids if token not in stop_ids])
        for (name, _), output in zip(systems, said, strict=True)
    ]
    return RoundWorkload(tuple(systems), tuple(blocks))


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
