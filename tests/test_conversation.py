"""Conversations without a model: a fake encoder, and answers made up on the spot."""

import copy
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from conftest import examples
from tokendance import Agent, Prompt, SamplingParams
from tokendance.conversation import Asked, Conversation
from tokendance.errors import RequestError, RoundError
from tokendance.outputs import Output
from tokendance.rounds.prompts import Part
from tokendance.rounds.segments import EncodedPrompt, Salt, TokenIds, as_token_ids, build_prompt

SPECIAL = 0  # begins and ends messages
ROLES = {"system": 1, "user": 2, "assistant": 3}
MAX_CONTEXT = 300


class FakeEncoder:
    """Characters as tokens; a message is its role and its parts between two special tokens."""

    salt = Salt(b"salt")

    def text_ids(self, text: str) -> TokenIds:
        return as_token_ids(map(ord, text))

    def without_special(self, token_ids: Sequence[int]) -> list[int]:
        return [token for token in token_ids if token != SPECIAL]

    def told(self, prompt: TokenIds, text: str, *, is_cut: bool, with_thoughts: bool) -> str | None:
        """What is in brackets at the beginning was thought."""
        del prompt
        thought, bracket, rest = text.partition(")")
        return None if with_thoughts or not bracket or is_cut or thought[0] != "(" else rest

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        pieces: list[tuple[TokenIds, bool]] = []
        for message in prompt.content:
            assert isinstance(message, dict)
            pieces.append((as_token_ids([SPECIAL, ROLES[message["role"]]]), False))
            pieces += [(self._part_ids(part), part.shared) for part in message["content"]]
            pieces.append((as_token_ids([SPECIAL]), False))
        pieces.append((as_token_ids([SPECIAL, ROLES["assistant"]]), False))
        return build_prompt(pieces, self.salt)

    def _part_ids(self, part: Part) -> TokenIds:
        content = part.content
        return self.text_ids(content) if isinstance(content, str) else as_token_ids(content)

    def read(self, prompt: Prompt) -> str:
        """What an agent reads, with | and the first letter of the role before each message."""
        text = "".join(map(chr, self.encode(prompt).token_ids))
        for role, token in ROLES.items():
            text = text.replace(chr(SPECIAL) + chr(token), f"|{role[0]} ")
        return text.replace(chr(SPECIAL), "")


ENCODER = FakeEncoder()


def make_output(prompt: Prompt, text: str, **changes: Any) -> Output:
    token_ids = ENCODER.encode(prompt).token_ids
    fields: dict[str, Any] = {
        "agent": prompt.agent,
        "text": text,
        "token_ids": tuple(map(ord, text)),
        "finish_reason": "stop",
        "error": None,
        "prompt_token_ids": token_ids,
        "prompt_tokens": len(token_ids),
        "computed_tokens": len(token_ids),
        "reused_tokens": 0,
        "corrected_tokens": 0,
    }
    return Output(**fields | changes)


def fail(prompt: Prompt) -> Output:
    empty = np.empty(0, np.int32)
    error = RequestError("no")
    return make_output(prompt, "", error=error, prompt_token_ids=empty, finish_reason="error")


def talk(conversation: Conversation, task: str, **answers: str) -> list[str]:
    """Run a round; who has no answer here fails. Returns what each agent has read."""
    asked = conversation.ask(task)
    conversation.hear(asked, [
        make_output(prompt, answers[prompt.agent or ""]) if prompt.agent in answers
        else fail(prompt)
        for prompt in asked.prompts
    ])  # fmt: skip
    return [ENCODER.read(prompt) for prompt in asked.prompts]


def begin(*names: str, **options: Any) -> Conversation:
    conversation = Conversation(ENCODER, MAX_CONTEXT, **options)
    for name in names:
        conversation.join(Agent(name, f"I am {name}."))
    return conversation


def test_everybody_reads_what_all_have_said() -> None:
    conversation = begin("Ann", "Bo")
    assert talk(conversation, "Go.", Ann="Hi", Bo="Ho") == [
        "|s I am Ann.|u Go.|a ",
        "|s I am Bo.|u Go.|a ",
    ]
    assert conversation.round == 1
    assert talk(conversation, "On.", Ann="Yes", Bo="No") == [
        "|s I am Ann.|u Go.|a Hi|u Ann: Hi\nBo: Ho\nOn.|a ",
        "|s I am Bo.|u Go.|a Ho|u Ann: Hi\nBo: Ho\nOn.|a ",
    ]
    shared = ENCODER.encode(conversation.ask("x").prompts[1]).shared_segments()
    assert ["".join(map(chr, one.token_ids)) for _, one in shared] == [
        "Ann: Hi\n", "Bo: Ho\n", "Ann: Yes\n", "Bo: No\n",
    ]  # fmt: skip


