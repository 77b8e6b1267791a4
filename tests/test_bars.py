"""Bars in the terminal: to scale, in the width there is, with and without colour."""

import io
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from test_cli import AGENTS, Run, model, tokendance, write_trace
from test_view import TEN, MakeLLM, town
from tokendance import LLM, Prompt, private, shared
from tokendance.commands.bars import MAX_ROWS, Bars
from tokendance.view.recording import Recording

__all__ = ["model", "tokendance"]  # fixtures


class Screen:
    """A console of a fixed width, and what has been drawn on it."""

    def __init__(
        self, llm: LLM, width: int, *, colour: bool = False, encoding: str = "utf-8"
    ) -> None:
        self._bytes = io.BytesIO()
        self._file = io.TextIOWrapper(self._bytes, encoding=encoding)
        console = Console(
            file=self._file,
            width=width,
            force_terminal=colour,
            color_system="256" if colour else None,
            no_color=False,
            legacy_windows=False,
        )
        self._recording, self._bars = Recording(llm), Bars(console)

    def draw(self) -> list[str]:
        """Draw the last round; return the lines that are new."""
        self._bytes.seek(0)
        self._bytes.truncate()
        with self._recording.recorder.reading() as recorded:
            self._bars.print_last(recorded)
        self._file.flush()
        return self._bytes.getvalue().decode(self._file.encoding).splitlines()


def drawn_round(llm: LLM, screen: Screen, lengths: Iterable[int]) -> list[str]:
    """A round of 64 tokens that all read, and as many of each agent's own as `lengths` says."""
    news = [shared(list(range(100 + 32 * block, 132 + 32 * block))) for block in range(2)]
    prompts = [
        Prompt(
            [private([200 + index] * length), *news, private([10 + index] * 8)],
            agent=f"agent {index}",
        )
        for index, length in enumerate(lengths)
    ]
    llm.run_round(prompts, TEN).raise_for_errors()
    return screen.draw()


def test_a_round_to_scale(make_fake_llm: MakeLLM) -> None:
    """Two tokens a cell: 8 or 24 of its own, 64 of all, 8 of the task, 10 of the answer."""
    llm = make_fake_llm(correction="first:4")
    screen = Screen(llm, len("agent 0 ") + 53 + len(" 96 of 96"))
    ones = drawn_round(llm, screen, (8, 24))
    assert ones[:2] == [
        "agent 0 ####AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA????>>>>>         80 of 80",
        "agent 1 ############::aaaaaaaaaaaaaa::aaaaaaaaaaaaaa????>>>>> 40 of 96",
    ]
    assert "a read where it lies" in ones[2]
    # The next round reads what this one has computed, and there is no second legend.
    again = drawn_round(llm, screen, (8, 24))
    assert len(again) == 2
    assert all("aaaaaaaaaaaaa" in line and "A" not in line for line in again)
    assert screen.draw() == []  # nothing has happened since


@pytest.mark.parametrize("width", [1, 10, 20, 40, 79, 80, 200])
@pytest.mark.parametrize("colour", [False, True])
def test_no_line_is_wider_than_the_terminal(
    make_fake_llm: MakeLLM, width: int, colour: bool
) -> None:
    llm = make_fake_llm(num_pages=2000)
    screen = Screen(llm, width, colour=colour)
    lines = drawn_round(llm, screen, (8, 24))
    plain = [Text.from_ansi(line).plain for line in lines]
    assert max(map(len, plain)) <= width
    if width >= 20:  # there is room for names, and bars go before figures
        assert [line.split()[0][:4] for line in plain[:2]] == ["agen", "agen"]
        assert ("of 96" in plain[1]) == (width >= 40)


def test_a_run_has_one_colour_for_all_who_read_it(make_fake_llm: MakeLLM) -> None:
    llm = make_fake_llm(num_pages=2000)
    screen, session = Screen(llm, 100, colour=True), town(llm)
    session.run("Say something.")
    screen.draw()
    session.run("Go on.")
    lines = screen.draw()
    blue = "\x1b[38;5;33m"  # the first run's
    assert f"{blue}█" in lines[0]  # who computes it
    assert all(f"{blue}░" in line for line in lines[1:])
    assert all("\x1b[31m▄" in line for line in lines[1:])  # corrected
    session.run("And on.")
    third = screen.draw()
    assert all(f"{blue}░" in line and "\x1b[38;5;178m" in line for line in third)


def test_many_agents_are_folded(make_fake_llm: MakeLLM) -> None:
    llm = make_fake_llm(num_pages=4000, correction="edges:2+1")
    lines = drawn_round(llm, Screen(llm, 300), [8] * 60)
    assert len(lines) == MAX_ROWS + 2
    computed = 8 + 8 + 2 * 3  # its own, its task, and the edges of two blocks
    assert lines[MAX_ROWS] == f"and 48 more: {48 * computed:,} of {48 * 80:,} tokens computed"


def test_letters_where_only_ascii_can_be_written(make_fake_llm: MakeLLM) -> None:
    llm = make_fake_llm()
    lines = drawn_round(llm, Screen(llm, 80, colour=True, encoding="ascii"), (8, 24))
    assert any("A" in line for line in lines)


def test_a_name_with_a_line_break_keeps_its_line(make_fake_llm: MakeLLM) -> None:
    llm = make_fake_llm()
    screen = Screen(llm, 80)
    llm.run_round([Prompt("abc", agent="Ann\nBo\t[red]"), Prompt("abd", agent="日本語")], TEN)
    lines = screen.draw()
    assert lines[0].startswith("Ann Bo [red] #")
    assert lines[1].startswith("日本語       #")


@pytest.mark.parametrize(("options", "has_bars"), [([], True), (["--quiet"], False)])
def test_what_is_piped_is_plain_text(
    tokendance: Run,
    tmp_path: Path,
    model: str,
    options: list[str],
    has_bars: bool,
) -> None:
    trace = write_trace(tmp_path / "t.jsonl", *AGENTS)
    done = tokendance(
        "run", trace, "--model", model, "--rounds", "2", "--max-tokens", "5", *options
    )
    assert done.returncode == 0, done.stderr
    assert "Round 2, 2 agents" in done.stdout
    assert not set("─█░▄\x1b") & set(done.stdout)
    assert ("read where it lies" in done.stdout) == has_bars
    assert ("AA" in done.stdout) == has_bars


def test_nothing_is_drawn_of_a_round_in_which_all_failed(
    make_fake_llm: Callable[..., LLM],
) -> None:
    llm = make_fake_llm(num_pages=2)
    screen = Screen(llm, 80)
    llm.run_round([Prompt(list(range(100, 200)), agent="Ann")], TEN)
    assert screen.draw() == []
