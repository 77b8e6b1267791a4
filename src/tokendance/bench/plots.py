"""Figures of the suites, drawn with matplotlib, which is imported when one is asked for."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokendance.bench.suite import Row, SuiteResult
from tokendance.errors import ConfigError

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
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_y: bool = False,
) -> None:
    """Draw lines as an SVG.

    Args:
        path: of the file to write.
        lines: points by the name of their line.
        title: above.
        x_label: below.
        y_label: at the side.
        log_y: logarithmic axis.

    Raises:
        ConfigError: if matplotlib is not installed.
    """
    with _figure(path, title) as axes:
        for index, (name, points) in enumerate(lines.items()):
            x, y = zip(*sorted(points), strict=True)
            axes.plot(
                x,
                y,
                label=name,
                color=_COLOURS[index % len(_COLOURS)],
                marker=_SHAPES[index % len(_SHAPES)],
            )
        if log_y:
            axes.set_yscale("log")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(visible=True, which="major", alpha=0.3)


def draw_bars(
    path: Path, bars: Mapping[str, Mapping[str, float]], *, title: str, y_label: str
) -> None:
    """Draw groups of bars as an SVG.

    Args:
        path: of the file to write.
        bars: for each bar's name its height in each group.
        title: above.
        y_label: at the side.

    Raises:
        ConfigError: if matplotlib is not installed.
    """
    with _figure(path, title) as axes:
        groups = list(dict.fromkeys(group for heights in bars.values() for group in heights))
        width = 0.8 / len(bars)
        for index, (name, heights) in enumerate(bars.items()):
            places = [groups.index(group) + (index - len(bars) / 2) * width for group in heights]
            colour = _COLOURS[index % len(_COLOURS)]
            drawn = axes.bar(
                places, list(heights.values()), width, align="edge", label=name, color=colour
            )
            axes.bar_label(drawn, fontsize=8)
        axes.set_xticks(range(len(groups)), groups)
        axes.set_ylabel(y_label)


def plot_frontier(result: SuiteResult, path: Path) -> None:
    """Draw KL against the share of corrected tokens as an SVG: a line for each order.

    Rows of float32 only. Full correction is left out, since it costs all and its KL is rounding.

    Args:
        result: of the suite "fidelity".
        path: of the file to write.

    Raises:
        ConfigError: if matplotlib is not installed.
    """
    with _figure(path, f"{result.model}, float32: what correction buys") as axes:
        for order, (colour, shape, label) in _STYLES.items():
            rows = [
                row for row in result.rows if (row["dtype"], row["order"]) == ("float32", order)
            ]
            reused = [
                row for row in rows if row["mode"] == "collective" and row["correction"] != "all"
            ]
            edges = [row for row in reused if "+" in row["correction"]]
            line = sorted(
                (row for row in reused if row not in edges),
                key=lambda row: float(row["corrected_share"]),
            )
            if line:
                _draw(
                    axes,
                    line,
                    colour=colour,
                    shape=shape,
                    label=f"collective, {label}",
                    joined=True,
                )
            if edges:
                name = f"first + last, {label}"
                _draw(axes, edges, colour=colour, shape="*", label=name, size=11)
            for mode, fill in (("pic", "none"), ("pic-batched", "white")):
                points = [row for row in rows if row["mode"] == mode]
                if points:
                    name = f"{mode}, {label}"
                    _draw(axes, points, colour=colour, shape=shape, label=name, fill=fill, size=10)
            if order == "same":
                for row in reused:
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


def _draw(
    axes: Any,
    rows: list[Row],
    *,
    colour: str,
    shape: str,
    label: str,
    joined: bool = False,
    fill: str | None = None,
    size: int = 6,
) -> None:
    """One set of points with the spread over workloads."""
    kl = [max(row["kl"], _FLOOR) for row in rows]
    axes.errorbar(
        [100 * row["corrected_share"] for row in rows],
        kl,
        yerr=[
            [max(0.0, y - max(row["kl_min"], _FLOOR)) for y, row in zip(kl, rows, strict=True)],
            [max(0.0, row["kl_max"] - y) for y, row in zip(kl, rows, strict=True)],
        ],
        color=colour,
        marker=shape,
        markersize=size,
        markerfacecolor=colour if fill is None else fill,
        markeredgewidth=1.5,
        linestyle="-" if joined else "none",
        linewidth=1.5,
        elinewidth=0.8,
        capsize=2,
        label=label,
    )


@contextmanager
def _figure(path: Path, title: str) -> Iterator[Any]:
    """Axes to draw on; saved as an SVG, with title and legend, when that is done."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    yield axes
    axes.set_title(title, fontsize=11)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, format="svg")
    plt.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(NO_MATPLOTLIB) from error
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    return plt
