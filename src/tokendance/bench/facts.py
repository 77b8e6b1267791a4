"""Facts that agents state, and questions about them.

A fact is a sentence of ours in an agent's block, about a thing that nothing else in the round has,
so that the answer to a question about it can be searched for.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

_Item = TypeVar("_Item")

_THINGS = (
    "lantern", "ladder", "violin", "kettle", "anchor", "basket", "compass", "umbrella",
    "hammer", "saddle", "mirror", "teapot", "shovel", "candle", "blanket", "trumpet", "bucket",
    "whistle", "barrel", "wallet", "pillow", "bicycle", "drum", "telescope", "notebook",
    "helmet", "scarf", "guitar", "hatchet", "sledge", "cradle", "flute", "padlock", "broom",
    "carpet", "wheelbarrow", "microscope", "necklace", "typewriter", "thimble", "envelope",
    "spade", "clarinet", "mattress", "bracelet", "corkscrew", "goblet", "harness", "puppet",
    "rucksack", "sextant", "tripod", "vase", "windmill", "xylophone", "abacus", "banjo",
    "crowbar", "dagger", "easel", "funnel", "gramophone", "hourglass", "inkwell",
)  # fmt: skip
_DEEDS = (
    ("sold", "sell"), ("lost", "lose"), ("painted", "paint"), ("found", "find"), ("hid", "hide"),
    ("mended", "mend"), ("broke", "break"), ("borrowed", "borrow"), ("washed", "wash"),
    ("bought", "buy"), ("carried", "carry"), ("burned", "burn"), ("buried", "bury"),
    ("dropped", "drop"), ("polished", "polish"), ("weighed", "weigh"), ("measured", "measure"),
    ("packed", "pack"), ("forgot", "forget"), ("returned", "return"),
)  # fmt: skip
_PLACES = (
    "at the mill", "behind the chapel", "under the bridge", "in the barn", "on the roof",
    "at the station", "beside the well", "in the cellar", "near the gate", "in the attic",
    "by the fountain", "at the school", "in the orchard", "behind the theatre", "on the hill",
    "in the stable",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Question:
    """What an agent is asked about the round.

    A small model answers few questions in words of its own, so the answer's beginning is given,
    and what is asked for is the word that comes next.
    """

    text: str
    opening: str  # how the answer begins
    speaker: str  # whose block has the answer
    answer: str  # a word of that block that nothing else in the round has

    def answered_by(self, text: str) -> bool:
        """Say whether an answer has the word."""
        return self.answer in _words(text)


@dataclass(frozen=True, slots=True)
class Fact:
    """What an agent has done: the deed in both tenses, with what, and where."""

    did: str
    do: str
    thing: str
    place: str

    @property
    def sentence(self) -> str:
        """The fact, as the agent states it."""
        return f"I {self.did} the {self.thing} {self.place}."


def draw_facts(count: int, text: str, rng: np.random.Generator) -> list[Fact | None]:
    """A fact for each agent, about things that are new to `text`; None when these run out.

    Deeds and places are all different as long as there are enough of them.
    """
    words = _words(text)
    things = [thing for thing in shuffled(_THINGS, rng) if thing not in words]
    deeds, places = shuffled(_DEEDS, rng), shuffled(_PLACES, rng)
    facts: list[Fact | None] = [
        Fact(*deeds[index % len(deeds)], thing, places[index % len(places)])
        for index, thing in enumerate(things)
    ]
    return [*facts, *[None] * count][:count]


def ask_about_one(
    index: int, names: Sequence[str], facts: Sequence[Fact | None], rng: np.random.Generator
) -> Question | None:
    """A question about a fact that somebody else has stated, if any has."""
    of_others = [
        (name, fact)
        for other, (name, fact) in enumerate(zip(names, facts, strict=True))
        if other != index and fact is not None
    ]
    if not of_others:
        return None
    speaker, fact = of_others[int(rng.integers(len(of_others)))]
    return Question(
        f"What did {speaker} {fact.do}?", f"{speaker} {fact.did} the", speaker, fact.thing
    )


def shuffled(items: Sequence[_Item], rng: np.random.Generator) -> list[_Item]:
    """The same items in a random order."""
    return [items[index] for index in rng.permutation(len(items))]


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z]+", text.lower()))
