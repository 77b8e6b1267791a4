"""A town: people hear each other, somebody comes, somebody goes.

    python examples/town.py              # with the demo model
    python examples/town.py MODEL        # a folder, or a Hugging Face id

Who comes later has another past, so that nothing but what was said last is the same in all prompts.
It is still computed once.
"""

import sys

from tokendance import LLM, Agent, SamplingParams
from tokendance.outputs import RoundResult

MODEL = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
PEOPLE = {
    "Noor": "You are Noor, the baker. You are warm and quick, and you rise at three.",
    "Tobias": "You are Tobias, an old ferryman, and you live on your boat.",
    "Hana": "You are Hana, head of the school. You make lists of everything.",
    "Bram": "You are Bram, the mayor. You want to please everybody.",
}


def show(result: RoundResult) -> None:
    """What was said, and what of the prompts was computed for it."""
    for output in result.outputs:
        print(f"{output.agent}: {output.text.strip()}")
    stats = result.stats
    print(f"  {stats.prompt_tokens} tokens read, {stats.computed_tokens} of them computed now\n")


def main() -> None:
    """Three rounds of one session."""
    params = SamplingParams(
        max_tokens=40, temperature=0.6, top_p=0.9, frequency_penalty=0.3, seed=1, stop=("\n",)
    )
    people = [Agent(name, text) for name, text in PEOPLE.items()]
    town = LLM(MODEL).session(agents=people, params=params)
    how = "Answer in one short sentence. Begin with the words:"
    show(town.run(f"There is a picnic on Sunday. What food will you bring? {how} I will bring"))
    town.join(Agent("Leo", "You are Leo, 17, who delivers the bread on a bicycle."))
    show(town.run(f"It may rain on Sunday. What will you wear? {how} I will wear"))
    town.leave("Bram")  # what he has said is still heard
    show(town.run(f"Which game will you play at the picnic? {how} I will play"))


if __name__ == "__main__":
    main()
