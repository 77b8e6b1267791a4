"""A debate: two are for summer, two for winter, and all of them hear each other.

    python examples/debate.py            # with the demo model
    python examples/debate.py MODEL      # a folder, or a Hugging Face id

What was said in a round stands in everybody's next prompt, at another place in each. It is
computed once, by one of them, and read by the others.
"""

import sys

from tokendance import LLM, Agent, SamplingParams

MODEL = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
PEOPLE = {
    "Ann": ("summer", "winter", "You are Ann, a swimmer, and you love summer."),
    "Bo": ("summer", "winter", "You are Bo. You grow tomatoes, so you love summer."),
    "Cy": ("winter", "summer", "You are Cy. You have a sledge and a dog, and you love winter."),
    "Dora": ("winter", "summer", "You are Dora, a cook. You love winter, soup and books."),
}
ROUNDS = (
    "What is the best of {own}? {how} The best of {own} is",
    "What is bad about {other}? {how} In {other} it is",
)


def main() -> None:
    """An opening and a reply, and what they took."""
    params = SamplingParams(
        max_tokens=40, temperature=0.6, top_p=0.9, frequency_penalty=0.3, seed=1, stop=("\n",)
    )
    people = [Agent(name, system) for name, (_, _, system) in PEOPLE.items()]
    debate = LLM(MODEL).session(agents=people, params=params)
    how = "Answer in one short sentence. Begin with the words:"
    for task in ROUNDS:
        tasks = {
            name: task.format(own=own, other=other, how=how)
            for name, (own, other, _) in PEOPLE.items()
        }
        for output in debate.run(tasks).outputs:
            print(f"{output.agent}: {output.text.strip()}")
            print(f"    computed {output.computed_tokens} of {output.prompt_tokens} tokens")
        print()


if __name__ == "__main__":
    main()
