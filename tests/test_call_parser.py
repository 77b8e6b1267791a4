"""Calls of tools in an answer as it grows: whatever the pieces in which it comes."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from conftest import examples
from tokendance.server.call_parser import Call, CallParser, Piece, Text, join
from tokendance.server.tool_format import ToolFormat

MARKED = ToolFormat()
BARE = ToolFormat("", "", "parameters")
BRACKETS = ToolFormat("[call] ", " [/call]")
NAMES = ["walk", "walk_far", "say"]


def read(
    text: str, tool_format: ToolFormat = MARKED, *, is_cut: bool = False, cuts: tuple[int, ...] = ()
) -> tuple[list[Piece], CallParser]:
    """What is made of a text that comes in pieces, cut at some places."""
    parser = CallParser(tool_format, NAMES)
    places = [0, *sorted(cuts), len(text)]
    pieces = [
        piece for begin, end in itertools.pairwise(places) for piece in parser.add(text[begin:end])
    ]
    return pieces + parser.finish(is_cut=is_cut), parser


def split(text: str, tool_format: ToolFormat = MARKED, **fields: Any) -> tuple[str, list[Call]]:
    return join(read(text, tool_format, **fields)[0])


def test_text_and_calls_are_told_apart() -> None:
    call = '<tool_call>\n{"name": "walk", "arguments": {"to": "a"}}\n</tool_call>'
    walk = Call("walk", '{"to": "a"}')
    assert split(f"I go.\n{call}") == ("I go.", [walk])
    assert split(f"{call}\n") == ("", [walk])
    assert split(f"{call} gone\n") == ("gone", [walk])
    assert split(f"I go.\n{call}\ngone") == ("I go.\n\ngone", [walk])
    inside = '<tool_call>{"name": "say", "arguments": {"a": "</tool_call>}\\""}}</tool_call> done'
    assert split(inside) == ("done", [Call("say", '{"a": "</tool_call>}\\""}')])
    for other in ("no call", " a < b ", "<tool_call> none", "<tool_call>[]</tool_call>", "</tool_"):
        assert split(other) == (other, [])


def test_a_call_without_marks_is_the_whole_answer() -> None:
    text = '{"name": "walk", "parameters": {"to": "a"}}'
    assert split(text, BARE) == ("", [Call("walk", '{"to": "a"}')])
    for other in (
        "",
        "no call",
        f"a {text}",
        '{"name": "walk", "arguments": {}}',
        "{}",
        '{"name": ',
    ):
        assert split(other, BARE) == (other, [])


@pytest.mark.parametrize("tool_format", [MARKED, BARE, BRACKETS])
def test_wherever_it_is_cut_off_no_mark_is_text(tool_format: ToolFormat) -> None:
    arguments = {"to": 'a "mark" }', "n": [1, {"b": None}]}
    call = tool_format.write("walk", arguments)
    text = call if not tool_format.begin else f"I go.\n{call}\n{tool_format.write('say', 1)}"
    for end in range(len(text) + 1):
        pieces, parser = read(text[:end], tool_format, is_cut=True)
        found, calls = join(pieces)
        assert found in ("I go.", "I go.\n")[: 1 + (end < 7)] or "I go.\n".startswith(found)
        assert [call.name for call in calls] == ["walk", "say"][: len(calls)]
        for one, whole in zip(calls, (json.dumps(arguments), "1"), strict=False):
            assert whole.startswith(one.arguments)
        done = [len(call) if not tool_format.begin else len(f"I go.\n{call}"), len(text)]
        assert parser.ends_with_call == (end in done or (0 < end - done[0] < 2))
        assert not (parser.is_in_call and parser.ends_with_call)


def test_a_call_goes_out_as_it_grows() -> None:
    parser = CallParser(MARKED, NAMES)
    text = "I go <far>.\n" + MARKED.write("say", {"what": "good morning to you"})
    first: dict[str, int] = {}
    for number, character in enumerate(text):
        for piece in parser.add(character):
            key = "text" if isinstance(piece, Text) else type(piece).__name__
            first.setdefault(key, number)
    assert first["text"] == 0
    assert text[: first["CallBegins"] + 1].endswith('"say", "arguments":')
    assert first["Arguments"] == first["CallBegins"] + 2


def test_a_call_that_repeats_the_one_before_is_left_out() -> None:
    walk, far = (MARKED.write("walk", {"to": to}) for to in ("pub", "pub and park"))
    say = MARKED.write("say", {"to": "pub"})
    pieces, parser = read(f"{walk}\n{walk}\n{far}{say}{far}{walk}")
    assert [(call.name, json.loads(call.arguments)["to"]) for call in join(pieces)[1]] == [
        ("walk", "pub"), ("walk", "pub and park"), ("say", "pub"), ("walk", "pub and park"),
        ("walk", "pub"),
    ]  # fmt: skip
    assert (parser.num_calls, parser.num_repeated) == (5, 1)
    assert len(split(walk + walk[:-20], is_cut=True)[1]) == 1


FRAGMENTS = [
    "<tool_call>", "<tool", "\n", " ", '{"name": "walk', '", "arguments": ', "{", "}", '"', "\\",
    "</tool_call>", "[call] ", " [/call]", "word", '{"name": "say", "parameters": ', "é🧀",
    MARKED.write("walk", {"a": "b"}), MARKED.write("walk_far", {}), BARE.write("say", {"a": 1}),
    BRACKETS.write("say", {"x": ["[/call]"]}),
]  # fmt: skip


@settings(max_examples=examples(300))
@given(
    fragments=st.lists(st.sampled_from(FRAGMENTS), max_size=8),
    cuts=st.lists(st.integers(0, 300), max_size=20),
    tool_format=st.sampled_from([MARKED, BARE, BRACKETS]),
    is_cut=st.booleans(),
)
@example(fragments=["<tool", "<tool_call>"], cuts=[3], tool_format=MARKED, is_cut=False)
def test_the_pieces_in_which_it_comes_make_no_difference(
    fragments: list[str], cuts: list[int], tool_format: ToolFormat, is_cut: bool
) -> None:
    text = "".join(fragments)
    whole, whole_parser = read(text, tool_format, is_cut=is_cut)
    places = tuple(cut % (len(text) + 1) for cut in cuts)
    for some in (places, tuple(range(len(text)))):
        pieces, parser = read(text, tool_format, is_cut=is_cut, cuts=some)
        assert join(pieces) == join(whole)
        for name in ("num_calls", "num_repeated", "ends_with_call", "is_in_call"):
            assert getattr(parser, name) == getattr(whole_parser, name)


@settings(max_examples=examples(100))
@given(
    calls=st.lists(
        st.tuples(
            st.sampled_from(NAMES),
            st.dictionaries(st.text(max_size=4), st.text(max_size=6) | st.integers(), max_size=3),
        ),
        max_size=4,
    ),
    words=st.sampled_from(["", "I go.\n", "a < b\n"]),
    tool_format=st.sampled_from([MARKED, BRACKETS]),
)
def test_what_is_written_is_read(
    calls: list[tuple[str, dict[str, Any]]], words: str, tool_format: ToolFormat
) -> None:
    text = words + "\n".join(tool_format.write(*call) for call in calls)
    found, read_calls = split(text, tool_format)
    wanted = [call for index, call in enumerate(calls) if index == 0 or call != calls[index - 1]]
    assert [(call.name, json.loads(call.arguments)) for call in read_calls] == wanted
    assert found == (words.rstrip() if calls else words)
