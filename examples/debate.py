"""A debate: two for it, two against it, and a judge who has heard them all.

    python examples/debate.py            # with the demo model
    python examples/debate.py MODEL      # a folder, or a Hugging Face id

What was said in a round stands in everybody's next prompt, at another place in each. It is
computed once, by one of them, and read by the others.
"""

import sys

from tokendance import LLM, Agent, SamplingParams

MODEL = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
FOR = ("Ann", "Bo")
AGAINST = ("Cy", "Dora")


def system(name: str) -> str:
    """Who somebody is."""
    if name in FOR:
        return (
            f"You are {name}. You want a park without cars, and you like quiet streets and trees."
        )
    if name in AGAINST:
        return (
            f"You are {name}. You need your car to get to work, and to bring things to your shop."
        )
    return f"You are {name}, a fair judge. You listen to both sides."


def main() -> None:
    """Three rounds, and what each of them took."""
    people = [Agent(name, system(name)) for name in (*FOR, *AGAINST, "Judge")]
    params = SamplingParams(
        max_tokens=40, temperature=0.6, top_p=0.9, frequency_penalty=0.3, seed=1, stop=("\n",)
    )
    debate = LLM(MODEL).session(agents=people, params=params)
    for question, beginning in (
        ("Shall cars leave the town's park? Say why, in one short sentence.", "I think"),
        ("What do the others forget? Say it in one short sentence.", "They forget"),
        ("What would be fair to everybody? Say it in one short sentence.", "We could"),
    ):
        result = debate.run(f"{question} Begin with the words: {beginning}")
        print(f"\n{question}\n")
        for output in result.outputs:
            print(f"{output.agent}: {output.text.strip()}")
            print(f"    computed {output.computed_tokens} of {output.prompt_tokens} tokens")


if __name__ == "__main__":
    main()
