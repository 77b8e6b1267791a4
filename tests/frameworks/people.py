"""The town that every client plays, and what the clients have in common.

Each client of this folder is called as `client.py URL AGENTS ROUNDS [WAY]` by the Python of the
frameworks, and prints what everybody said, round by round, as one line of JSON.
"""

import json
import sys
from dataclasses import dataclass
from enum import StrEnum

from pydantic import BaseModel, Field

MODEL = "smollm2-135m"
MAX_TOKENS = 40
TEMPERATURE = 0.8

OPENING = "The river is rising and the old bridge may not hold. What do you do, and who can help?"
NEXT = (
    "You have heard what the others do. Answer them in one or two sentences, and say what you will "
    "do next, and with whom."
)

_PEOPLE = {
    "Ann": (
        "You are Ann, who bakes the bread. Your oven stands in a cellar below the high water "
        "mark, and your flour is stored beside it."
    ),
    "Bo": "You are Bo, and the ferry is yours.",
    "Cy": (
        "Cy is your name, and you have been mayor for eleven years. You promised new chains "
        "for the quay last spring, and there was no money for them. The council meets when "
        "you call it, the church bell rings when you say so, and half of the town believes "
        "that you are asleep."
    ),
    "Dora": (
        "As Dora, the doctor, you have nine patients who cannot walk and one cart that can "
        "take two of them at a time."
    ),
    "Emil": (
        "Emil, the teacher, is who you are. Forty children are in your school on the hill, "
        "which is dry, has a kitchen and two stoves, and whose roof leaks over the library "
        "only. Their parents work on the other side of the bridge and cannot come back before"
        " dark. You have counted blankets twice and there are thirty."
    ),
    "Fay": "Your name is Fay. You fish at night and know where the current is slow.",
    "Gus": (
        "They call you Gus. You built the bridge with your father, you know which of its "
        "beams are rotten, and nobody has asked you about it since."
    ),
    "Hana": (
        "Hana runs the only shop, and that is you. Lamps, rope and nails are on your shelves,"
        " oil is not. Everybody owes you something, most of all the mayor, and you have never"
        " said a word about it to anyone but your sister."
    ),
    "Ivo": (
        "Old Ivo keeps the mill, and you are he. You can open the weir, but then the meadows "
        "of your neighbours are under water until autumn."
    ),
    "June": "It is your first week as a constable, June, and you do not know these people yet.",
}


class Place(StrEnum):
    """Where the people of the town can look."""

    BRIDGE = "bridge"
    MILL = "mill"
    QUAY = "quay"
    SCHOOL = "school"


_SIGHTS = {
    Place.BRIDGE: "The water is a hand below the planks, and the third beam has cracked.",
    Place.MILL: "The weir is shut, and the meadows behind it are still dry.",
    Place.QUAY: "Two chains hold, the third is gone, and the ferry pulls at its rope.",
    Place.SCHOOL: "The lamps are lit, the stoves are warm, and the roof drips on the books.",
}


def look(place: Place) -> str:
    """See how things stand at a place in the town.

    Args:
        place: where to look.
    """
    return _SIGHTS[Place(place)]


class Helper(BaseModel):
    """Somebody who can help."""

    name: str = Field(max_length=20)
    task: str = Field(max_length=60, description="what they can do")


class Plan(BaseModel):
    """What somebody does next."""

    action: str = Field(max_length=120, description="what you do, in a sentence")
    place: Place
    helper: Helper

    def told(self) -> str:
        """The plan as others hear it."""
        return f"{self.action} ({self.place.value}; {self.helper.name}: {self.helper.task})"


def heard(said: dict[str, str]) -> str:
    """What all have said, and the question of the next round, as one message for all."""
    return "\n".join([*(f"{name}: {text}" for name, text in said.items()), NEXT])


@dataclass(frozen=True)
class Call:
    """How a client was called.

    Attributes:
        base_url: of the server, as clients of OpenAI want it.
        people: system prompts by name.
        rounds: to play.
        way: one of several ways in which the client plays them.
    """

    base_url: str
    people: dict[str, str]
    rounds: int
    way: str


def read_call() -> Call:
    """Read the command line."""
    url, agents, rounds, *way = sys.argv[1:]
    people = dict(list(_PEOPLE.items())[: int(agents)])
    return Call(f"{url}/v1", people, int(rounds), way[0] if way else "")


def tell(rounds: list[dict[str, str]]) -> None:
    """Print what everybody said in each round."""
    print(json.dumps(rounds))
