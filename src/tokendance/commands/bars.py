"""A round as bars in the terminal: each agent's prompt to scale, a small version of the page's.

    Ann ██████████████████████████████████▌▌     566 of 566
    Bo  █████████▄░░░▄░░░▄░░░▄░░░▄░░░▄░░██▌▌     106 of 566

A cell stands for so many tokens, and is what most of them are. Where there is no colour, or nothing
but ASCII, it is a letter: one for each run, in upper case where the run is computed.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from rich.cells import set_cell_size
from rich.console import Console
from rich.text import Text

from tokendance.collector.plan import Role
from tokendance.store.entries import RoundId, RunId
from tokendance.view.recorder import Recorded
from tokendance.view.rounds import NO_RUN, RecordedAgent, RecordedRound

MAX_ROWS = 12
_MAX_WIDTH = 120  # columns; wider bars say no more
_MAX_NAME = 18
_MIN_BAR = 16
_PRIVATE, _TASK, _CORRECTED, _ANSWER = "grey50", "none", "red", "spring_green3"
_OF_RUNS = ("dodger_blue1", "gold3", "medium_purple1", "turquoise2", "hot_pink", "chartreuse3")
_READ = (Role.PREFIX, Role.REUSED, Role.COPIED)
Cell = tuple[str, str]  # what is drawn, and in which style


class Bars:
    """Draws rounds of a run, one after the other. A run has the same colour in all of them."""

    def __init__(self, console: Console) -> None:
        """Draw on a console, as well as it can."""
        self._console = console
        self._has_colour = console.color_system is not None and not console.no_color
        self._has_blocks = self._has_colour and not console.options.ascii_only
        self._drawn: RoundId | None = None
        self._numbers: dict[RunId, int] = {}
        self._next = itertools.count()

    def print_last(self, recorded: Recorded) -> None:
        """Draw the last round, if it has not been drawn yet."""
        if recorded.rounds and recorded.rounds[-1].round_id != self._drawn:
            is_first, self._drawn = self._drawn is None, recorded.rounds[-1].round_id
            self._print_round(recorded.rounds[-1])
            if is_first:
                self._print(self._legend())

    def _print(self, line: Text) -> None:
        self._console.print(line, highlight=False)

    def _print_round(self, one: RecordedRound) -> None:
        agents = sorted(one.agents.values(), key=lambda agent: agent.request)
        self._number_runs(agents)
        shown, more = agents[:MAX_ROWS], agents[MAX_ROWS:]
        figures = [f" {agent.num_computed:,} of {agent.num_prompt:,}" for agent in shown]
        width = min(self._console.width, _MAX_WIDTH)
        names = [" ".join(agent.agent.split()) for agent in shown]
        name_width = min(_MAX_NAME, width // 4, max(map(len, names)))
        figure_width = max(map(len, figures))
        bar_width = width - name_width - 1 - figure_width
        if bar_width < _MIN_BAR:  # the bars are what is wanted
            figures, bar_width = [""] * len(figures), max(1, width - name_width - 1)
        scale = max(agent.num_prompt + agent.num_generated for agent in agents) / bar_width
        for name, agent, figure in zip(names, shown, figures, strict=True):
            line = Text(set_cell_size(name, name_width) + " ", no_wrap=True, overflow="crop")
            cells = list(self._cells(agent, scale))
            for style, alike in itertools.groupby(cells, key=lambda cell: cell[1]):
                line.append("".join(glyph for glyph, _ in alike), style)
            line.append(
                " " * (bar_width - len(cells)) + figure.rjust(figure_width if figure else 0)
            )
            line.rstrip()
            self._print(line)
        if more:
            computed = sum(agent.num_computed for agent in more)
            prompt = sum(agent.num_prompt for agent in more)
            self._print(Text(f"and {len(more)} more: {computed:,} of {prompt:,} tokens computed"))

    def _number_runs(self, agents: Sequence[RecordedAgent]) -> None:
        """Keep the numbers of runs that are read on, and give one to those that are new."""
        here = {RunId(run) for agent in agents for run in agent.pieces[:, 4].tolist()} - {NO_RUN}
        self._numbers = {
            run: self._numbers[run] if run in self._numbers else next(self._next)
            for run in sorted(here)
        }

    def _cells(self, agent: RecordedAgent, scale: float) -> Iterator[Cell]:
        """What is drawn of an agent.

        Args:
            agent: whose prompt it is.
            scale: tokens of a cell.
        """
        num_cells = round(agent.num_prompt / scale)
        edges = np.linspace(0, agent.num_prompt, num_cells + 1)
        pieces = agent.pieces
        at = np.searchsorted(pieces[:, 1], (edges[:-1] + edges[1:]) / 2, side="right")
        # A few tokens of each block are corrected, which is less than a cell. There are as many
        # cells of them as they fill, each where the next is due.
        due = 0.0
        for piece, corrected in zip(
            at.tolist(), np.diff(_corrected_before(pieces, edges)), strict=True
        ):
            _, _, role, part, run, _ = pieces[piece].tolist()
            due += corrected / scale
            if due >= 1 / 2 and role in (Role.REUSED, Role.CORRECTED):
                due -= 1
                yield self._cell(":", "▄", _CORRECTED)
            else:
                is_read = role in (*_READ, Role.CORRECTED)
                yield self._prompt_cell(agent.parts[part].kind, RunId(run), is_read=is_read)
        stop = round((agent.num_prompt + agent.num_generated) / scale)
        for _ in range(max(stop - num_cells, int(agent.num_generated > 0))):
            yield self._cell(">", "▌", _ANSWER)

    def _prompt_cell(self, kind: str, run: RunId, *, is_read: bool) -> Cell:
        block = "░" if is_read else "█"
        if kind == "shared" and run in self._numbers:
            number = self._numbers[run]
            letter = chr(ord("a" if is_read else "A") + number % 26)
            return self._cell(letter, block, _OF_RUNS[number % len(_OF_RUNS)])
        letter = "=" if is_read else "?" if kind == "task" else "#"
        return self._cell(letter, block, _TASK if kind == "task" else _PRIVATE)

    def _cell(self, letter: str, block: str, style: str) -> Cell:
        return (block if self._has_blocks else letter), (style if self._has_colour else "none")

    def _legend(self) -> Text:
        cells = (
            (self._cell("#", "█", _PRIVATE), "private"),
            (self._cell("?", "█", _TASK), "task"),
            (self._cell("A", "█", _OF_RUNS[0]), "shared, computed"),
            (self._cell("a", "░", _OF_RUNS[0]), "read where it lies"),
            (self._cell("=", "░", _PRIVATE), "kept from before"),
            (self._cell(":", "▄", _CORRECTED), "corrected"),
            (self._cell(">", "▌", _ANSWER), "answer"),
        )
        text = Text()
        for (glyph, style), meaning in cells:
            text.append(glyph, style).append(f" {meaning}  ")
        text.append("(of N: computed of the prompt's tokens)")
        return text


def _corrected_before(
    pieces: npt.NDArray[np.int32], positions: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Corrected tokens before each of some positions, float64, of the same shape."""
    corrected = pieces[pieces[:, 2] == Role.CORRECTED]
    edges = corrected[:, :2].ravel()
    if not edges.size:
        return np.zeros_like(positions)
    lengths = np.stack([np.zeros(len(corrected)), corrected[:, 1] - corrected[:, 0]], axis=1)
    before = np.interp(positions, edges, lengths.cumsum(axis=None), left=0.0)
    return np.asarray(before, np.float64)