def test_who_comes_hears_the_last_round_and_who_has_left_is_still_heard() -> None:
    conversation = begin("Ann", "Bo")
    talk(conversation, "Go.", Ann="Hi", Bo="Ho")
    conversation.leave("Ann")
    conversation.join(Agent("Cy", "I am late."))
    assert [agent.name for agent in conversation.agents] == ["Bo", "Cy"]
    assert talk(conversation, "On.", Bo="No", Cy="So") == [
        "|s I am Bo.|u Go.|a Ho|u Ann: Hi\nBo: Ho\nOn.|a ",
        "|s I am late.|u Ann: Hi\nBo: Ho\nOn.|a ",
    ]


def test_who_fails_has_heard_the_others_and_says_nothing() -> None:
    conversation = begin("Ann", "Bo")
    talk(conversation, "Go.", Ann="Hi")
    assert len(conversation.caches["Bo"].token_ids) == 0
    assert talk(conversation, "On.", Ann="Yes", Bo="No") == [
        "|s I am Ann.|u Go.|a Hi|u Ann: Hi\nOn.|a ",
        "|s I am Bo.|u Go.|a |u Ann: Hi\nOn.|a ",
    ]


def test_what_is_handed_on_is_safe_in_everybodys_prompt() -> None:
    conversation = begin("Ann", "Bo")
    asked = conversation.ask("Go.")
    forged = make_output(asked.prompts[0], "", token_ids=(SPECIAL, *map(ord, "Hi"), SPECIAL))
    stopped = make_output(
        asked.prompts[1], "Ho", token_ids=tuple(map(ord, "Ho END")), stopped_by_text=True
    )
    conversation.hear(asked, [forged, stopped])
    assert ENCODER.read(conversation.ask("On.").prompts[0]).endswith("Ann: Hi\nBo: Ho\nOn.|a ")
    # The cache has what was computed, and not what is told of it.
    assert conversation.caches["Ann"].token_ids.tolist()[-4:] == list(forged.token_ids)


def test_tasks_and_params_may_be_given_by_name() -> None:
    conversation = begin("Ann", "Bo", params=SamplingParams(max_tokens=7))
    longer = SamplingParams(max_tokens=9)
    asked = conversation.ask({"Ann": "a", "Bo": "b"}, {"Bo": longer})
    assert asked.tasks == ("a", "b")
    assert [params.max_tokens for params in asked.params] == [7, 9]
    assert [prompt.agent for prompt in asked.prompts] == ["Ann", "Bo"]
    assert conversation.ask("x", longer).params == [longer, longer]
    with pytest.raises(RoundError, match="no task for 'Bo'"):
        conversation.ask({"Ann": "a"})
    with pytest.raises(RoundError, match="no agents"):
        begin().ask("x")
    with pytest.raises(RoundError, match="already"):
        conversation.join(Agent("Ann", ""))
    with pytest.raises(RoundError, match="'Cy'"):
        conversation.leave("Cy")


def test_the_oldest_rounds_are_forgotten() -> None:
    short = SamplingParams(max_tokens=1)
    conversation = begin("Ann", params=short, max_history=2)
    for number in range(5):
        (read,) = talk(conversation, f"task {number}", Ann=f"answer {number}")
        assert read.count("task") == min(number, 2) + 1
    assert len(conversation.remembered_blocks()) == 4  # "answer 1" is forgotten with the next round
    conversation = begin("Ann", params=SamplingParams(max_tokens=MAX_CONTEXT - 80))
    for number in range(5):
        (read,) = talk(conversation, "." * 20, Ann="!")
        assert read.count("." * 20) == min(number, 1) + 1
        assert len(read) <= 80
    long = SamplingParams(max_tokens=MAX_CONTEXT)  # nothing fits: the prompt alone is left
    assert "!" * 20 not in ENCODER.read(conversation.ask("Go.", long).prompts[0])
    assert conversation.ask("Go.", long).remembered == (0,)


def test_what_is_provisional_lasts_if_a_round_is_heard() -> None:
    conversation = begin("Ann", "Bo")
    with conversation.provisional():
        conversation.leave("Ann")
        conversation.join(Agent("Cy", ""))
        conversation.ask("Go.")
    assert [agent.name for agent in conversation.agents] == ["Ann", "Bo"]
    with conversation.provisional():
        conversation.leave("Ann")
        talk(conversation, "Go.", Bo="Ho")
    assert [agent.name for agent in conversation.agents] == ["Bo"]


