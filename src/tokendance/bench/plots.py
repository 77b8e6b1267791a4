"""Figures of the suites, drawn with matplotlib, which is imported when one is asked for.

All raise a ConfigError if it is not installed.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokendance.bench.suite import Row, SuiteResult
from tokendance.errors import ConfigError
from tokendance.results import write_result

# Okabe and Ito's colours, which colour-blind readers tell apart; each with a shape of its own.
_STYLES = {
    "same": ("#0072B2", "o", "the same order for all"),
    "own-first": ("#E69F00", "s", "own block first"),
    "permuted": ("#D55E00", "^", "another order for each"),
}
NO_MATPLOTLIB = "Plots need matplotlib. Install it with `pip install 'tokendance[bench]'`."
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000")
_SHAPES = "o^sDvPX"
_FLOOR = 1e-7  # nats; what full correction leaves in float32 is rounding


def draw_lines(
    path: Path,
    rows: Iterable[Row],
    name: str,
    x: str,
    y: str,
    *,
    title: str,
    y_label: str,
    log_y: bool = False,
) -> None:
    """Draw lines as an SVG; a row is a point at its keys `x` and `y` of the line in `name`."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        lines.setdefault(row[name], []).append((row[x], row[y]))
    with _figure(path, title) as axes:
        for index, (label, points) in enumerate(lines.items()):
            axes.plot(
                *zip(*sorted(points), strict=True),
                label=label,
                color=_COLOURS[index % len(_COLOURS)],
                marker=_SHAPES[index % len(_SHAPES)],
            )
        if log_y:
            axes.set_yscale("log")
        axes.set_xlabel(x)
        axes.set_ylabel(y_label)
        axes.grid(visible=True, which="major", alpha=0.3)


def draw_bars(
    path: Path, rows: Iterable[Row], name: str, group: str, height: str, *, title: str, y_label: str
) -> None:
    """Draw groups of bars as an SVG; a row is a bar, those of one `name` have one colour."""
    bars: dict[str, dict[str, float]] = {}
    for row in rows:
        bars.setdefault(row[name], {})[row[group]] = round(row[height], 3)
    with _figure(path, title) as axes:
        groups = list(dict.fromkeys(place for heights in bars.values() for place in heights))
        width = 0.8 / len(bars)
        for index, (label, heights) in enumerate(bars.items()):
            lefts = [groups.index(place) + (index - len(bars) / 2) * width for place in heights]
            colour = _COLOURS[index % len(_COLOURS)]
            drawn = axes.bar(
                lefts, list(heights.values()), width, align="edge", label=label, color=colour
            )
            axes.bar_label(drawn, fontsize=8)
        axes.set_xticks(range(len(groups)), groups)
        axes.set_ylabel(y_label)


def plot_frontier(result: SuiteResult, path: Path) -> None:
    """Draw KL against the share of corrected tokens as an SVG: a line for each order.

    Rows of float32 only. Full correction is left out, since it costs all and its KL is rounding.
    """
    with _figure(path, f"{result.model}, float32: what correction buys") as axes:
        for order, (colour, shape, label) in _STYLES.items():
            rows = [
                row for row in result.rows if (row["dtype"], row["order"]) == ("float32", order)
            ]
            by_mode: dict[str, list[Row]] = {"collective": [], "pic": [], "pic-batched": []}
            for row in rows:
                if row["correction"] != "all":
                    by_mode[row["mode"]].append(row)
            reused = by_mode["collective"]
            edges = [row for row in reused if "+" in row["correction"]]
            line = [row for row in reused if row not in edges]
            line.sort(key=lambda row: float(row["corrected_share"]))
            _draw(axes, line, f"collective, {label}", colour, marker=shape, linestyle="-")
            _draw(axes, edges, f"first + last, {label}", colour, marker="*", markersize=11)
            for mode, fill in (("pic", "none"), ("pic-batched", "white")):
                style = {"marker": shape, "markersize": 10, "markerfacecolor": fill}
                _draw(axes, by_mode[mode], f"{mode}, {label}", colour, **style)
            for row in reused if order == "same" else ():
                axes.annotate(
                    row["correction"],
                    (100 * row["corrected_share"], max(row["kl"], _FLOOR)),
                    xytext=(4, -11),
                    textcoords="offset points",
                    fontsize=8,
                    color=colour,
                )
        axes.set_yscale("log")
        axes.set_xlim(left=-0.5)
        axes.set_xlabel("shared tokens that a mirror computes afresh, %")
        axes.set_ylabel("KL from full computation, nats per token")
        axes.grid(visible=True, which="major", alpha=0.3)


def _draw(axes: Any, rows: Sequence[Row], label: str, colour: str, **style: Any) -> None:
    """One set of points, if there are any, with the spread over workloads."""
    if not rows:
        return
    kl = [max(row["kl"], _FLOOR) for row in rows]
    below = [max(0.0, y - max(row["kl_min"], _FLOOR)) for y, row in zip(kl, rows, strict=True)]
    above = [max(0.0, row["kl_max"] - y) for y, row in zip(kl, rows, strict=True)]
    common = {"linestyle": "none", "linewidth": 1.5, "elinewidth": 0.8, "capsize": 2}
    axes.errorbar(
        [100 * row["corrected_share"] for row in rows],
        kl,
        yerr=[below, above],
        color=colour,
        label=label,
        markeredgewidth=1.5,
        **common | style,
    )


@contextmanager
def _figure(path: Path, title: str) -> Iterator[Any]:
    """Axes to draw on; saved as an SVG, with title and legend, when that is done."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(NO_MATPLOTLIB) from error
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    yield axes
    axes.set_title(title, fontsize=11)
    axes.legend(fontsize=8, frameon=False)
    drawing = io.StringIO()
    figure.savefig(drawing, format="svg")
    plt.close(figure)
    write_result(path, drawing.getvalue(), "Give another path.")