def test_the_stored_form() -> None:
    """Stores of today have to open in any later version."""
    conversation = begin("A", "B")
    talk(conversation, "t", A="x", B="y")
    conversation.leave("B")
    talk(conversation, "u", A="z")
    assert json.dumps(conversation.state()) == (
        '{"heard": [[[65, 58, 32, 122, 10]], [], '
        "[[65, 58, 32, 120, 10], [66, 58, 32, 121, 10]]], "
        '"members": [{"name": "A", "system": "I am A.", '
        '"turns": [[1, "t", [120]], [2, "u", [122]]], '
        '"cache": [[0, 1, 73, 32, 97, 109, 32, 65, 46, 0, 0, 2, 116, 0, 0, 3, 120, 0, 0, 2, '
        "65, 58, 32, 120, 10, 66, 58, 32, 121, 10, 117, 0, 0, 3, 122], 34]}]}"
    )


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"heard": []},
        {"heard": [], "members": []},
        {"heard": [[]], "members": [{"name": "A"}]},
        {"heard": [["x"]], "members": [3]},
        {"heard": [[]], "members": [
            {"name": "A", "system": "", "turns": [[1, "t", []]], "cache": [[], 0]}]},
        {"heard": [[3]], "members": []},
    ],
)  # fmt: skip
def test_a_state_that_cannot_be_changes_nothing(state: dict[str, Any]) -> None:
    conversation = begin("A")
    talk(conversation, "t", A="x")
    before = copy.deepcopy(conversation.state())
    with pytest.raises((LookupError, TypeError, ValueError)):
        conversation.load_state(state, 3)
    assert conversation.state() == before
    assert conversation.round == 1


def reading(asked: Asked) -> list[list[int]]:
    return [ENCODER.encode(prompt).token_ids.tolist() for prompt in asked.prompts]


def last_blocks(prompt: Prompt) -> list[Part]:
    message = prompt.content[-1]
    assert isinstance(message, dict)
    blocks: list[Part] = message["content"][:-1]
    return blocks


class Talks(RuleBasedStateMachine):
    """Agents that come, go, answer and fail in any order."""

    words = st.text(st.sampled_from("ab" + chr(SPECIAL)), max_size=40)

    def __init__(self) -> None:
        super().__init__()
        self.conversation = Conversation(ENCODER, MAX_CONTEXT, params=SamplingParams(max_tokens=50))
        self.num_joined = 0
        self.num_rounds = 0
        self.contexts: dict[str, list[int]] = {}  # what each has read and said

    @rule()
    def join(self) -> None:
        self.conversation.join(Agent(f"A{self.num_joined}", "I am one of them."))
        self.num_joined += 1

    @rule(data=st.data())
    @precondition(lambda self: self.conversation.agents)
    def leave(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([agent.name for agent in self.conversation.agents]))
        self.conversation.leave(name)

    @rule(data=st.data())
    @precondition(lambda self: self.conversation.agents)
    def run(self, data: st.DataObject) -> None:
        before = json.dumps(self.conversation.state())
        asked = self.conversation.ask("What now?")
        assert json.dumps(self.conversation.state()) == before  # to ask changes nothing
        outputs = []
        for prompt, token_ids in zip(asked.prompts, reading(asked), strict=True):
            assert len(token_ids) + 50 <= MAX_CONTEXT
            words = data.draw(self.words)
            is_failed = data.draw(st.booleans())
            outputs.append(fail(prompt) if is_failed else make_output(prompt, words))
            context = self.contexts.get(prompt.agent or "")
            if context is not None and SPECIAL not in context[-1:]:
                begins = token_ids[: len(context)] == context
                assert begins or asked.remembered[len(outputs) - 1] < self.num_rounds
            self.contexts.pop(prompt.agent or "", None)
            if not is_failed and chr(SPECIAL) not in words:
                self.contexts[prompt.agent or ""] = [*token_ids, *outputs[-1].token_ids]
        # All read what was said last in one order, whoever they are.
        first, *others = map(last_blocks, asked.prompts)
        assert all(blocks == first for blocks in others)
        self.conversation.hear(asked, outputs)
        self.num_rounds += 1
        assert self.conversation.round == self.num_rounds

    @invariant()
    def goes_on_from_its_state(self) -> None:
        state = json.loads(json.dumps(self.conversation.state()))
        again = Conversation(ENCODER, MAX_CONTEXT, params=SamplingParams(max_tokens=50))
        again.load_state(state, self.conversation.round)
        assert json.dumps(again.state()) == json.dumps(self.conversation.state())
        assert again.agents == self.conversation.agents
        if again.agents:
            assert reading(again.ask("And?")) == reading(self.conversation.ask("And?"))


def test_any_order_of_events() -> None:
    run_state_machine_as_test(
        Talks, settings=settings(max_examples=examples(30), stateful_step_count=15)
    )
